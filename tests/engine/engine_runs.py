"""Short ways to write requests against the catalog of ``conftest``, and to compare what comes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from steerserve.engine.engine import Engine
from steerserve.types import (
    DirectionTarget,
    FeatureTarget,
    FinishReason,
    FloatArray,
    Gate,
    GenerateRequest,
    Guard,
    GuardAction,
    GuardEvent,
    Intervention,
    Op,
    Receipt,
    Rewind,
    SamplingParams,
    Site,
    SteeringSpec,
    StepOutput,
    StopReason,
    Stream,
    Target,
    TokenLogprobs,
)

EARLY, LATE = Site(0, Stream.MLP_OUT), Site(2, Stream.RESID_POST)
"""Sites before and behind that of ``tiny-sae``."""

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=0)


def feature(index: int, op: Op = Op.ADD, value: float | None = 1.0, **rest: Any) -> Intervention:
    return Intervention(FeatureTarget("tiny-sae", index), op, value, **rest)


def monitor(index: int, **rest: Any) -> Intervention:
    return feature(index, Op.MONITOR, None, **rest)


def line(site: Site = EARLY, seed: int = 0) -> DirectionTarget:
    """A random direction of the tiny Llama."""
    return DirectionTarget(site, np.random.default_rng(seed).standard_normal(32).astype(np.float32))


def direction(op: Op = Op.ADD, value: float | None = 1.0, site: Site = EARLY, seed: int = 0, **rest: Any) -> Any:
    return Intervention(line(site, seed), op, value, **rest)


def _target(target: Target | int) -> Target:
    return FeatureTarget("tiny-sae", target) if isinstance(target, int) else target


def gate(target: Target | int, threshold: float = 0.5) -> Gate:
    """A feature's index stands for the feature."""
    return Gate(_target(target), threshold)


def guard(target: Target | int, threshold: float = 0.5, rewind: Rewind | None = None, **rest: Any) -> Guard:
    """Flags, or rewinds if it can."""
    action = GuardAction.FLAG if rewind is None else GuardAction.REWIND
    return Guard(_target(target), threshold, **{"action": action, "rewind": rewind} | rest)


def rewind(*edits: Intervention, num_tokens: int = 3, **rest: Any) -> Rewind:
    return Rewind(num_tokens, edits, **rest)


def spec(*interventions: Intervention, guards: Iterable[Guard] = ()) -> SteeringSpec:
    return SteeringSpec(interventions, tuple(guards))


def request(
    name: str, prompt: str | Sequence[int] = "x", steering: SteeringSpec = SteeringSpec(), **rest: Any
) -> GenerateRequest:
    """Greedy, five tokens; keyword arguments are the request's or its sampling's."""
    of_request = {key: rest.pop(key) for key in list(rest) if key in GenerateRequest.__dataclass_fields__}
    sampling = of_request.pop("sampling", GREEDY)
    given = prompt if isinstance(prompt, str) else tuple(prompt)
    return GenerateRequest(name, given, replace(sampling, **rest), steering, **of_request)


@dataclass(frozen=True)
class Outcome:
    """All that came of one response, in the terms in which two runs of it can be compared."""

    token_ids: tuple[int, ...]
    text: str
    scores: tuple[tuple[int, bytes], ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: StopReason | None
    error: str
    guard_events: tuple[GuardEvent, ...]
    receipt: Receipt


Outcomes = Mapping[tuple[str, int], Outcome]
"""By request id and index of the response."""


def outcome(outputs: Sequence[StepOutput]) -> Outcome:
    """Join a response's outputs; asserts that the last of them alone ends it, and that no score is missing."""
    *before, last = outputs
    assert all(output.receipt is None and output.finish_reason is None and output.error is None for output in before)
    assert (last.finish_reason is None) is (last.error is not None)
    assert last.receipt is not None
    positions = [at.position for output in outputs for at in output.scores]
    assert positions == list(range(len(positions)))
    return Outcome(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        scores=tuple((at.position, at.scores.tobytes()) for output in outputs for at in output.scores),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=str(last.error or ""),
        guard_events=last.guard_events,
        receipt=last.receipt,
    )


def outcomes(outputs: Iterable[StepOutput]) -> dict[tuple[str, int], Outcome]:
    """What came of every response among the outputs, all of which have ended."""
    by_response = defaultdict(list)
    for output in outputs:
        by_response[output.request_id, output.index].append(output)
    return {key: outcome(of_response) for key, of_response in by_response.items()}


def drive(
    engine: Engine, requests: Iterable[GenerateRequest] = (), arrivals: Sequence[int] | None = None
) -> dict[tuple[str, int], Outcome]:
    """Run requests to their end; ``arrivals[i]`` is the step at which request i joins (default 0)."""
    todo = list(requests)
    waiting = sorted(zip(arrivals or [0] * len(todo), range(len(todo)), strict=True))
    outputs: list[StepOutput] = []
    step = 0
    while waiting or engine.has_unfinished():
        while waiting and waiting[0][0] <= step:
            engine.add_request(todo[waiting.pop(0)[1]])
        outputs += engine.step()
        step += 1
    assert_idle(engine)
    return outcomes(outputs)


def assert_same(actual: Outcome, expected: Outcome) -> None:
    """Equal to the bit, but for the prefix cache's part and for the means, which are sums in another order."""

    def without(receipt: Receipt) -> Receipt:
        plain = tuple(replace(each, mean_relative_edit=0.0) for each in receipt.interventions)
        return replace(receipt, interventions=plain, num_cached_tokens=0)

    means, expected_means = (
        [each.mean_relative_edit for each in both.receipt.interventions] for both in (actual, expected)
    )
    assert replace(actual, receipt=without(actual.receipt)) == replace(expected, receipt=without(expected.receipt))
    assert means == pytest.approx(expected_means, rel=1e-9)


def assert_idle(engine: Engine) -> None:
    """Nothing is left of any request."""
    assert not engine.has_unfinished()
    assert engine.num_running == engine.num_waiting == 0
    assert engine._bank.num_held == 0
    pool = engine._scheduler.pool
    assert pool.num_free == len(pool.blocks)
    assert all(block.ref_count == 0 for block in pool.blocks)
    assert sorted(engine._scheduler._free_rows) == list(range(engine.config.max_num_seqs))
    assert not engine._aborted


def scores_of(result: Outcome) -> FloatArray:
    """``[positions, interventions]``."""
    return np.stack([np.frombuffer(scored, dtype=np.float32) for _, scored in result.scores])
