"""Score: check what another model wrote, without generating anything.

    steerserve serve --port 50051
    python examples/score_answers.py < answers.txt

Reads a text a line. Each is printed behind what the policy would do about it ("allow", or "flagged", "redacted" or
"blocked"), and its largest score for each concept beside the score from which the concept counts as shown. The exit
code is 1 if the policy would have acted on a text.
"""

from __future__ import annotations

import argparse
import sys

from steerserve import SteerserveClient, VerdictKind


def main() -> None:
    parser = argparse.ArgumentParser(description="Check texts, one a line of standard input, against a policy.")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port")
    parser.add_argument("--policy", default="profanity-monitor")
    options = parser.parse_args()
    num_acted_on = 0
    with SteerserveClient(options.target) as client:
        for text in filter(None, map(str.strip, sys.stdin)):
            scores = client.score(text, policies=[options.policy])
            num_acted_on += scores.acted_on
            acting = [each.kind for each in scores.verdicts if each.kind is not VerdictKind.ALLOW]
            verdict = acting[0] if acting else VerdictKind.ALLOW
            shown = [
                f"{score.concept} {score.largest.score:.2f}/{score.threshold:.2f}"
                for score in scores.concepts.values()
                if score.largest is not None
            ]
            print(f"{verdict:8}  {', '.join(shown)}  {text}")
    raise SystemExit(int(num_acted_on > 0))


if __name__ == "__main__":
    main()
