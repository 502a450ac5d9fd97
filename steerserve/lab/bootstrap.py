"""Intervals of statistics over samples that come in clusters: several seeds of one prompt are not independent.

Most figures are ratios of sums over clusters (hits over continuations, nats over tokens). One ``Resamples``
draws the clusters once; all arms measured on them share the draws, so that differences and quotients of their
figures, taken draw by draw, are paired. ``bootstrap`` is for any other statistic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Draws = npt.NDArray[np.float64]
"""``[1 + draws]``: the estimate, then one value for each resample."""

Indices = npt.NDArray[np.int_]

DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % percentile interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Draws) -> Interval:
        """Draws without a value (0/0) drop out; NaN where the estimate itself has none."""
        low, high = _quantiles(draws, (0.025, 0.975))
        return cls(float(draws[0]), low, high)


def one_sided(draws: Draws, level: float) -> float:
    """The ``level`` quantile of the resamples: 0.05 is the lower 95 % bound."""
    (bound,) = _quantiles(draws, (level,))
    return bound


class Resamples:
    """``DRAWS`` bootstrap resamples of ``num_clusters`` clusters, after the original sample itself."""

    def __init__(self, num_clusters: int, draws: int = DRAWS) -> None:
        rng = np.random.default_rng(0)
        drawn = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=draws)
        self._weights = np.concatenate([np.ones((1, num_clusters)), drawn]).astype(np.float32)

    def sums(self, per_cluster: npt.NDArray[Any]) -> Draws:
        """Sum of ``per_cluster`` ``[num_clusters]`` over the clusters of each resample."""
        return (self._weights @ per_cluster.astype(np.float64)).astype(np.float64)

    def ratio(self, numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> Draws:
        """Σ numerator / Σ denominator of each resample; NaN where that is 0/0."""
        return quotient(self.sums(numerator), self.sums(denominator))


def quotient(numerator: Draws, denominator: Draws) -> Draws:
    """Elementwise; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


def per_cluster(cluster: npt.NDArray[np.int_], values: npt.NDArray[Any], num_clusters: int) -> Draws:
    """Sum of ``values`` ``[n]`` in each cluster."""
    return np.bincount(cluster, values.astype(np.float64), num_clusters).astype(np.float64)


def bootstrap(clusters: Indices, statistic: Callable[[Indices], float], draws: int = 2000) -> Interval:
    """Interval of ``statistic(indices)`` of samples whose clusters are ``clusters`` ``[n]``; NaN draws drop out."""
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    resampled = (
        np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]) for _ in range(draws)
    )
    values = [statistic(np.arange(len(clusters))), *(statistic(indices) for indices in resampled)]
    return Interval.of(np.array(values, dtype=np.float64))


def _quantiles(draws: Draws, levels: tuple[float, ...]) -> list[float]:
    defined = draws[1:][~np.isnan(draws[1:])]
    if np.isnan(draws[0]) or not len(defined):
        return [float("nan")] * len(levels)
    return [float(bound) for bound in np.quantile(defined, levels)]
