"""Admission, queueing, aborts and failures: every request ends exactly once and leaves nothing behind."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerserve.errors import CapacityError, IncompatibleError, InvalidRequestError
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    FinishReason,
    GenerateRequest,
    Intervention,
    Message,
    Op,
    SamplingParams,
    Site,
    SteeringSpec,
    Stream,
)

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


def add_feature(index: int) -> SteeringSpec:
    return SteeringSpec((Intervention(FeatureTarget("tiny-sae", index), Op.ADD, 1.0),))


def assert_idle(engine) -> None:
    assert not engine.has_unfinished()
    assert engine.num_running == engine.num_waiting == 0
    assert engine._bank.num_held == 0
    assert not engine._runner.kv_cache._store.any()


@pytest.mark.parametrize(
    ("prompt", "sampling", "field", "expected"),
    [
        ("", GREEDY, "prompt", "at least one token"),
        ((), GREEDY, "prompt", "at least one token"),
        ((5, 260), GREEDY, "prompt.token_ids[1]", "from 0 to 259"),
        ((-1,), GREEDY, "prompt.token_ids[0]", "from 0 to 259"),
        ("x" * 128, GREEDY, "prompt", "at most 127 tokens"),
        ("x" * 100, SamplingParams(max_tokens=29), "sampling.max_tokens", "at most 28"),
        ((Message("user", "hi"),), GREEDY, "prompt.messages", "no chat template"),
    ],
)
def test_bad_prompts_are_refused_by_field(prompt, sampling, field, expected, load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request(GenerateRequest("r", prompt, sampling))
    assert caught.value.field == field
    assert expected in caught.value.expected
    assert_idle(engine)


def test_a_response_may_fill_the_context(load_tiny, make_engine, run) -> None:
    engine = make_engine(load_tiny())
    filling = SamplingParams(max_tokens=28, temperature=0, ignore_eos=True)
    assert len(run(engine, [GenerateRequest("r", "x" * 100, filling)])["r"].token_ids) == 28
    assert_idle(engine)


def test_an_engine_longer_than_the_model_is_refused(load_tiny, make_engine) -> None:
    with pytest.raises(IncompatibleError, match="at most 256"):
        make_engine(load_tiny(), max_model_len=257)


def test_ids_are_unique_among_unfinished_requests(load_tiny, make_engine, run) -> None:
    engine = make_engine(load_tiny())
    engine.add_request(GenerateRequest("r", "a", GREEDY))
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request(GenerateRequest("r", "b", GREEDY))
    assert caught.value.field == "request_id"
    run(engine, [])
    run(engine, [GenerateRequest("r", "b", GREEDY)])
    assert_idle(engine)


def test_a_full_queue_refuses(load_tiny, make_engine, run) -> None:
    engine = make_engine(load_tiny(), max_waiting=2)
    for name in "ab":
        engine.add_request(GenerateRequest(name, "x", GREEDY))
    with pytest.raises(CapacityError, match="queue"):
        engine.add_request(GenerateRequest("c", "x", GREEDY, add_feature(3)))
    engine.step()
    engine.add_request(GenerateRequest("c", "x", GREEDY))
    run(engine, [])
    assert_idle(engine)


def test_a_full_feature_bank_refuses_until_a_holder_ends(load_tiny, make_engine, make_pack, run) -> None:
    model = load_tiny()
    packs = [make_pack(model, features=(1, 2, 3), name="three"), make_pack(model, features=(4, 5), name="two")]
    engine = make_engine(model, packs, bank_capacity=4)

    def block(*concepts: str) -> SteeringSpec:
        return SteeringSpec(tuple(Intervention(ConceptTarget(name), Op.BLOCK) for name in concepts))

    engine.add_request(GenerateRequest("a", "x", GREEDY, block("three")))
    engine.add_request(GenerateRequest("b", "x", GREEDY, block("three")))  # shares the rows of a
    with pytest.raises(CapacityError, match="slots"):
        engine.add_request(GenerateRequest("c", "x", GREEDY, block("two")))
    with pytest.raises(InvalidRequestError, match="at most 4"):
        engine.add_request(GenerateRequest("c", "x", GREEDY, block("two", "three")))
    run(engine, [])
    assert run(engine, [GenerateRequest("c", "x", GREEDY, block("two"))])["c"].receipt.steered
    assert_idle(engine)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_abort_frees_the_slot_at_the_next_step(steps_before, load_tiny, make_engine, run) -> None:
    engine = make_engine(load_tiny(), max_num_seqs=1)
    long = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    engine.add_request(GenerateRequest("long", "x", long, add_feature(3)))
    engine.add_request(GenerateRequest("next", "x", GREEDY))
    tokens = sum(len(output.token_ids) for _ in range(steps_before) for output in engine.step())
    engine.abort("long")
    engine.abort("long")
    engine.abort("unknown")
    outputs = {output.request_id: output for output in engine.step()}
    assert outputs["long"].finish_reason is FinishReason.ABORT
    assert outputs["long"].token_ids == ()
    assert outputs["long"].receipt.interventions[0].tokens_in_scope == tokens  # one prompt token, last one not fed
    assert len(outputs["next"].token_ids) == 1
    rest = run(engine, [])
    assert set(rest) == {"next"}
    assert_idle(engine)


def test_a_failing_prefill_ends_its_request_alone(load_tiny, make_engine, run, monkeypatch) -> None:
    engine = make_engine(load_tiny())
    prefill = engine._runner.prefill

    def failing(token_ids, row, work):
        logits = prefill(token_ids, row, work)
        if len(token_ids) == 3:
            raise RuntimeError("out of memory")
        return logits

    expected = run(engine, [GenerateRequest("good", "x", GREEDY)])["good"].token_ids
    monkeypatch.setattr(engine._runner, "prefill", failing)
    names = {"a": "x", "bad": "xyz", "b": "x"}
    responses = run(engine, [GenerateRequest(name, prompt, GREEDY) for name, prompt in names.items()])
    assert str(responses["bad"].error) == "out of memory"
    assert responses["a"].token_ids == responses["b"].token_ids == expected
    assert_idle(engine)


def test_a_failing_decode_ends_the_batch_and_nothing_else(load_tiny, make_engine, run, monkeypatch) -> None:
    engine = make_engine(load_tiny(), max_num_seqs=2)
    decode = engine._runner.decode
    failures = iter([RuntimeError("broken")])

    def failing_once(*args):
        for error in failures:
            raise error
        return decode(*args)

    monkeypatch.setattr(engine._runner, "decode", failing_once)
    responses = run(engine, [GenerateRequest(name, "x", GREEDY) for name in "abcd"])
    assert [str(responses[name].error) for name in "abcd"] == ["broken", "broken", "None", "None"]
    assert_idle(engine)


def test_requests_may_arrive_from_many_threads(load_tiny, make_engine, run) -> None:
    engine = make_engine(load_tiny(), max_waiting=100)

    def submit(worker: int) -> None:
        for i in range(5):
            engine.add_request(GenerateRequest(f"{worker}-{i}", "x", GREEDY, add_feature(worker)))
            if i == 2:
                engine.abort(f"{worker}-{i}")

    threads = [threading.Thread(target=submit, args=(worker,)) for worker in range(1, 5)]
    for thread in threads:
        thread.start()
    finished = Counter()
    while any(thread.is_alive() for thread in threads) or engine.has_unfinished():
        finished.update(o.request_id for o in engine.step() if o.finish_reason is not None)
    assert finished == Counter(f"{worker}-{i}" for worker in range(1, 5) for i in range(5))
    assert_idle(engine)


@pytest.fixture
def tiny_llama(load_tiny):
    return load_tiny()


SPECS = [
    SteeringSpec(),
    add_feature(3),
    SteeringSpec((Intervention(DirectionTarget(Site(0, Stream.MLP_OUT), np.ones(32, np.float32)), Op.SCALE, 2.0),)),
]
ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 6), st.sampled_from(SPECS)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step")),
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, max_size=30))
def test_every_request_ends_exactly_once(actions, tiny_llama, make_engine) -> None:
    engine = make_engine(tiny_llama, max_num_seqs=3, max_model_len=40, max_prefills_per_step=1)
    outputs = []
    wanted: dict[str, int] = {}
    for kind, *arguments in actions:
        if kind == "add":
            prompt_length, max_tokens, spec = arguments
            name = f"r{len(wanted)}"
            sampling = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
            engine.add_request(GenerateRequest(name, (65,) * prompt_length, sampling, spec))
            wanted[name] = max_tokens
        elif kind == "abort":
            engine.abort(f"r{arguments[0]}")
        else:
            outputs += engine.step()
            assert engine.num_running <= 3
    while engine.has_unfinished():
        outputs += engine.step()
    ends = Counter(output.request_id for output in outputs if output.finish_reason is not None)
    assert ends == Counter(wanted.keys())
    tokens = Counter(output.request_id for output in outputs for _ in output.token_ids)
    for output in outputs:
        if output.finish_reason is FinishReason.LENGTH:
            assert tokens[output.request_id] == wanted[output.request_id]
    assert_idle(engine)
    engine.close()
