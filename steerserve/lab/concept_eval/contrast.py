"""What simple methods are fitted on: activations of positive and negative train texts at the pack's sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.concept_eval.texts import FITTED_TOKENS, Corpus
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import LoadedModel
from steerserve.types import FloatArray, Site

BATCH_SIZE = 16
MAX_PROBE_ROWS = 6000
"""Of either kind, spread over all texts."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """Activations ``[n, d]`` of one site, of positive and of negative texts; attention sinks are left out."""

    site: Site
    positive: torch.Tensor
    negative: torch.Tensor

    def difference_of_means(self) -> FloatArray:
        """``[d]`` mean positive − mean negative activation."""
        difference: FloatArray = (self.positive.mean(0) - self.negative.mean(0)).numpy()
        return difference

    def probe(self) -> FloatArray:
        """``[d]`` unit weights of a logistic regression on raw activations, each labelled as its text is."""
        from sklearn.linear_model import LogisticRegression

        positive, negative = _spread(self.positive), _spread(self.negative)
        rows = torch.cat([positive, negative]).numpy()
        labels = np.arange(len(rows)) < len(positive)
        scale = rows.std(0) + 1e-6
        weights = LogisticRegression(C=0.01, max_iter=300).fit(rows / scale, labels).coef_[0] / scale
        unit: FloatArray = (weights / np.linalg.norm(weights)).astype(np.float32)
        return unit


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """At most ``MAX_PROBE_ROWS`` of ``rows``, at even distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), MAX_PROBE_ROWS)).long()]


def contrasts(model: LoadedModel, sites: Sequence[Site], corpus: Corpus, num_texts: int) -> dict[Site, Contrast]:
    """Of at most ``num_texts`` texts of each kind."""
    positive = _rows(model, sites, corpus.positive[:num_texts])
    negative = _rows(model, sites, corpus.negative[:num_texts])
    return {site: Contrast(site, positive[site], negative[site]) for site in sites}


def _rows(model: LoadedModel, sites: Sequence[Site], texts: Sequence[str]) -> dict[Site, torch.Tensor]:
    kept: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    for start in track(range(0, len(texts), BATCH_SIZE), "activations"):
        batch = tokenize(model, texts[start : start + BATCH_SIZE], FITTED_TOKENS)
        for site, x in activations_of(model, batch.tokens, tuple(sites)).items():
            kept[site].append(x[ordinary_rows(x, batch.real)].float())
    return {site: torch.cat(rows) for site, rows in kept.items()}


def probe_scores(contrast: Contrast, probe: FloatArray) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Of the positive and of the negative activations."""
    weights = torch.from_numpy(probe)
    return (contrast.positive @ weights).numpy(), (contrast.negative @ weights).numpy()
