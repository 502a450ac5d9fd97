"""Detectors of a concept: a linear probe on raw activations, and a weighted sum of SAE features.

Both are fitted alike: labels belong to texts, scores to tokens, and a text's score is that of its highest
token. Raw probes usually detect better than SAE features; the one with the higher AUROC on validation texts
is kept, and both figures are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from steerserve.lab.activations import MASSIVE_NORM_RATIO, activations_of
from steerserve.lab.concept_build.contrast import auroc
from steerserve.lab.concept_build.site_rows import MIN_ACTIVATION, SiteRows
from steerserve.lab.concept_eval.texts import READ_TOKENS
from steerserve.lab.pooled_probe import LabelledTexts, TokenRows, fit_pooled
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

BATCH_SIZE = 32
FALSE_POSITIVE_RATE = 0.01

Scores = npt.NDArray[np.float32]
Kind = Literal["features", "probe"]


@dataclass(frozen=True, eq=False)
class Detector:
    """score = Σ weight · f over ``rows``; ``threshold`` is exceeded by at most 1 % of negative validation texts.

    Attributes:
        weight: ``[k]``.
        auroc_features, auroc_probe: on validation texts, of each kind at its best site; None if there was none.
    """

    kind: Kind
    rows: SiteRows
    weight: torch.Tensor
    threshold: float
    auroc_features: float | None
    auroc_probe: float | None


def choose_detector(
    model: LoadedModel,
    sites: Sequence[Site],
    features: Sequence[SiteRows],
    train: LabelledTexts,
    validation: LabelledTexts,
) -> Detector:
    """The best of a probe at each site and of a weighted sum of each site's ``features``."""
    tokens = TokenRows.read(model, sorted({*sites, *(rows.site for rows in features)}), train)
    candidates: list[tuple[Kind, tuple[SiteRows, torch.Tensor]]] = [
        *(("probe", _fit_probe(tokens, site)) for site in sites),
        *(("features", _fit_features(tokens, rows)) for rows in features),
    ]
    scored = []
    for kind, (rows, weight) in candidates:
        scores = text_scores(model, rows, weight, validation.all)
        scored.append((kind, rows, weight, scores, float(auroc(scores[:, None], len(validation.positive))[0])))
    best: dict[str, float] = {}
    for kind, *_, area in scored:
        best[kind] = max(area, best.get(kind, 0.0))
    kind, rows, weight, scores, _ = max(scored, key=lambda candidate: candidate[-1])
    benign = scores[len(validation.positive) :]
    # Out of a row's domain the score is 0, which must not fire.
    threshold = max(float(np.quantile(benign, 1 - FALSE_POSITIVE_RATE, method="higher")), 0.0)
    return Detector(kind, rows, weight, threshold, best.get("features"), best.get("probe"))


@torch.inference_mode()
def text_scores(model: LoadedModel, rows: SiteRows, weight: torch.Tensor, texts: Sequence[str]) -> Scores:
    """Largest score over the positions of each text, ``[n]``, cut where the evaluation cuts it."""
    scores: list[torch.Tensor] = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenize(model, texts[start : start + BATCH_SIZE], READ_TOKENS)
        x = activations_of(model, batch.tokens, (rows.site,))[rows.site]
        scores.append((rows.activations(x) @ weight).masked_fill(~batch.text, -torch.inf).amax(1))
    return torch.cat(scores).numpy()


def _fit_probe(tokens: TokenRows, site: Site) -> tuple[SiteRows, torch.Tensor]:
    """A row that reads the raw activation, and its weight of 1."""
    x = tokens.x[site]
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    w, b = fit_pooled((x - mean) / deviation, tokens)
    reads = w / deviation
    bias = float(b - mean @ reads)
    max_norm = MASSIVE_NORM_RATIO * float(x.norm(dim=1).median())
    row = SiteRows.of_direction(site, reads, torch.zeros_like(reads), bias, max_norm)
    largest = row.activations(x).amax(0).clamp(min=MIN_ACTIVATION)
    return replace(row, max_activation=largest), torch.ones(1)


def _fit_features(tokens: TokenRows, rows: SiteRows) -> tuple[SiteRows, torch.Tensor]:
    """Weights ``[k]`` of SAE features; a bias would shift score and threshold alike, and is left out."""
    f = rows.activations(tokens.x[rows.site])
    scale = rows.max_activation.clamp(min=MIN_ACTIVATION)
    w, _ = fit_pooled(f / scale, tokens)
    used = [index for index, weight in enumerate(w.tolist()) if weight != 0]
    return rows.take(used), (w / scale)[used]
