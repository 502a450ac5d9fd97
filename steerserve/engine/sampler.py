"""Draw the next token of every row; a row's draw depends on its own logits, parameters and number.

Probabilities are float32; a row is drawn by inverting its cumulative distribution at one uniform number
from the request's own generator, so a seed reproduces a response whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steerserve.types import FloatArray, SamplingParams

TOP_P_CANDIDATES = (64, 1024)
"""Top-p looks at this many of the most likely tokens, then at more, and at all only where their mass falls short."""

SMALLEST_TEMPERATURE = 1e-6
"""Below it a draw is greedy for any logits that float32 tells apart."""


@torch.inference_mode()
def sample(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Token ids ``[B]``.

    Args:
        logits: ``[B, vocab]`` float32 with a finite maximum in every row; overwritten.
        uniforms: ``[B]`` in [0, 1); not used by greedy rows.
    """
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    if len(drawn) == len(params):
        return _draw_all(logits, params, uniforms)
    tokens: list[int] = logits.numpy().argmax(axis=-1).tolist()
    if drawn:
        chosen = _draw_all(logits[drawn], [params[row] for row in drawn], [uniforms[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return tokens


def _draw_all(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    scale = torch.tensor([max(row.temperature, SMALLEST_TEMPERATURE) for row in params])
    # In place: the logits of a batch are megabytes, and fresh pages cost more than the arithmetic.
    # Centred before they are scaled: a small temperature would overflow large logits to inf − inf.
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(scale[:, None]).exp_()
    return [
        _draw_filtered(row, row_params.top_k, row_params.top_p, uniform)
        if row_params.top_k or row_params.top_p < 1
        else _draw(_running_sum(row), uniform)
        for row, row_params, uniform in zip(weights, params, uniforms, strict=True)
    ]


def _draw_filtered(weights: torch.Tensor, top_k: int, top_p: float, uniform: float) -> int:
    """Draw among the ``top_k`` largest weights, cut to the fewest that hold ``top_p`` of their sum."""
    if top_k:
        candidates, ids = weights.topk(min(top_k, len(weights)))
        total = float(candidates.sum())
    else:
        total = float(weights.sum())
        candidates, ids = _largest_holding(weights, top_p * total)
    mass = _running_sum(candidates)
    kept = int(np.searchsorted(mass, np.float32(top_p * total), side="left")) + 1
    return int(ids[_draw(mass[:kept], uniform)])


def _largest_holding(weights: torch.Tensor, needed: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Enough of the largest weights to sum to ``needed``, in descending order, and their indices."""
    for count in TOP_P_CANDIDATES:
        candidates, ids = weights.topk(min(count, len(weights)))
        if float(candidates.sum()) >= needed:
            return candidates, ids
    candidates, ids = weights.sort(descending=True)
    return candidates, ids


def _running_sum(weights: torch.Tensor) -> FloatArray:
    mass: FloatArray = torch.cumsum(weights, dim=0, out=weights).numpy()
    return mass


def _draw(mass: FloatArray, uniform: float) -> int:
    """Index whose share of the running sum ``mass[n]`` holds ``uniform``; never one without mass."""
    target = np.float32(uniform * float(mass[-1]))
    last_with_mass = np.searchsorted(mass, mass[-1], side="left")
    return int(min(np.searchsorted(mass, target, side="right"), last_with_mass))
