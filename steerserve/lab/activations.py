"""Activations of texts at chosen sites of a model.

The first position of a context and separator tokens carry *massive activations* (in SmolLM2 a norm of
24,000 beside a median of 150) that are an attention sink, not a feature. A row is not ordinary when its
norm exceeds ``MASSIVE_NORM_RATIO`` times the median of its batch, padding left out.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch

from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

MASSIVE_NORM_RATIO = 8.0


@torch.inference_mode()
def activations_of(model: LoadedModel, tokens: torch.Tensor, sites: tuple[Site, ...]) -> dict[Site, torch.Tensor]:
    """Activations ``[B, T, d]`` of ``tokens`` ``[B, T]``; the forward pass stops after the last site."""
    captured: dict[Site, torch.Tensor] = {}

    def keep(site: Site, activation: torch.Tensor) -> torch.Tensor:
        captured[site] = activation
        if len(captured) == len(sites):
            raise _AllCapturedError
        return activation

    with transformed(model, {site: partial(keep, site) for site in sites}), suppress(_AllCapturedError):
        model.model(tokens.long(), use_cache=False, logits_to_keep=1)
    return captured


def ordinary_rows(rows: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Mask ``[B, T]`` of the rows ``[B, T, d]`` that carry no massive activation and are ``real`` ``[B, T]``."""
    norms = rows.float().norm(dim=-1)
    real = torch.ones_like(norms, dtype=torch.bool) if real is None else real
    keep: torch.Tensor = real & (norms <= MASSIVE_NORM_RATIO * norms[real].median())
    keep[:, 0] = False
    return keep


class _AllCapturedError(Exception):
    """Ends a forward pass early."""
