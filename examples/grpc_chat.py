"""gRPC beside an application: a guarded chat, streamed, and what the server did about it.

    steerserve serve --port 50051
    python examples/grpc_chat.py "What do you say when you hit your thumb with a hammer?"

A server with keys: STEERSERVE_API_KEY or STEERSERVE_API_KEY_FILE. TLS: STEERSERVE_TLS_CA.
"""

from __future__ import annotations

import argparse

from steerserve import Message, SteerserveClient
from steerserve.errors import CapacityError


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a guarded model, and see what its policy did.")
    parser.add_argument("question")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port")
    parser.add_argument("--policy", default="family-friendly")
    options = parser.parse_args()
    with SteerserveClient(options.target) as client:
        try:
            for piece in client.generate_stream(
                [Message("user", options.question)], policies=[options.policy], max_tokens=60, timeout=60
            ):
                print(piece.text, end="", flush=True)
        except CapacityError as error:  # a full queue or a used-up quota; nothing is wrong with the request
            raise SystemExit(f"try again in {error.retry_after_s:.0f} s: {error}") from None
    print()
    for verdict in piece.verdicts:  # the last piece has the verdicts and the receipt
        print(f"{verdict.source}: {verdict.kind}{' by ' if verdict.rule else ''}{verdict.rule}")
    assert piece.receipt is not None
    print(f"steered, by the kernel's own count: {piece.receipt.steered}")


if __name__ == "__main__":
    main()
