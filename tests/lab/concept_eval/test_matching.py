"""Equal KL, and who beats whom at it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steerserve.lab.concept_eval.matching import MAX_READINGS, TOLERANCE, KnobMatcher
from steerserve.lab.concept_eval.pareto import KL_TOLERANCE, Point, front, rivals


@pytest.mark.parametrize(
    "curve",
    [
        lambda knob: 0.02 * knob**2,
        lambda knob: 0.001 * math.expm1(knob),
        lambda knob: 5 * knob / (1 + knob),
        lambda knob: max(0.0, knob - 3) ** 2,  # nothing happens at first, as with a cap above all projections
        lambda knob: 30 * knob,
    ],
)
@pytest.mark.parametrize("target", [0.01, 0.1, 1.0])
def test_a_knob_is_found_for_any_rising_cost(curve: object, target: float) -> None:
    readings = 0

    def kl(knob: float) -> float:
        nonlocal readings
        readings += 1
        return float(curve(knob))  # type: ignore[operator]

    matcher = KnobMatcher(kl, start=1.0, largest=100.0)
    match = matcher.match(target)
    assert match.reached
    assert match.kl == kl(match.knob) == pytest.approx(target, rel=TOLERANCE)
    assert readings <= MAX_READINGS + 18


def test_budgets_share_their_readings() -> None:
    read: list[float] = []

    def kl(knob: float) -> float:
        read.append(knob)
        return 0.02 * knob**2

    matcher = KnobMatcher(kl, start=1.0, largest=100.0)
    knobs = [matcher.match(target).knob for target in (0.05, 0.1, 0.2)]
    assert knobs == sorted(knobs)
    assert len(read) == len(set(read)) <= 14


def test_a_method_that_saturates_says_so() -> None:
    match = KnobMatcher(lambda knob: min(knob, 0.5), start=1.0, largest=64.0).match(2.0)
    assert (match.kl, match.reached) == (0.5, False)


def test_a_method_that_jumps_gives_its_nearest() -> None:
    match = KnobMatcher(lambda knob: 0.1 if knob < 2.5 else 7.0, start=1.0, largest=64.0).match(0.2)
    assert (match.kl, match.reached) == (0.1, False)


def point(kl: float, *badness: float) -> Point:
    """Draws around the first value."""
    return Point(kl, np.array(badness))


def test_the_front_is_what_nothing_surpasses() -> None:
    points = {
        "nothing": point(0.0, 0.5),
        "a": point(0.1, 0.3),
        "worse than a": point(0.2, 0.3),
        "b": point(0.3, 0.1),
        "beaten by b": point(0.3, 0.2),
        "dear": point(9.0, 0.05),
    }
    assert front(points) == ["nothing", "a", "b", "dear"]


def test_a_rival_beats_by_more_than_chance_and_at_no_more_kl() -> None:
    own = point(0.1, 0.3, 0.2, 0.4)
    points = {
        "policy": own,
        "better": point(0.1 * (1 + KL_TOLERANCE) - 1e-9, 0.2, 0.1, 0.3),  # in every draw, though the spreads overlap
        "dearer": point(0.2, 0.0, 0.0, 0.0),
        "by chance": point(0.05, 0.2, 0.3, 0.1),
    }
    found = {rival.name: rival for rival in rivals("policy", points)}
    assert [name for name, rival in found.items() if rival.beats] == ["better"]
    assert found["better"].difference.value == pytest.approx(-0.1)
    assert found["dearer"].difference.high < 0
    assert "policy" not in found
