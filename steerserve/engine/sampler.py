"""Draw the next token of every row; a row's draw depends on its own logits, parameters and number.

Softmax is float32; a row is drawn by inverting its cumulative distribution at one uniform number
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


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Token ids ``[B]`` for ``logits[B, vocab]``, float32 and with a finite maximum in every row.

    Args:
        uniforms: ``[B]`` in [0, 1); not used by greedy rows.
    """
    tokens: list[int] = logits.numpy().argmax(axis=-1).tolist()
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    if not drawn:
        return tokens
    probabilities = _softmax(logits[drawn], [params[row].temperature for row in drawn])
    mass = probabilities.cumsum(dim=-1).numpy()
    for index, row in enumerate(drawn):
        top_k, top_p = params[row].top_k, params[row].top_p
        if top_k or top_p < 1:
            tokens[row] = _draw_filtered(probabilities[index], top_k, top_p, uniforms[row])
        else:
            tokens[row] = _draw(mass[index], uniforms[row])
    return tokens


def _softmax(logits: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    # Centred first: a small temperature would overflow large logits to inf − inf.
    scale = torch.tensor([max(temperature, SMALLEST_TEMPERATURE) for temperature in temperatures])
    centred = logits - logits.amax(dim=-1, keepdim=True)
    return torch.softmax(centred.div_(scale[:, None]), dim=-1)


def _draw_filtered(probabilities: torch.Tensor, top_k: int, top_p: float, uniform: float) -> int:
    """Draw among the ``top_k`` most likely tokens, cut to the fewest that hold ``top_p`` of their mass."""
    candidates, ids = _most_likely(probabilities, top_k, top_p)
    mass = candidates.cumsum(dim=0).numpy()
    needed = top_p * (float(mass[-1]) if top_k else 1.0)
    kept = int(np.searchsorted(mass, np.float32(needed), side="left")) + 1
    return int(ids[_draw(mass[:kept], uniform)])


def _most_likely(probabilities: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in descending order and their token ids: ``top_k`` of them, or enough to hold ``top_p``."""
    size = len(probabilities)
    if top_k:
        candidates, ids = probabilities.topk(min(top_k, size))
        return candidates, ids
    for count in TOP_P_CANDIDATES:
        candidates, ids = probabilities.topk(min(count, size))
        if float(candidates.sum()) >= top_p:
            return candidates, ids
    candidates, ids = probabilities.sort(descending=True)
    return candidates, ids


def _draw(mass: FloatArray, uniform: float) -> int:
    """Index whose share of the running sum ``mass[n]`` holds ``uniform``; never one without mass."""
    target = np.float32(uniform * float(mass[-1]))
    last_with_mass = np.searchsorted(mass, mass[-1], side="left")
    return int(min(np.searchsorted(mass, target, side="right"), last_with_mass))
