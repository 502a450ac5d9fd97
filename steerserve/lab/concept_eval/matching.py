"""Matched strength: the knob at which a method costs as much benign KL as another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.03
MAX_READINGS = 14


@dataclass(frozen=True)
class Match:
    """A knob and the KL that it was read to cost; ``reached`` if that is the target's, within ``TOLERANCE``."""

    knob: float
    kl: float
    reached: bool


class KnobMatcher:
    """Finds knobs of one method; readings are kept, so that each further target costs a few."""

    def __init__(self, kl: Callable[[float], float], start: float, largest: float) -> None:
        """``kl(knob)`` rises with the knob, from 0 at 0, and is read at ``largest`` at the most."""
        self._kl = kl
        self._start = start
        self._largest = largest
        self._read: dict[float, float] = {}

    def match(self, target: float) -> Match:
        """The knob whose KL is nearest to ``target``, above 0, by log-log interpolation inside a bracket.

        A method that saturates below the target, or jumps over it, gives its nearest: ``reached`` says so.
        """
        assert target > 0, target
        low, high = self._bracket(target)
        for _ in range(MAX_READINGS):
            nearest = min(self._read, key=lambda knob: _distance(self._read[knob], target))
            if _distance(self._read[nearest], target) <= TOLERANCE or high - low <= 1e-4 * high:
                break
            knob = self._between(low, high, target)
            if self._reading(knob) < target:
                low = knob
            else:
                high = knob
        nearest = min(self._read, key=lambda knob: _distance(self._read[knob], target))
        kl = self._read[nearest]
        return Match(nearest, kl, _distance(kl, target) <= TOLERANCE)

    def _reading(self, knob: float) -> float:
        if knob not in self._read:
            self._read[knob] = self._kl(knob)
        return self._read[knob]

    def _bracket(self, target: float) -> tuple[float, float]:
        """Knobs whose readings lie on both sides of the target, as far as there are any."""
        knob = min(self._start, self._largest)
        self._reading(knob)
        while max(self._read.values()) < target and max(self._read) < self._largest:
            self._reading(min(2 * max(self._read), self._largest))
        while min(self._read.values()) > target and min(self._read) > 1e-6 * self._start:
            self._reading(min(self._read) / 2)
        below = [knob for knob, kl in self._read.items() if kl < target]
        above = [knob for knob, kl in self._read.items() if kl >= target]
        low = max(below, default=0.0)
        return low, min((knob for knob in above if knob > low), default=max(self._read))

    def _between(self, low: float, high: float, target: float) -> float:
        """Where a power law through both ends meets the target, kept off the ends."""
        kl_low, kl_high = self._read.get(low, 0.0), self._read[high]
        if low <= 0 or kl_low <= 0 or kl_high <= kl_low:
            return (low + high) / 2
        power = math.log(kl_high / kl_low) / math.log(high / low)
        knob = low * math.exp(math.log(target / kl_low) / power)
        margin = 0.05 * (high - low)
        return min(max(knob, low + margin), high - margin)


def _distance(kl: float, target: float) -> float:
    return abs(kl - target) / target
