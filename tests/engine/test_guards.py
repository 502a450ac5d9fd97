"""What guards flag and block, what is never released, and what becomes of a guard that cannot read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from engine_runs import assert_idle, drive, scores_of
from guard_oracle import (
    ASLEEP,
    BASE,
    BEHIND,
    GREEDY,
    PENALISED,
    PROMPT,
    SITE,
    STRONGER,
    Oracle,
    activations_behind,
    assert_expected,
    assert_held_back,
    fires_at,
    fires_at_half,
    guarded,
    watch,
)

from steerserve.errors import DetectorError, ServiceError
from steerserve.sae.model import SAE
from steerserve.types import (
    DirectionTarget,
    FeatureTarget,
    FinishReason,
    GenerateRequest,
    Guard,
    GuardAction,
    Intervention,
    Op,
    Phase,
    Rewind,
    SteeringSpec,
)


@pytest.fixture
def oracle(load_tiny, sae) -> Oracle:
    return Oracle(load_tiny(), sae)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("max_num_batched_tokens", [5, 128])
def test_flag_names_the_positions_whose_score_exceeds_the_threshold(
    max_num_batched_tokens, phase, oracle, load_tiny, make_engine
) -> None:
    """Of the prompt, of the response, and the last token; the response goes on as if there were no guard."""
    guard = fires_at_half(activations_behind(oracle, guarded(ASLEEP)), GuardAction.FLAG, phase=phase)
    request = guarded(guard, return_activations=True)
    expected = oracle.generate(request)
    positions = [event.position for event in expected.events]
    num_prompt = len(PROMPT)
    assert (positions[0] < num_prompt) is (phase is not Phase.GENERATED)
    assert (positions[-1] == num_prompt + 15) is (phase is not Phase.PROMPT)
    assert len(positions) > 5
    engine = make_engine(load_tiny(), max_num_batched_tokens=max_num_batched_tokens)
    watched = watch(engine, request)
    assert_expected(watched.outcome, expected)
    assert_held_back(watched, num_prompt, 1)
    in_phase = [phase in (Phase.ALL, Phase.PROMPT if p < num_prompt else Phase.GENERATED) for p in range(35)]
    scores = scores_of(watched.outcome)[:, 2]
    np.testing.assert_allclose(scores, np.where(in_phase, expected.scores[:, 0], np.nan), rtol=1e-4, atol=1e-4)
    unguarded = drive(engine, [replace(request, steering=SteeringSpec(BASE))])["r", 0]
    assert (watched.outcome.token_ids, watched.outcome.text) == (unguarded.token_ids, unguarded.text)


@pytest.mark.parametrize("max_num_batched_tokens", [4, 128])
@pytest.mark.parametrize("position", [0, 7, 18])
def test_block_in_the_prompt_releases_nothing(position, max_num_batched_tokens, oracle, load_tiny, make_engine) -> None:
    x = activations_behind(oracle, guarded(ASLEEP))
    request = guarded(fires_at(x, position, GuardAction.BLOCK))
    expected = oracle.generate(request)
    assert [event.position for event in expected.events] == [position]
    engine = make_engine(load_tiny(), max_num_batched_tokens=max_num_batched_tokens)
    assert_expected(drive(engine, [request])["r", 0], expected)


@pytest.mark.parametrize("index", [0, 5, 15])
def test_block_in_the_response_releases_nothing_from_its_position_on(index, oracle, load_tiny, make_engine) -> None:
    x, num_prompt = activations_behind(oracle, guarded(ASLEEP)), len(PROMPT)
    request = guarded(fires_at(x, num_prompt + index, GuardAction.BLOCK, phase=Phase.GENERATED))
    expected = oracle.generate(request)
    assert [event.position for event in expected.events] == [num_prompt + index]
    assert expected.finish_reason is FinishReason.BLOCKED
    assert len(expected.token_ids) == index
    assert_expected(drive(make_engine(load_tiny()), [request])["r", 0], expected)


def test_guards_of_one_request_fire_in_their_order_at_each_position(oracle, load_tiny, make_engine) -> None:
    """One of the two that flag fires at every position, up to and at that of the third."""
    x, num_prompt = activations_behind(oracle, guarded(ASLEEP)), len(PROMPT)
    half = fires_at_half(x, GuardAction.FLAG)
    other = Guard(DirectionTarget(BEHIND, -half.target.vector), -half.threshold, GuardAction.FLAG)
    blocking = fires_at(x, num_prompt + 9, GuardAction.BLOCK, phase=Phase.GENERATED)
    request = replace(guarded(half), steering=SteeringSpec(BASE, (half, blocking, other)))
    expected = oracle.generate(request)
    assert {event.guard for event in expected.events} == {0, 1, 2}
    assert len(expected.events) >= num_prompt + 10
    assert_expected(drive(make_engine(load_tiny()), [request])["r", 0], expected)


def unreadable(sae: SAE, value: float) -> SAE:
    """Its feature 7 reads ``value`` everywhere."""
    b_enc = sae.b_enc.clone()
    b_enc[7] = value
    return replace(sae, b_enc=b_enc)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("phase", [Phase.ALL, Phase.GENERATED])
def test_a_score_that_is_not_finite_ends_the_request_unless_the_guard_fails_open(
    phase, value, sae, load_tiny, make_engine
) -> None:
    engine = make_engine(load_tiny(), sae=unreadable(sae, value))
    guard = Guard(FeatureTarget("tiny-sae", 7), 0.0, GuardAction.BLOCK, phase=phase)
    request = guarded(guard)
    engine.add_request(request)
    *_, last = [output for _ in range(20) for output in engine.step()]
    assert isinstance(last.error, DetectorError)
    assert (last.token_ids, last.text, last.guard_events, last.finish_reason) == ((), "", (), None)
    opened = drive(engine, [guarded(replace(guard, fail_open=True))])["r", 0]
    plain = drive(engine, [replace(request, steering=SteeringSpec(BASE))])["r", 0]
    assert (opened.token_ids, opened.finish_reason) == (plain.token_ids, FinishReason.LENGTH)
    read = range(0 if phase is Phase.ALL else len(PROMPT), len(PROMPT) + 16)
    assert [(event.action, event.position) for event in opened.guard_events] == [(GuardAction.FLAG, p) for p in read]
    np.testing.assert_array_equal([event.score for event in opened.guard_events], value)


def test_a_guard_that_did_not_run_is_not_silence(load_tiny, make_engine) -> None:
    """Whatever takes the splices off the model, nothing is released."""
    engine = make_engine(load_tiny())
    splicer = engine._runner.splicer
    splicer.install()
    splicer.remove()
    guard = Guard(FeatureTarget("tiny-sae", 7), 1e6, GuardAction.FLAG)
    engine.add_request(guarded(guard))
    *_, last = [output for _ in range(20) for output in engine.step()]
    assert isinstance(last.error, DetectorError)
    assert last.token_ids == ()
    assert last.receipt.interventions[2].tokens_covered == 0


def test_a_request_that_pushes_a_guard_out_of_its_domain_fails_closed(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_norm=1e3)
    guard = Guard(FeatureTarget("tiny-sae", 7), 1e6, GuardAction.FLAG)
    away = Intervention(DirectionTarget(SITE, np.ones(32, dtype=np.float32)), Op.ADD, 1e4, phase=Phase.GENERATED)
    pushed = replace(guarded(guard), steering=SteeringSpec((away,), (guard,)))
    results = drive(engine, [pushed])["r", 0], drive(engine, [guarded(guard)])["r", 0]
    assert ["beyond its SAE's norm" in result.error for result in results] == [True, False]
    assert results[0].token_ids == ()


@pytest.mark.parametrize("ended_by", ["abort", "deadline"])
@pytest.mark.parametrize("num_positions", [1, 5])
def test_an_early_end_shows_nothing_that_was_not_released(
    num_positions, ended_by, oracle, load_tiny, make_engine
) -> None:
    now = 0.0
    engine = make_engine(load_tiny(), clock=lambda: now)
    rewind = Rewind(num_positions, STRONGER)
    guard = replace(ASLEEP, action=GuardAction.REWIND, rewind=rewind)
    # Text that may become a stop string is not the reader's yet either.
    request = guarded(guard, replace(PENALISED, stop=("Z" * 9,)), timeout_s=60.0)
    expected = oracle.generate(request)
    engine.add_request(request)
    outputs = [output for _ in range(9) for output in engine.step()]
    if ended_by == "abort":
        engine.abort("r")
    else:
        now = 61.0
    (last,) = engine.step()
    shown = "".join(output.text for output in outputs)
    assert (last.token_ids, last.text, last.logprobs) == ((), "", ())
    assert shown == expected.text[: 9 - num_positions]
    assert sum(len(output.token_ids) for output in outputs) == 9 - num_positions
    assert last.finish_reason is (FinishReason.ABORT if ended_by == "abort" else None)
    assert isinstance(last.error, ServiceError) is (ended_by == "deadline")
    assert_idle(engine)


def test_a_block_comes_before_a_rewind_on_the_same_token(load_tiny, make_engine) -> None:
    """In whatever order the request names them."""
    line = ASLEEP.target
    again = Rewind(2, (Intervention(line, Op.ADD, 1.0),))
    rewinding = Guard(line, -1e6, GuardAction.REWIND, again, phase=Phase.GENERATED)
    blocking = Guard(line, -1e6, GuardAction.BLOCK, phase=Phase.GENERATED)
    for guards in ((rewinding, blocking), (blocking, rewinding)):
        asked = GenerateRequest("r", PROMPT, GREEDY, SteeringSpec(guards=guards))
        result = drive(make_engine(load_tiny()), [asked])["r", 0]
        assert result.finish_reason is FinishReason.BLOCKED
        assert result.token_ids == ()
        assert [(event.guard, event.action) for event in result.guard_events] == [
            (0, GuardAction.BLOCK),
            (1, GuardAction.BLOCK),
        ]
