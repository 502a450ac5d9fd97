"""Admission, queueing, aborts and failures: every request ends exactly once and leaves nothing behind."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from engine_runs import GREEDY, assert_idle, direction, drive, feature, guard, line, monitor, outcomes, request, spec

from steerserve.errors import CapacityError, IncompatibleError, InvalidRequestError, ServiceError
from steerserve.types import (
    FinishReason,
    GenerateRequest,
    GuardAction,
    Message,
    Op,
    SamplingParams,
)

LONG_PROMPT = "Once upon a time, there was a queen"
"""Two blocks and three tokens."""


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


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


def test_plans_without_room_in_a_step_are_refused(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), sites=("blocks.1.hook_resid_post",), max_step_entries=3)
    with pytest.raises(IncompatibleError, match=r"interventions\[0\]\.target: got 'blocks\.0\..*expected a site that"):
        engine.add_request(request("r", "x", spec(direction())))
    with pytest.raises(IncompatibleError, match=r"guards\[0\]\.target"):
        engine.add_request(request("r", "x", spec(guards=[guard(line())])))
    with pytest.raises(IncompatibleError, match="at most 3"):
        engine.add_request(request("r", "x", spec(*(feature(index) for index in range(1, 5)))))
    with pytest.raises(InvalidRequestError, match="at most 16 gates and guards"):
        engine.add_request(request("r", "x", spec(guards=[guard(3, threshold=index) for index in range(17)])))
    assert_idle(engine)
    assert drive(engine, [request("r", "x", spec(feature(1), feature(2), feature(3)))])["r", 0].receipt.steered


def test_what_would_fill_the_memory_is_refused_at_admission(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    many = spec(*[monitor(1)] * 4096)
    with pytest.raises(InvalidRequestError, match="at most 8192"):
        engine.add_request(request("r", "x", spec(*[monitor(1)] * 8193)))
    with pytest.raises(InvalidRequestError, match="return_activations"):
        engine.add_request(request("r", "x", many, n=64, max_tokens=100, return_activations=True))
    assert_idle(engine)


def test_an_abort_that_overtakes_its_request_is_not_lost(load_tiny, make_engine, monkeypatch) -> None:
    """Another thread aborts, and the engine steps, while the request is being added."""
    engine = make_engine(load_tiny())
    build = engine._sequence

    def slowly(*arguments):
        engine.abort("r")
        assert engine.step() == []
        return build(*arguments)

    monkeypatch.setattr(engine, "_sequence", slowly)
    engine.add_request(request("r"))
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.ABORT
    assert_idle(engine)
    assert not engine._aborted


def test_responses_count_in_the_queue_one_by_one(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_waiting=5)
    engine.add_request(request("first", n=5))
    with pytest.raises(CapacityError, match="5 responses"):
        engine.add_request(request("second"))
    outcomes = drive(engine, [])
    assert len(outcomes) == 5
    assert_idle(engine)


def test_a_response_may_fill_the_context(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    for steering in (spec(), spec(guards=[guard(0)])):
        result = drive(engine, [request("r", "x" * 100, steering, max_tokens=28)])["r", 0]
        assert len(result.token_ids) == 28


def test_an_engine_longer_than_the_model_is_refused(load_tiny, make_engine) -> None:
    with pytest.raises(IncompatibleError, match="at most 256"):
        make_engine(load_tiny(), max_model_len=257)


def test_ids_are_unique_among_unfinished_requests(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    engine.add_request(request("r", n=2, max_tokens=3))
    outputs = []
    while engine.has_unfinished():
        with pytest.raises(InvalidRequestError) as caught:
            engine.add_request(request("r"))
        assert caught.value.field == "request_id"
        outputs += engine.step()
    assert set(outcomes(outputs)) == {("r", 0), ("r", 1)}
    drive(engine, [request("r")])


def test_a_full_queue_refuses(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_waiting=2)
    for name in "ab":
        engine.add_request(request(name))
    with pytest.raises(CapacityError, match="queue"):
        engine.add_request(request("c", "x", spec(feature(3))))
    assert engine._bank.num_held == 0
    engine.step()
    engine.add_request(request("c"))
    drive(engine)


def test_a_full_feature_bank_refuses_until_a_holder_ends(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), bank_capacity=4)

    def block(*features: int):
        return spec(*(feature(index, Op.BLOCK, None) for index in features))

    engine.add_request(request("a", "x", block(1, 2, 3)))
    engine.add_request(request("b", "x", block(1, 2, 3), n=3))  # share the rows of a
    assert engine._bank.num_held == 3
    with pytest.raises(CapacityError, match="slots"):
        engine.add_request(request("c", "x", block(4, 5), n=2))
    assert engine._bank.num_held == 3
    with pytest.raises(InvalidRequestError, match="at most 4"):
        engine.add_request(request("c", "x", block(1, 2, 3, 4, 5)))
    drive(engine)
    assert drive(engine, [request("c", "x", block(4, 5))])["c", 0].receipt.steered


def test_clients_that_fill_the_bank_do_not_starve_policies(load_tiny, make_engine, make_pack) -> None:
    model = load_tiny()
    engine = make_engine(model, [make_pack(model, features=(1, 2), name="guarding")], bank_capacity=5)
    engine.add_request(request("a", "x", spec(*(feature(index, Op.BLOCK, None) for index in (7, 8, 9)))))
    with pytest.raises(CapacityError, match="slots"):
        engine.add_request(request("b", "x", spec(feature(10))))
    engine.add_request(request("c", "x", policies=("guarding",)))
    assert engine._bank.num_held == 5
    assert drive(engine)["c", 0].receipt.steered


def test_a_bank_too_small_for_the_policies_is_refused_at_once(load_tiny, make_engine, make_pack) -> None:
    model = load_tiny()
    packs = [make_pack(model, features=(1, 2, 3), name="three"), make_pack(model, features=(4, 5), name="two")]
    with pytest.raises(IncompatibleError, match="got 4, expected room for the features"):
        make_engine(model, packs, bank_capacity=4)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_abort_frees_the_row_at_the_next_step(steps_before, load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_num_seqs=1)
    engine.add_request(request("long", "x", spec(feature(3)), max_tokens=100))
    engine.add_request(request("next"))
    tokens = sum(len(output.token_ids) for _ in range(steps_before) for output in engine.step())
    engine.abort("long")
    engine.abort("long")
    engine.abort("unknown")
    outputs = {output.request_id: output for output in engine.step()}
    assert outputs["long"].finish_reason is FinishReason.ABORT
    assert outputs["long"].token_ids == ()
    assert outputs["long"].receipt.interventions[0].tokens_in_scope == tokens  # one prompt token, last one not fed
    assert len(outputs["next"].token_ids) == 1
    assert set(drive(engine)) == {("next", 0)}


END_EARLY = {
    "incoming": (0, {}),
    "in the middle of its prompt": (2, {}),
    "generating": (10, {}),
    "generating, with tokens held back": (10, {"steering": spec(guards=[guard(3, threshold=1e6)])}),
    "several, incoming": (0, {"n": 3}),
    "several, in the middle of their prompt": (2, {"n": 3}),
    "several, generating": (10, {"n": 3}),
}


@pytest.mark.parametrize("how", ["abort", "deadline"])
@pytest.mark.parametrize("state", END_EARLY)
def test_a_request_ends_early_in_any_state_and_frees_its_memory_within_the_step(
    how, state, load_tiny, make_engine
) -> None:
    steps_before, rest = END_EARLY[state]
    clock = Clock()
    engine = make_engine(load_tiny(), clock=clock, max_num_batched_tokens=8)
    asked = request("r", LONG_PROMPT, max_tokens=60, timeout_s=5.0, **rest)
    engine.add_request(asked)
    outputs = []
    for _ in range(steps_before):
        clock.now += 0.5
        outputs += engine.step()
    assert not any(output.finish_reason for output in outputs)
    if how == "abort":
        engine.abort("r")
    else:
        clock.now = 5.001
    last = engine.step()
    assert len(last) == asked.sampling.n
    assert_idle(engine)
    for result in outcomes([*outputs, *last]).values():
        assert result.finish_reason is (FinishReason.ABORT if how == "abort" else None)
        assert result.error == ("" if how == "abort" else "not done within the 5 s it was given")
        assert (len(result.token_ids) > 0) is (steps_before == 10)
    assert drive(engine, [request("r")])["r", 0].finish_reason is FinishReason.LENGTH


def test_a_request_ends_early_while_it_waits_for_a_row_or_was_preempted(load_tiny, make_engine) -> None:
    clock = Clock()
    engine = make_engine(load_tiny(), clock=clock, max_num_seqs=1)
    engine.add_request(request("late", "x", max_tokens=60, priority=1, timeout_s=3.0))
    engine.add_request(request("aborted", "x", max_tokens=60, priority=2))
    engine.step()
    engine.add_request(request("first", "x", max_tokens=60))
    engine.step()
    assert engine.num_running == 1
    assert engine.num_waiting == 2
    clock.now = 3.0
    assert {output.request_id for output in engine.step()} == {"first"}  # just in time
    clock.now = 3.5
    engine.abort("aborted")
    ended = {output.request_id: output for output in engine.step() if output.receipt is not None}
    assert set(ended) == {"late", "aborted"}
    assert isinstance(ended["late"].error, ServiceError)
    assert engine.num_waiting == 0
    assert len(drive(engine)["first", 0].token_ids) == 60 - 3


def test_better_priority_goes_first_and_equals_in_order_of_arrival(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_num_seqs=1)
    for name, priority in {"c": 1, "a": 0, "d": 1, "b": 0, "e": 2}.items():
        engine.add_request(request(name, "x", priority=priority))
    ended = []
    while engine.has_unfinished():
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert ended == ["a", "b", "c", "d", "e"]


def test_a_failing_pass_ends_the_requests_in_it_and_nothing_else(load_tiny, make_engine, monkeypatch) -> None:
    engine = make_engine(load_tiny(), max_num_seqs=2)
    alone = drive(engine, [request("alone", "xyz", spec(feature(3)))])["alone", 0]
    forward = engine._runner.forward
    failures = iter([None, None, RuntimeError("broken")])

    def failing_at_the_third_pass(*args):
        error = next(failures, None)
        if error is not None:
            raise error
        return forward(*args)

    monkeypatch.setattr(engine._runner, "forward", failing_at_the_third_pass)
    results = drive(engine, [request(name, "xyz", spec(feature(3))) for name in "abcd"])
    for name in "ab":
        failed = results[name, 0]
        assert failed.error == "broken"
        assert failed.token_ids == alone.token_ids[:2]
        assert failed.receipt.interventions[0].tokens_covered == 3 + 1
    for name in "cd":
        assert results[name, 0].token_ids == alone.token_ids
        assert results[name, 0].receipt.interventions == alone.receipt.interventions


def test_a_failing_prompt_ends_all_responses_of_its_request(load_tiny, make_engine, monkeypatch) -> None:
    engine = make_engine(load_tiny())

    def failing(*_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "forward", failing)
        results = drive(engine, [request("r", n=3)])
    assert [results["r", index].error for index in range(3)] == ["broken"] * 3
    assert len(drive(engine, [request("r", n=3)])) == 3


def test_a_guard_that_blocks_a_prompt_blocks_every_response_with_its_own_proof(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    watch = spec(monitor(4), guards=[guard(3, threshold=-1.0, action=GuardAction.BLOCK)])  # fires on any position
    results = drive(engine, [request("r", LONG_PROMPT, watch, n=3), request("s", LONG_PROMPT, watch, cache_salt="s")])
    assert [results["r", index].finish_reason for index in range(3)] == [FinishReason.BLOCKED] * 3
    for index in range(3):
        assert results["r", index].guard_events == results["s", 0].guard_events
        assert results["r", index].receipt.interventions[1].tokens_covered > 0
        assert results["r", index].token_ids == ()


def test_responses_of_a_request_wait_for_its_prompt_and_end_on_their_own(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_num_batched_tokens=8)
    steering = spec(feature(3), monitor(4))
    asked = request("r", LONG_PROMPT, steering, n=4, seed=3, temperature=1.0, stop_token_ids=tuple(range(0, 257, 9)))
    results = drive(engine, [asked], [0])
    assert set(results) == {("r", index) for index in range(4)}
    assert len({len(result.token_ids) for result in results.values()}) > 1, "pick another seed"
    for index, result in results.items():
        covered = len(LONG_PROMPT) + len(result.token_ids) - 1
        assert [each.tokens_covered for each in result.receipt.interventions] == [covered, covered]
        assert result.receipt.num_cached_tokens == (0 if index == ("r", 0) else 32)


def test_requests_may_arrive_from_many_threads(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_waiting=100)

    def submit(worker: int) -> None:
        for i in range(5):
            engine.add_request(request(f"{worker}-{i}", "x", spec(feature(worker)), n=1 + i % 2))
            if i == 2:
                engine.abort(f"{worker}-{i}")

    threads = [threading.Thread(target=submit, args=(worker,)) for worker in range(1, 5)]
    for thread in threads:
        thread.start()
    finished = Counter()
    while any(thread.is_alive() for thread in threads) or engine.has_unfinished():
        finished.update((o.request_id, o.index) for o in engine.step() if o.finish_reason is not None)
    assert finished == Counter(
        (f"{worker}-{i}", index) for worker in range(1, 5) for i in range(5) for index in range(1 + i % 2)
    )
    assert_idle(engine)
