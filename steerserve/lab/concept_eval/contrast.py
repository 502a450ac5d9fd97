"""What simple methods are fitted on: activations of positive and negative train texts at the pack's sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from steerserve.lab.concept_eval.texts import Corpus
from steerserve.lab.pooled_probe import LabelledTexts, TokenRows, fit_pooled
from steerserve.models.loading import LoadedModel
from steerserve.types import FloatArray, Site


@dataclass(frozen=True, eq=False)
class Contrast:
    """Activations of one site, of positive and of negative texts; attention sinks are left out."""

    site: Site
    tokens: TokenRows

    @property
    def positive(self) -> torch.Tensor:
        """``[n, d]``."""
        return self.tokens.x[self.site][self.tokens.of_positive]

    @property
    def negative(self) -> torch.Tensor:
        """``[n, d]``."""
        return self.tokens.x[self.site][~self.tokens.of_positive]

    def difference_of_means(self) -> FloatArray:
        """``[d]`` mean positive − mean negative activation."""
        difference: FloatArray = (self.positive.mean(0) - self.negative.mean(0)).numpy()
        return difference

    def probe(self) -> FloatArray:
        """``[d]`` unit weights of the logistic regression that a pack's own probe is, on raw activations."""
        x = self.tokens.x[self.site]
        deviation = x.std(0).clamp(min=1e-6)
        weights, _ = fit_pooled((x - x.mean(0)) / deviation, self.tokens)
        reads = (weights / deviation).numpy()
        unit: FloatArray = (reads / np.linalg.norm(reads)).astype(np.float32)
        return unit


def contrasts(model: LoadedModel, sites: Sequence[Site], corpus: Corpus, num_texts: int) -> dict[Site, Contrast]:
    """Of at most ``num_texts`` texts of each kind."""
    texts = LabelledTexts(corpus.positive[:num_texts], corpus.negative[:num_texts])
    tokens = TokenRows.read(model, sites, texts)
    return {site: Contrast(site, tokens) for site in sites}


def probe_scores(contrast: Contrast, probe: FloatArray) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Of the positive and of the negative activations."""
    weights = torch.from_numpy(probe)
    return (contrast.positive @ weights).numpy(), (contrast.negative @ weights).numpy()
