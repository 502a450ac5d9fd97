"""What follows from the scores that a request's guards read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steerserve.engine.entries import Entries
from steerserve.engine.sequence import Sequence
from steerserve.errors import DetectorError
from steerserve.types import FloatArray, GuardAction, GuardEvent

UNREADABLE = "could not read its activation: not finite, or pushed beyond its SAE's norm by the request"


@dataclass(frozen=True)
class Judgement:
    """What happens to a response after a pass.

    Attributes:
        error: why it must not go on; else ``action`` is BLOCK or REWIND, and ``position`` what it fired on.
    """

    error: Exception | None = None
    action: GuardAction = GuardAction.BLOCK
    position: int = 0
    rewind_tokens: int = 0


def judge(sequence: Sequence, entries: Entries, start: int, score: FloatArray) -> Judgement | None:
    """Compare the scores ``[n, G]`` of the positions from ``start`` with the guards' thresholds.

    Every guard that fires is noted in the sequence's events.

    Returns:
        The first decision that keeps the response from going on; None if nothing does.
    """
    if not entries.guards:
        return None
    guards, columns = zip(*entries.guards, strict=True)
    read = score[:, columns]
    fires = (read > entries.threshold[list(columns)]) | ~np.isfinite(read)
    for offset, place in np.argwhere(fires).tolist():
        decision = _decide(sequence, guards[place], start + offset, float(read[offset, place]))
        if decision is not None:
            return decision
    return None


def detector_failed(sequence: Sequence, position: int) -> Judgement:
    """A policy of the response, or a guard that must not fail, could not read its activation."""
    detectors = [*sequence.plan.policies, *(guard.label for guard in sequence.plan.guards if not guard.fail_open)]
    error = DetectorError(f"one of these {UNREADABLE}: {', '.join(detectors)}")
    return Judgement(error, position=position)


def _decide(sequence: Sequence, index: int, position: int, score: float) -> Judgement | None:
    guard = sequence.plan.guards[index]
    if not np.isfinite(score):
        if guard.fail_open:
            sequence.guard_events.append(GuardEvent(index, GuardAction.FLAG, position, score))
            return None
        error = DetectorError(f"{guard.label} could not read position {position}: not finite")
        return Judgement(error, position=position)
    action = guard.action
    if guard.rewind is not None and not _can_rewind(sequence, guard.rewind.max_retries, position):
        action = guard.rewind.otherwise
    sequence.guard_events.append(GuardEvent(index, action, position, score))
    if action is GuardAction.FLAG:
        return None
    num_tokens = guard.rewind.num_tokens if action is GuardAction.REWIND and guard.rewind else 0
    return Judgement(action=action, position=position, rewind_tokens=num_tokens)


def _can_rewind(sequence: Sequence, max_retries: int, position: int) -> bool:
    return position >= sequence.num_prompt_tokens and sequence.num_rewinds < max_retries
