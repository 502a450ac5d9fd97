"""Directions along which the concept's words become likelier, capped: what features alone do not catch.

They start as the top singular directions of the gradients of the words' probability, each capped where
benign text hardly reaches, and are then fitted together with the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from steerserve.lab.activations import activations_of
from steerserve.lab.concept_build.fitting import Start
from steerserve.lab.concept_build.site_rows import MIN_ACTIVATION, SiteRows
from steerserve.lab.concept_eval.texts import FITTED_TOKENS
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

BENIGN_SHARE = 0.99
"""Of the positions of benign text, that no cap touches before the fit."""
BENIGN_TEXTS = 512
BATCH_SIZE = 32


def capped_directions(
    model: LoadedModel, site: Site, gradients: torch.Tensor, benign: Sequence[str], count: int, max_norm: float
) -> Start:
    """``count`` directions at ``site``, from gradients ``[m, d]`` there; on activations up to ``max_norm``."""
    directions = torch.linalg.svd(gradients, full_matrices=False).Vh[:count]
    directions = directions * torch.sign((gradients @ directions.T).sum(0))[:, None]
    rows = SiteRows(
        site=site,
        feature_ids=(-1,) * len(directions),
        W_enc=directions,
        b_enc=torch.zeros(len(directions)),
        threshold=torch.full((len(directions),), -torch.inf),
        max_norm=torch.full((len(directions),), max_norm),
        W_dec=directions,
        max_activation=torch.ones(len(directions)),
    )
    projection = _projections(model, rows, benign[:BENIGN_TEXTS], max_norm)
    cap = projection.sort(dim=0).values[int(BENIGN_SHARE * (len(projection) - 1))]
    largest = projection.amax(0).clamp(min=MIN_ACTIVATION)
    return Start(replace(rows, max_activation=largest), cap, projection.std(0).clamp(min=MIN_ACTIVATION))


@torch.no_grad()
def _projections(model: LoadedModel, rows: SiteRows, texts: Sequence[str], max_norm: float) -> torch.Tensor:
    """``[N, k]`` at every position of ``texts`` inside the domain."""
    parts = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenize(model, texts[start : start + BATCH_SIZE], FITTED_TOKENS)
        x = activations_of(model, batch.tokens, (rows.site,))[rows.site][batch.text]
        parts.append(rows.activations(x[x.float().norm(dim=1) <= max_norm]))
    return torch.cat(parts)
