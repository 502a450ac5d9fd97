"""Labels that belong to texts, scores that belong to tokens: how a probe on tokens is fitted to them.

A text's score is that of its highest token, so that is what is fitted: the softmax-pooled scores of its tokens.
Labelling every token as its text instead teaches a probe the topic of the texts, not the few tokens that matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import track

from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.concept_eval.texts import FITTED_TOKENS
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

BATCH_SIZE = 32
FIT_STEPS = 200
LEARNING_RATE = 0.02
L2 = 0.01


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts with what they show."""

    positive: Sequence[str]
    negative: Sequence[str]

    @property
    def all(self) -> list[str]:
        """Positive ones first."""
        return [*self.positive, *self.negative]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Ordinary positions of labelled texts.

    Attributes:
        x: by site ``[N, d]`` float32.
        text: ``[N]`` which text each is of; ``label`` ``[n]`` is 1 for positive texts.
    """

    x: dict[Site, torch.Tensor]
    text: torch.Tensor
    label: torch.Tensor

    @classmethod
    def read(cls, model: LoadedModel, sites: Sequence[Site], texts: LabelledTexts) -> TokenRows:
        """Of the first ``FITTED_TOKENS`` tokens of each text; positions with a massive activation anywhere are out."""
        parts: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
        index: list[torch.Tensor] = []
        for start in track(range(0, len(texts.all), BATCH_SIZE), "activations"):
            batch = tokenize(model, texts.all[start : start + BATCH_SIZE], FITTED_TOKENS)
            x = activations_of(model, batch.tokens, tuple(sites))
            keep = batch.text.clone()
            for site in sites:
                keep &= ordinary_rows(x[site], batch.real)
            index.append(start + keep.nonzero()[:, 0])
            for site in sites:
                parts[site].append(x[site][keep].float())
        label = torch.zeros(len(texts.all))
        label[: len(texts.positive)] = 1
        x = {site: torch.cat(part) for site, part in parts.items()}
        return cls(x, torch.cat(index), label)

    @property
    def of_positive(self) -> torch.Tensor:
        """``[N]`` positions of positive texts."""
        return self.label[self.text] > 0


def fit_pooled(x: torch.Tensor, tokens: TokenRows) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-regularised logistic regression of the texts' labels on the softmax-pooled scores of their tokens.

    Both classes count the same. Starts at the difference of the classes' means: weights ``[p]`` and bias.
    """
    difference = x[tokens.of_positive].mean(0) - x[~tokens.of_positive].mean(0)
    w = (difference / difference.norm().clamp(min=1e-6)).clone().requires_grad_()
    b = torch.zeros((), requires_grad=True)
    balance = torch.where(tokens.label > 0, 0.5 / tokens.label.mean(), 0.5 / (1 - tokens.label.mean()))
    optimizer = torch.optim.Adam([w, b], lr=LEARNING_RATE)
    seen = torch.zeros(len(tokens.label), dtype=torch.bool)
    seen[tokens.text] = True  # a text of one token has no ordinary position
    for _ in range(FIT_STEPS):
        pooled = _softmax_pool(x @ w + b, tokens.text, len(tokens.label))
        loss = F.binary_cross_entropy_with_logits(pooled[seen], tokens.label[seen], weight=balance[seen])
        optimizer.zero_grad()
        (loss + L2 * w.square().sum()).backward()
        optimizer.step()
    return w.detach(), b.detach()


def _softmax_pool(score: torch.Tensor, text: torch.Tensor, count: int) -> torch.Tensor:
    """``[count]`` Σ softmax(score) · score over the tokens of each text: the maximum, with gradients for all."""
    top = torch.full((count,), -math.inf).scatter_reduce(0, text, score.detach(), "amax")
    weight = (score - top[text]).exp()
    total = torch.zeros(count).index_add(0, text, weight)
    return torch.zeros(count).index_add(0, text, weight * score) / total.clamp(min=1e-30)
