"""Operands found by gradient descent on what serving will do, for all rows at all sites together.

The loss is about a concept's words where they may be completed, plus a KL penalty on every other token.
To suppress, it is the probability of completing a word; to amplify, minus its logarithm, which keeps
pulling where the word is far from likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steerserve.lab.concept_build.completions import Completions, TextBatch, tokenize
from steerserve.lab.concept_build.effects import log_probs_at, start_at
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_eval.teacher_forced import logits_of, resumed
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.models.hooks import SiteFunction, transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import Op, Site

PROBABILITY_FLOOR = 1e-3
"""Amplifying does not try hard where a word is less likely than that and stays so."""


@dataclass(frozen=True)
class FitConfig:
    """How operands are fitted; ``kl_weight`` trades the concept's words against damage to everything else.

    Attributes:
        batch_size: texts drawn from each pool a step.
        positions: at which the loss is taken, per step: every place where a word may be completed, then others.
    """

    steps: int = 100
    batch_size: int = 16
    positions: int = 384
    learning_rate: float = 0.08
    kl_weight: float = 0.15
    seed: int = 0


def fit_values(
    model: LoadedModel,
    rows: Sequence[SiteRows],
    op: Op,
    amplify: bool,
    pools: Sequence[Sequence[str]],
    completions: Completions,
    config: FitConfig,
    report: Callable[[int, float, float], None],
) -> list[torch.Tensor]:
    """Operands ``[k]`` for the rows of each site, in activation units; fitted from 0, in steps of ``max_activation``.

    Args:
        pools: texts of several kinds, each drawn from equally often.
        report: called with step, mean P(completion) where a word may be completed, and mean KL.
    """
    relative = [torch.zeros(len(part), requires_grad=True) for part in rows]
    optimizer = torch.optim.Adam(relative, lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    first = min(part.site for part in rows).layer
    for step in range(config.steps):
        batch = tokenize(model, _draw(pools, config.batch_size, generator))
        places = completions.opens(batch.tokens) | completions.completed_next(batch)
        where = _choose_positions(batch, places, config.positions, generator)
        earlier, hidden = start_at(model, first, batch.tokens)
        before = logits_of(model, Treatment.none(model), hidden[where]).log_softmax(-1)
        with resumed(model, earlier), transformed(model, _edits(rows, op, relative)):
            after = log_probs_at(model, batch.tokens, where)
        listed = completions.next_mask(batch.tokens[where])
        completing = after.exp().masked_fill(~listed, 0).sum(-1)
        kl = kl_elsewhere(before, after, listed)
        at_places = places[where]
        if amplify:
            words = -(completing + PROBABILITY_FLOOR).log().mean()
        else:
            words = completing.sum() / max(int(at_places.sum()), 1)
        optimizer.zero_grad()
        (words + config.kl_weight * kl).backward()
        optimizer.step()
        report(step + 1, completing[at_places].mean().item(), kl.item())
    return [(value * part.max_activation).detach() for value, part in zip(relative, rows, strict=True)]


def _edits(rows: Sequence[SiteRows], op: Op, relative: Sequence[torch.Tensor]) -> dict[Site, SiteFunction]:
    def at(part: SiteRows, value: torch.Tensor) -> SiteFunction:
        return lambda x: part.edited(x, op, value * part.max_activation)

    return {part.site: at(part, value) for part, value in zip(rows, relative, strict=True)}


def _draw(pools: Sequence[Sequence[str]], count: int, generator: torch.Generator) -> list[str]:
    return [pool[i] for pool in pools for i in torch.randint(len(pool), (count,), generator=generator).tolist()]


def _choose_positions(batch: TextBatch, places: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Every one of ``places``, and as many other real positions as ``count`` leaves."""
    weight = torch.rand(batch.tokens.shape, generator=generator) + places.float()
    weight = weight.masked_fill(~batch.real, -1.0)
    cutoff = weight.flatten().topk(min(count, int(batch.real.sum()))).values[-1]
    return weight >= cutoff


def kl_elsewhere(before: torch.Tensor, after: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """Mean KL(before ‖ after) over rows ``[n, V]`` of the distributions without the ``listed`` tokens."""
    p, q = (values.masked_fill(listed, -torch.inf).log_softmax(-1) for values in (before, after))
    difference = (p - q).masked_fill(listed, 0.0)
    return (p.exp() * difference).sum(-1).mean()
