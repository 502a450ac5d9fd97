"""Whatever a request shares the engine with, and however often it is pushed out: it gets what it would get alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from engine_runs import (
    LATE,
    Outcome,
    Outcomes,
    assert_idle,
    assert_same,
    direction,
    drive,
    feature,
    gate,
    guard,
    line,
    monitor,
    outcomes,
    request,
    rewind,
    spec,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerserve.engine.engine import Engine
from steerserve.models import splice
from steerserve.types import FinishReason, GenerateRequest, GuardAction, Op, Phase, SamplingParams, StepOutput

DRAWN = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True, logprobs=1)
STORY = "Once upon a time, there was a queen"
BACK = rewind(direction(value=3.0), feature(5, Op.BLOCK, None), num_tokens=4, max_retries=2, otherwise=GuardAction.FLAG)
REQUESTS: dict[str, dict[str, Any]] = {
    "short": {"prompt": "x", "max_tokens": 6},
    "plain": {"prompt": STORY, "max_tokens": 20},
    "drawn": {"prompt": STORY, "sampling": DRAWN, "n": 2, "repetition_penalty": 1.2},
    "stopped": {"prompt": "abc", "sampling": DRAWN, "stop": ("q", "7"), "stop_token_ids": tuple(range(0, 256, 20))},
    "long prompt": {"prompt": (STORY + STORY[::-1])[:60], "max_tokens": 2},
    "steered": {"prompt": STORY, "steering": spec(feature(3, Op.CLAMP, 7.0), direction(), direction(site=LATE))},
    "of the prompt": {"prompt": STORY[:20], "steering": spec(feature(4, value=2.0, phase=Phase.PROMPT))},
    "of the response": {
        "prompt": STORY, "steering": spec(direction(phase=Phase.GENERATED), monitor(7)), "return_activations": True
    },
    "gated": {
        "prompt": STORY[5:], "steering": spec(feature(5, value=3.0, gate=gate(line(), 0.2))), "return_activations": True
    },
    "policy": {
        "prompt": STORY, "steering": spec(direction(value=2.0)), "policies": ("mood",), "return_activations": True,
        "max_tokens": 20,
    },
    "flagged": {"prompt": STORY, "steering": spec(direction(), guards=[guard(3, 5.0), guard(line(LATE), 0.0)])},
    "blocked": {
        "prompt": "blocked", "steering": spec(guards=[guard(3, 9.0, action=GuardAction.BLOCK, phase=Phase.GENERATED)]),
        "max_tokens": 20,
    },
    "rewound": {
        "prompt": STORY, "steering": spec(monitor(6), guards=[guard(3, 5.0, BACK, phase=Phase.GENERATED)]),
        "sampling": DRAWN, "return_activations": True, "max_tokens": 25, "presence_penalty": 0.5,
    },
    "rewound, drawn": {
        "prompt": STORY[:12], "steering": spec(feature(4, value=1.0), guards=[guard(3, 9.0, BACK)]), "sampling": DRAWN,
        "n": 2,
    },
}  # fmt: skip
"""What is asked for, in this order more and more steered."""


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(kind: str, name: str, **rest: Any) -> GenerateRequest:
    return request(name, **{**REQUESTS[kind], **rest})


@pytest.fixture
def start(load_tiny, make_engine, make_pack) -> Callable[..., Engine]:
    """Engines that differ in their sizes alone."""
    model = load_tiny()
    mood = make_pack(model, features=(1, 3, 4, 7, 9), op=Op.BLOCK)

    def make(**config: Any) -> Engine:
        sizes = {"max_num_seqs": 4, "max_model_len": 64, "max_step_entries": 2048, "max_waiting": 100}
        return make_engine(model, [mood], **(sizes | config))

    return make


@pytest.fixture
def alone(start) -> Outcomes:
    """What comes of every kind of request on an engine that it has for itself."""
    found: dict[tuple[str, int], Outcome] = {}
    for kind in REQUESTS:
        found |= drive(start(max_num_seqs=1, enable_prefix_caching=False), [asked(kind, kind)])
    return found


def assert_as_alone(results: Outcomes, alone: Outcomes, kinds: dict[str, str]) -> None:
    """``kinds`` by request id. Of what ended early, everything up to the end is the same."""
    for (name, index), result in results.items():
        expected = alone[kinds[name], index]
        if result.finish_reason is FinishReason.ABORT or result.error:
            assert result.token_ids == expected.token_ids[: len(result.token_ids)]
            assert result.logprobs == expected.logprobs[: len(result.logprobs)]
            assert result.scores == expected.scores[: len(result.scores)]
            assert result.guard_events == expected.guard_events[: len(result.guard_events)]
        else:
            assert_same(result, expected)


def watched_steps(engine: Engine, preempted: Counter[str]) -> Iterator[list[StepOutput]]:
    """Steps for ever; asserts that all who generate advance, and counts who is pushed out."""
    schedule = engine._scheduler.schedule
    pushed_out = []

    def watched_schedule():
        step = schedule()
        pushed_out.extend(step.preempted)
        return step

    engine._scheduler.schedule = watched_schedule
    while True:
        generating = {
            sequence: (sequence.num_computed, sequence.num_rewinds)
            for sequence in engine._scheduler.running
            if sequence.num_tokens - sequence.num_computed == 1
        }
        outputs = engine.step()
        preempted.update(sequence.request_id for sequence in pushed_out)
        for sequence, (num_computed, num_rewinds) in generating.items():
            if sequence.row is not None and sequence not in pushed_out and sequence.num_rewinds == num_rewinds:
                assert sequence.num_computed == num_computed + 1
        pushed_out.clear()
        of_response = Counter((output.request_id, output.index) for output in outputs)
        assert set(of_response.values()) <= {1}
        assert engine.num_running <= engine.config.max_num_seqs
        yield outputs


def test_the_requests_show_what_they_are_for(alone) -> None:
    reasons = Counter(result.finish_reason for result in alone.values())
    assert reasons[FinishReason.BLOCKED] == 1
    assert reasons[FinishReason.STOP] == 1
    assert reasons[FinishReason.LENGTH] == len(alone) - 2
    rewinds = {key: result.receipt.num_rewinds for key, result in alone.items() if "rewound" in key[0]}
    assert set(rewinds.values()) <= {1, 2}
    assert len(alone["flagged", 0].guard_events) > 5
    assert len(alone["blocked", 0].token_ids) > 2
    for (kind, _), result in alone.items():
        edited = [each.tokens_edited for each in result.receipt.interventions if "monitor" not in each.label]
        assert any(edited) or kind in ("short", "plain", "drawn", "stopped", "long prompt", "blocked"), kind
    gated = alone["gated", 0].receipt.interventions[0]
    assert 0 < gated.tokens_edited < gated.tokens_covered


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
@pytest.mark.parametrize("block_size", [16, 4])
def test_who_is_pushed_out_gets_the_same(block_size, caching, start, alone) -> None:
    """Every third step an urgent request comes that needs all memory there is."""
    engine = start(kv_cache_tokens=64, block_size=block_size, enable_prefix_caching=caching)
    preempted: Counter[str] = Counter()
    steps = watched_steps(engine, preempted)
    for kind in REQUESTS:
        kinds = {kind: kind}
        outputs = []
        engine.add_request(asked(kind, kind, priority=1))
        while engine.has_unfinished():
            for _ in range(3):
                outputs += next(steps)
            if any(sequence.request_id == kind for sequence in engine._scheduler.running):
                name = f"urgent {len(kinds)}"
                kinds[name] = "long prompt"
                engine.add_request(asked("long prompt", name))
        assert_idle(engine)
        results = outcomes(outputs)
        assert len(results) == len(kinds) - 1 + asked(kind, kind).sampling.n
        assert_as_alone(results, alone, kinds)
    assert preempted.keys() >= REQUESTS.keys() - {"long prompt"}  # that one is done before the next comes
    assert min(preempted["drawn"], preempted["rewound"], preempted["policy"]) > 5


SIZES = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 4),
        "max_num_batched_tokens": st.sampled_from([4, 5, 17, 64]),
        "kv_cache_tokens": st.sampled_from([64, 80, 128, 512]),
        "block_size": st.sampled_from([2, 16]),
        "enable_prefix_caching": st.booleans(),
        "max_step_entries": st.sampled_from([24, 2048]),
    }
)
ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(list(REQUESTS)), st.integers(-1, 1), st.sampled_from([None, None, 10.0])),
    st.tuples(st.just("abort"), st.integers(0, 12)),
    st.tuples(st.just("step"), st.integers(1, 12)),
)
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check_churn(start, alone: Outcomes, sizes: dict[str, Any], actions: Iterable[tuple[Any, ...]]) -> None:
    clock = Clock()
    engine = start(clock=clock, **sizes)
    kinds: dict[str, str] = {}
    outputs: list[StepOutput] = []
    steps = watched_steps(engine, Counter())
    for action, *rest in actions:
        if action == "add":
            kind, priority, timeout_s = rest
            name = f"r{len(kinds)}"
            engine.add_request(asked(kind, name, priority=priority, timeout_s=timeout_s))
            kinds[name] = kind
        elif action == "abort":
            engine.abort(f"r{rest[0]}")
        else:
            for _ in range(rest[0]):
                clock.now += 1.0
                outputs += next(steps)
    while engine.has_unfinished():
        outputs += next(steps)
    assert_idle(engine)
    results = outcomes(outputs)
    assert set(results) == {
        (name, index) for name, kind in kinds.items() for index in range(asked(kind, "").sampling.n)
    }
    assert_as_alone(results, alone, kinds)


@settings(PROPERTY, max_examples=20)
@given(sizes=SIZES, actions=st.lists(ACTIONS, min_size=4, max_size=20))
def test_every_response_is_what_it_is_alone_and_ends_once(sizes, actions, start, alone) -> None:
    check_churn(start, alone, sizes, actions)


@pytest.mark.slow
@settings(PROPERTY, max_examples=100)
@given(sizes=SIZES, actions=st.lists(ACTIONS, min_size=10, max_size=60))
def test_every_response_is_what_it_is_alone_in_long_runs(sizes, actions, start, alone) -> None:
    check_churn(start, alone, sizes, actions)


def test_no_argument_of_a_kernel_moves_in_1000_steps_of_churn(start, alone, monkeypatch) -> None:
    """What a captured graph would have recorded stays where it is, whoever comes and goes."""
    arguments_of_sites = set()
    steer = splice.steer_delta_

    def recorded(x, *arguments):
        arguments_of_sites.add(tuple(argument.data_ptr() for argument in arguments))
        return steer(x, *arguments)

    monkeypatch.setattr(splice, "steer_delta_", recorded)
    engine = start(kv_cache_tokens=96, max_num_batched_tokens=12)
    store = engine._runner.kv_store

    def attention_arguments() -> list[int]:
        tensors = [store.blocks, store.block_table, store.row, store.position]
        states = [(state.handle, state.k_cache.data_ptr(), state.v_cache.data_ptr()) for state in store.states]
        return [*(tensor.data_ptr() for tensor in tensors), *states]

    at_first = attention_arguments()
    rng = random.Random(0)
    kinds: dict[str, str] = {}
    outputs: list[StepOutput] = []
    preempted: Counter[str] = Counter()
    steps = watched_steps(engine, preempted)
    num_steps = 0
    while num_steps < 1000 or engine.has_unfinished():
        if num_steps < 1000 and engine.num_waiting < 3:
            name = f"r{len(kinds)}"
            kinds[name] = rng.choice(list(REQUESTS))
            engine.add_request(asked(kinds[name], name, priority=rng.choice([0, 0, 1])))
        if rng.random() < 0.02:
            engine.abort(rng.choice(list(kinds)))
        outputs += next(steps)
        num_steps += 1
        assert attention_arguments() == at_first
    assert_idle(engine)
    assert_as_alone(outcomes(outputs), alone, kinds)
    assert len(kinds) > 100
    assert preempted.total() > 50
    assert len(arguments_of_sites) == 3  # tiny-sae's, and those of two directions
