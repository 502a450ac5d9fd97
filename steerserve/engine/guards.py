"""What follows from the scores that guards and policies read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from steerserve.engine.entries import Entries
from steerserve.engine.sequence import Sequence
from steerserve.errors import DetectorError
from steerserve.steering.edits import REQUEST
from steerserve.steering.plan import Plan, PlannedGuard, Stage
from steerserve.types import FloatArray, GuardAction, GuardEvent, Receipt

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

    Every guard that fires is noted in the sequence's events, up to the first position that decides: there a guard
    that could not read comes before one that blocks, and that before one that rewinds.

    Returns:
        What keeps the response from going on; None if nothing does.
    """
    if not entries.guards:
        return None
    guards, columns = zip(*entries.guards, strict=True)
    read = score[:, columns]
    fires = (read > entries.threshold[list(columns)]) | ~np.isfinite(read)
    for offset in np.flatnonzero(fires.any(axis=1)).tolist():
        fired = {guards[place]: float(read[offset, place]) for place in np.flatnonzero(fires[offset]).tolist()}
        decision = _decide(sequence, start + offset, fired)
        if decision is not None:
            return decision
    return None


def detector_failed(sequence: Sequence, position: int) -> Judgement:
    """A policy of the response, or a guard that must not fail, could not read its activation."""
    own = (guard.label for guard in sequence.plan.guards if guard.source == REQUEST and not guard.fail_open)
    detectors = [*sequence.plan.policies, *own]
    error = DetectorError(f"one of these {UNREADABLE}: {', '.join(detectors)}")
    return Judgement(error, position=position)


def unproven(plan: Plan, receipt: Receipt) -> DetectorError | None:
    """Why a response that is complete must not end as one: the counters do not prove what must not fail open.

    Each pass has looked for what did not run already; this is the second look, at the sums that the client gets.
    """
    missing = [
        f"{planned.source}: {planned.label}"
        for planned, entry in zip(plan.interventions[plan.num_monitors :], receipt.interventions, strict=True)
        if planned.stage is Stage.POLICY and not planned.fail_open and entry.tokens_covered < entry.tokens_in_scope
    ]
    if not missing:
        return None
    return DetectorError(f"not proven to have run on every token in scope: {', '.join(missing)}")


def _decide(sequence: Sequence, position: int, fired: Mapping[int, float]) -> Judgement | None:
    """What follows from the guards that fired on one position, by index with their scores."""
    guards = sequence.plan.guards
    unread = [index for index, score in fired.items() if not np.isfinite(score) and not guards[index].fail_open]
    if unread:
        error = DetectorError(f"{guards[unread[0]].label} could not read position {position}: not finite")
        return Judgement(error, position=position)
    actions = {index: _action(sequence, guards[index], position, score) for index, score in fired.items()}
    blocks = GuardAction.BLOCK in actions.values()
    for index, action in actions.items():
        taken = GuardAction.BLOCK if blocks and action is GuardAction.REWIND else action
        guard = guards[index]
        sequence.guard_events.append(GuardEvent(guard.place, taken, position, fired[index], guard.source, guard.label))
    if GuardAction.REDACT in actions.values():
        sequence.redacted.add(position)
    if blocks:
        return Judgement(action=GuardAction.BLOCK, position=position)
    for index, action in actions.items():
        rewind = guards[index].rewind
        if action is GuardAction.REWIND and rewind is not None:
            return Judgement(action=action, position=position, rewind_tokens=rewind.num_tokens)
    return None


def _action(sequence: Sequence, guard: PlannedGuard, position: int, score: float) -> GuardAction:
    if not np.isfinite(score):
        return GuardAction.FLAG
    action, in_prompt = guard.action, position < sequence.num_prompt_tokens
    if guard.rewind is not None:
        # A token that was released, or the prompt, can not be taken back.
        has_retries = sequence.num_rewinds < guard.rewind.max_retries
        action = action if has_retries and sequence.held and not in_prompt else guard.rewind.otherwise
    return GuardAction.FLAG if action is GuardAction.REDACT and in_prompt else action
