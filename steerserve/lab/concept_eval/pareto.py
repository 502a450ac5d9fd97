"""The harm/KL plane: which arms nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steerserve.lab.bootstrap import Draws, Interval

KL_TOLERANCE = 0.05
"""Arms whose measured KL differ by less than this share are at equal KL: knobs are matched on other text."""


@dataclass(frozen=True, eq=False)
class Point:
    """An arm: its KL, and its badness draw by draw, which is to be small (a harm rate, or 1 − a wanted rate)."""

    kl: float
    badness: Draws


@dataclass(frozen=True)
class Rival:
    """An arm beside another: ``difference`` is its badness minus the other's, paired; below 0, it does better."""

    name: str
    kl: float
    difference: Interval
    beats: bool


def front(points: Mapping[str, Point]) -> list[str]:
    """Names of the points of which none other has at most the KL and at most the badness, by rising KL."""
    names = sorted(points, key=lambda name: (points[name].kl, points[name].badness[0]))
    best, result = float("inf"), []
    for name in names:
        if points[name].badness[0] < best:
            best = float(points[name].badness[0])
            result.append(name)
    return result


def rivals(name: str, points: Mapping[str, Point]) -> Sequence[Rival]:
    """Every other arm beside ``name``; it beats it at no more KL if the difference's whole interval is below 0."""
    own = points[name]
    result = []
    for other, point in points.items():
        if other == name:
            continue
        difference = Interval.of(point.badness - own.badness)
        beats = point.kl <= (1 + KL_TOLERANCE) * own.kl and difference.high < 0
        result.append(Rival(other, point.kl, difference, beats))
    return result
