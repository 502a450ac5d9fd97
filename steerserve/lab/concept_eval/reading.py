"""Outputs to be read blind: shuffled, without their origin; the key is a file apart."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from steerserve.lab.concept_eval.outcome import Outcome

OUTPUTS = 100


def write_blind(directory: Path, untreated: Outcome, treated: Outcome) -> None:
    """``outputs.txt``, numbered, half of each arm from random places; ``key.json`` says which is which."""
    rng = Random(0)
    drawn: list[tuple[str, str]] = []
    for arm, outcome in (("untreated", untreated), ("policy", treated)):
        chosen = rng.sample(outcome.continuations, min(OUTPUTS // 2, len(outcome.continuations)))
        drawn += [(arm, continuation.text) for continuation in chosen]
    rng.shuffle(drawn)
    directory.mkdir(parents=True, exist_ok=True)
    numbered = [f"[{number}]\n{text.strip()}\n" for number, (_, text) in enumerate(drawn, 1)]
    (directory / "outputs.txt").write_text("\n".join(numbered), encoding="utf-8")
    key = {number: arm for number, (arm, _) in enumerate(drawn, 1)}
    (directory / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
