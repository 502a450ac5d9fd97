"""What a circuit answers: how often the right thing, by what margin, and which tokens come first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.graph import Graph, Present
from steerserve.circuits.metrics import logit_difference
from steerserve.circuits.prompts import PromptPairs
from steerserve.circuits.propagation import run_circuit
from steerserve.circuits.sliced import SlicedModel

BATCH_SIZE = 32
MODEL = "model"


@dataclass(frozen=True)
class Answers:
    """Over some prompts.

    Attributes:
        accuracy: share of prompts after which some correct answer is likelier than every wrong one.
        first: share after which a correct answer is the likeliest of all tokens.
        margin: mean logit of the correct answers less that of the wrong ones; mean over prompts.
        margin_error: standard error of ``margin``; None of one prompt.
    """

    num_prompts: int
    accuracy: float
    first: float
    margin: float
    margin_error: float | None


def answers_of(pairs: PromptPairs, logits: Tensor) -> Answers:
    """From logits ``[N, V]`` behind the clean prompts."""
    right, first = [], []
    for row, correct, wrong in zip(logits, pairs.correct, pairs.wrong, strict=True):
        right.append(bool(row[list(correct)].max() > row[list(wrong)].max()))
        first.append(int(row.argmax()) in correct)
    margins = -logit_difference(pairs).per_prompt(logits)
    error = float(margins.std() / len(pairs) ** 0.5) if len(pairs) > 1 else None
    return Answers(len(pairs), sum(right) / len(pairs), sum(first) / len(pairs), float(margins.mean()), error)


def logits_of(
    model: SlicedModel,
    graph: Graph,
    pairs: PromptPairs,
    ablation: Ablation,
    circuits: Mapping[str, Present],
    report: Callable[[float], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Logits ``[N, V]`` of the whole model, under ``MODEL``, and of each circuit.

    Args:
        report: gets the share of the prompts that are done.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in (MODEL, *circuits)}
    for start in range(0, len(pairs), BATCH_SIZE):
        batch = pairs.take(range(start, min(start + BATCH_SIZE, len(pairs))))
        baseline = Baseline(model, batch, ablation)
        parts[MODEL].append(baseline.clean_logits)
        for name, present in circuits.items():
            parts[name].append(run_circuit(graph, baseline, present)[1])
        report((start + len(batch)) / len(pairs))
    return {name: torch.cat(of) for name, of in parts.items()}
