"""Operands, and directions, found by gradient descent on what serving will do; all sites together.

The loss is about a concept's words in contexts that draw it, plus what every other token there and in benign
text pays. To suppress, it is the share of the words' probability that is left; to amplify, minus the logarithm of
it, which keeps pulling where a word is far from likely.

What the others pay is a KL divergence, and the change of perplexity: a KL of 0.015 nats is small, but it may hide
a shift of probability towards rare tokens that costs 0.1 nats of what the untreated model thinks of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from steerserve.lab.concept_build.completions import Completions
from steerserve.lab.concept_build.contexts import Contexts, word_probability
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.models.hooks import SiteFunction, transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import Op, Site

PROBABILITY_FLOOR = 1e-3
"""Amplifying does not try hard where a word is less likely than that and stays so."""


@dataclass(frozen=True)
class FitConfig:
    """How operands are fitted.

    Attributes:
        kl_weight: trades the concept's words against damage to everything else.
        surprisal_weight: trades them against a change of how likely the untreated model finds everything else.
        batch_size: contexts drawn from each pool a step.
        scored_share: of the positions at which the loss is taken; places where a word may be completed are always.
        learning_rate: of operands, in units of their rows' scale; falls linearly over the second half.
        direction_rate: of the directions.
    """

    steps: int = 110
    batch_size: int = 10
    scored_share: float = 0.35
    learning_rate: float = 0.12
    direction_rate: float = 0.002
    kl_weight: float = 0.6
    surprisal_weight: float = 0.5
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Pools:
    """Contexts that draw the concept, several kinds of them, and benign ones; all cached at one layer."""

    drawing: Sequence[Contexts]
    benign: Contexts


@dataclass(frozen=True, eq=False)
class Start:
    """One site's rows before the fit.

    Attributes:
        value: ``[k]`` operands to start from.
        scale: ``[k]`` natural size of a change of each.
    """

    rows: SiteRows
    value: torch.Tensor
    scale: torch.Tensor


class _Parameters:
    """What the fit moves at one site: every operand, and the rows that are directions."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.relative = torch.zeros(len(start.rows), requires_grad=True)
        self._is_direction = torch.tensor([feature < 0 for feature in start.rows.feature_ids])
        self.directions = start.rows.W_enc[self._is_direction].clone().requires_grad_()

    def rows(self) -> SiteRows:
        """With unit directions."""
        if not self._is_direction.any():
            return self.start.rows
        unit = F.normalize(self.directions, dim=1)
        index = self._is_direction.nonzero()[:, 0]
        W_enc, W_dec = (rows.index_copy(0, index, unit) for rows in (self.start.rows.W_enc, self.start.rows.W_dec))
        return replace(self.start.rows, W_enc=W_enc, W_dec=W_dec)

    def value(self) -> torch.Tensor:
        return self.start.value + self.relative * self.start.scale


def fit_values(
    model: LoadedModel,
    starts: Sequence[Start],
    op: Op,
    amplify: bool,
    pools: Pools,
    completions: Completions,
    config: FitConfig,
    report: Callable[[int, float, float], None],
) -> list[tuple[SiteRows, torch.Tensor]]:
    """The rows of each site, their directions fitted, with operands ``[k]`` in activation units.

    Args:
        report: called with step, the words' probability as a share of the untreated model's, and mean KL.
    """
    parameters = [_Parameters(start) for start in starts]
    optimizer = torch.optim.Adam(
        [
            {"params": [each.relative for each in parameters], "lr": config.learning_rate},
            {"params": [each.directions for each in parameters], "lr": config.direction_rate},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / config.steps)))
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        edits = {each.start.rows.site: _edit(each, op) for each in parameters}
        share, loss = 0.0, torch.zeros(())
        for pool in pools.drawing:
            before, after, listed = _log_probs(
                model, _draw(pool, config, generator), edits, completions, config, generator
            )
            left = word_probability(after, listed) / word_probability(before, listed).clamp(min=1e-6)
            pull = -(after.exp().masked_fill(~listed, 0).sum(-1) + PROBABILITY_FLOOR).log().mean() if amplify else left
            loss = loss + (pull + _damage(before, after, listed, config)[0]) / len(pools.drawing)
            share += left.item() / len(pools.drawing)
        benign = _draw(pools.benign, config, generator)
        damage, kl = _damage(*_log_probs(model, benign, edits, completions, config, generator), config)
        optimizer.zero_grad()
        (loss + damage).backward()
        optimizer.step()
        schedule.step()
        report(step + 1, share, kl)
    return [(_detached(each.rows()), each.value().detach()) for each in parameters]


def _edit(parameters: _Parameters, op: Op) -> SiteFunction:
    return partial(parameters.rows().edited, op=op, value=parameters.value())


def _detached(rows: SiteRows) -> SiteRows:
    return replace(rows, W_enc=rows.W_enc.detach(), W_dec=rows.W_dec.detach())


def _draw(pool: Contexts, config: FitConfig, generator: torch.Generator) -> Contexts:
    return pool.take(torch.randint(len(pool), (config.batch_size,), generator=generator))


def _log_probs(
    model: LoadedModel,
    batch: Contexts,
    edits: dict[Site, SiteFunction],
    completions: Completions,
    config: FitConfig,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Untreated and treated log-probabilities ``[n, V]`` at some of the scored positions, and the concept's tokens."""
    drawn = torch.rand(batch.tokens.shape, generator=generator) < config.scored_share
    where = batch.scored & (drawn | batch.places(completions))
    with torch.no_grad():
        before = batch.log_probs(model, where)
    with transformed(model, edits):
        after = batch.log_probs(model, where)
    return before, after, completions.next_mask(batch.tokens[where])


def _damage(
    before: torch.Tensor, after: torch.Tensor, listed: torch.Tensor, config: FitConfig
) -> tuple[torch.Tensor, float]:
    """What the tokens that are not ``listed`` pay, and the KL in it."""
    kl, surprisal = elsewhere(before, after, listed)
    return config.kl_weight * kl + config.surprisal_weight * surprisal.abs(), kl.item()


def elsewhere(before: torch.Tensor, after: torch.Tensor, listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the distributions ``[n, V]`` without the ``listed`` tokens, means over rows, in nats.

    KL(before ‖ after), and how much less likely ``before`` finds what ``after`` writes than what it writes itself.
    """
    p, q = (values.masked_fill(listed, -torch.inf).log_softmax(-1) for values in (before, after))
    finite = p.masked_fill(listed, 0.0)
    kl = (p.exp() * (finite - q.masked_fill(listed, 0.0))).sum(-1).mean()
    return kl, ((p.exp() - q.exp()) * finite).sum(-1).mean()
