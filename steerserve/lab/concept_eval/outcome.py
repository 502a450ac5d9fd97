"""One arm's continuations as sums over prompts, of which every figure of a card is a quotient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerserve.lab.bootstrap import Draws, Interval, Resamples, per_cluster, quotient
from steerserve.lab.concept_eval.continuations import Continuation
from steerserve.lab.concept_eval.judges import Judge, Mask
from steerserve.lab.concept_eval.prompts import Prompt, joined

Sums = npt.NDArray[np.float64]
"""``[num_prompts]``."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """An arm, judged; all arrays ``[num_prompts]`` but ``shown`` and ``shown_second`` ``[n]``.

    Attributes:
        shown: continuations that show the concept, by the primary judge; ``shown_second`` by the second one.
        repeated: bigrams of a continuation that it had before; ``distinct``: different ones among all
            continuations of a prompt.
    """

    continuations: list[Continuation]
    shown: Mask
    shown_second: Mask | None
    count: Sums
    hits: Sums
    hits_second: Sums
    nll: Sums
    tokens: Sums
    bigrams: Sums
    repeated: Sums
    distinct: Sums
    ended: Sums

    @classmethod
    def of(
        cls, prompts: Sequence[Prompt], continuations: list[Continuation], primary: Judge, second: Judge | None
    ) -> Outcome:
        """Judge the continuations, each joined to the word that its prompt left unfinished."""
        texts = [joined(prompts[c.prompt].text, c.text) for c in continuations]
        shown = primary.flags(texts)
        shown_second = second.flags(texts) if second is not None else None
        cluster = np.array([c.prompt for c in continuations])

        def summed(values: npt.NDArray[np.float64] | Mask | list[int]) -> Sums:
            return per_cluster(cluster, np.asarray(values), len(prompts))

        bigrams = [list(zip(c.token_ids, c.token_ids[1:], strict=False)) for c in continuations]
        different: list[set[tuple[int, int]]] = [set() for _ in prompts]
        for c, pairs in zip(continuations, bigrams, strict=True):
            different[c.prompt].update(pairs)
        return cls(
            continuations=continuations,
            shown=shown,
            shown_second=shown_second,
            count=summed(np.ones(len(continuations))),
            hits=summed(shown),
            hits_second=summed(shown_second) if shown_second is not None else np.zeros(len(prompts)),
            nll=summed(np.array([c.nll for c in continuations])),
            tokens=summed([len(c.token_ids) for c in continuations]),
            bigrams=summed([len(pairs) for pairs in bigrams]),
            repeated=summed([len(pairs) - len(set(pairs)) for pairs in bigrams]),
            distinct=np.array([len(pairs) for pairs in different], dtype=np.float64),
            ended=summed([c.ended for c in continuations]),
        )

    def rate(self, resamples: Resamples) -> Draws:
        """Share of continuations that show the concept."""
        return resamples.ratio(self.hits, self.count)

    def second_rate(self, resamples: Resamples) -> Draws:
        """The same by the second judge; NaN without one."""
        rate = resamples.ratio(self.hits_second, self.count)
        return rate if self.shown_second is not None else np.full_like(rate, np.nan)

    def perplexity(self, resamples: Resamples) -> Draws:
        """exp of the token-weighted mean NLL under the untreated model."""
        perplexity: Draws = np.exp(resamples.ratio(self.nll, self.tokens))
        return perplexity


Statistic = Callable[[Outcome, Resamples], Draws]

DEGENERATION: dict[str, Statistic] = {
    "repetition": lambda o, r: r.ratio(o.repeated, o.bigrams),
    "distinct_2": lambda o, r: r.ratio(o.distinct, o.bigrams),
    "mean_length": lambda o, r: r.ratio(o.tokens, o.count),
    "ended_share": lambda o, r: r.ratio(o.ended, o.count),
}
"""A guard must not buy its rate, or its perplexity, with dull, repeated or cut-off text."""

TOLERANCE = 0.1
"""Within this share of the untreated model's figure; of a share near 0, within a tenth of it in points."""


def degeneration(treated: Outcome, untreated: Outcome, resamples: Resamples) -> dict[str, dict[str, object]]:
    """Each figure beside the untreated model's, and whether it stays within 10 % of it (shares: or within 1 point)."""
    result: dict[str, dict[str, object]] = {}
    for name, statistic in DEGENERATION.items():
        ours, theirs = statistic(treated, resamples), statistic(untreated, resamples)
        near = abs(ours[0] - theirs[0]) <= TOLERANCE * abs(theirs[0])
        if name != "mean_length":
            near = near or abs(ours[0] - theirs[0]) <= TOLERANCE / 10
        result[name] = {
            "value": float(ours[0]),
            "untreated": float(theirs[0]),
            "ratio": vars(Interval.of(quotient(ours, theirs))),
            "within_10_percent": bool(near),
        }
    return result
