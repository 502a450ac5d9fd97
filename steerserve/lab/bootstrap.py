"""Intervals of statistics over samples that come in clusters: several seeds of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int_]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(clusters: Indices, statistic: Callable[[Indices], float], draws: int = 2000) -> Interval:
    """Percentile interval of ``statistic(indices)`` under resampling of whole clusters; draws that are NaN drop out."""
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    values = [
        statistic(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
        for _ in range(draws)
    ]
    defined = [value for value in values if not np.isnan(value)] or [np.nan]
    low, high = np.quantile(defined, (0.025, 0.975))
    return Interval(float(statistic(np.arange(len(clusters)))), float(low), float(high))
