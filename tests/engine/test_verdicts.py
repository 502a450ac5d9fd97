"""What the guardrails decided, from the counters alone: nothing that did not run on every token passes for done."""

from __future__ import annotations

import math

import pytest
from engine_runs import feature, request, spec
from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.verdicts import verdicts_of
from steerserve.errors import DetectorError
from steerserve.models.splice import STAGES, SiteBuffers
from steerserve.steering.plan import Stage
from steerserve.types import (
    FinishReason,
    Guard,
    GuardAction,
    GuardEvent,
    InterventionReceipt,
    Op,
    Receipt,
    Site,
    Stream,
    Verdict,
    VerdictKind,
    overall_verdict,
)

SITE = Site(1, Stream.RESID_POST)
CALM, QUIET = "policy:calm@1", "policy:quiet@2"
K = VerdictKind


def line(source: str, in_scope: int = 4, covered: int = 4, edited: int = 0, label: str = "edit") -> InterventionReceipt:
    return InterventionReceipt(source, label, SITE, in_scope, covered, edited, 0.0, 0.0)


def receipt(*lines: InterventionReceipt, policies: tuple[str, ...] = ("calm@1",)) -> Receipt:
    steered = bool(lines) and all(0 < entry.tokens_in_scope == entry.tokens_covered for entry in lines)
    return Receipt("hash", "model", policies, {}, lines, steered)


def kinds(*lines: InterventionReceipt, policies=("calm@1",), events=()) -> list[tuple[str, VerdictKind]]:
    return [(verdict.source, verdict.kind) for verdict in verdicts_of(receipt(*lines, policies=policies), events, {})]


def test_a_policy_allows_or_modifies_by_what_it_edited() -> None:
    assert kinds(line(CALM)) == [(CALM, K.ALLOW)]
    assert kinds(line(CALM, edited=1)) == [(CALM, K.MODIFIED)]


def test_edits_of_the_request_itself_are_no_verdict() -> None:
    assert kinds(line("request", edited=4), policies=()) == []
    assert kinds(line("request", edited=4), line(CALM)) == [(CALM, K.ALLOW)]


def test_guards_of_the_request_are_kept_apart_from_policies() -> None:
    events = [GuardEvent(0, GuardAction.BLOCK, 3, 2.0, "request", "mine")]
    assert kinds(line("request"), line(CALM, edited=1), events=events) == [(CALM, K.MODIFIED), ("request", K.BLOCKED)]


def test_a_verdict_says_where_and_how_much() -> None:
    events = [
        GuardEvent(1, GuardAction.FLAG, 3, 2.0, CALM, "rude"),
        GuardEvent(1, GuardAction.FLAG, 5, 4.0, CALM, "rude"),
        GuardEvent(1, GuardAction.REWIND, 6, 9.0, CALM, "rude"),
    ]
    assert verdicts_of(receipt(line(CALM)), events, {(CALM, 1): 1.5}) == (
        Verdict(K.FLAGGED, CALM, "rude", (3, 5), (2.0, 4.0), 1.5),
        Verdict(K.REWOUND, CALM, "rude", (6,), (9.0,), 1.5),
    )


def test_a_guard_that_could_not_read_proves_nothing() -> None:
    events = [GuardEvent(0, GuardAction.FLAG, 3, math.nan, CALM, "rude")]
    assert kinds(line(CALM, edited=2), events=events) == [(CALM, K.UNPROVEN)]


def test_an_edit_that_policies_share_proves_or_fails_for_all() -> None:
    """It is counted for the first of them."""
    both = ("calm@1", "quiet@2")
    assert kinds(line(CALM, edited=1), policies=both) == [(CALM, K.MODIFIED), (QUIET, K.ALLOW)]
    assert kinds(line(CALM, covered=3), line(QUIET), policies=both) == [(CALM, K.UNPROVEN), (QUIET, K.UNPROVEN)]


def test_a_policy_that_ran_on_nothing_is_unproven() -> None:
    assert kinds(line(CALM, 0, 0)) == [(CALM, K.UNPROVEN)]
    assert kinds() == [(CALM, K.UNPROVEN)]


def test_the_gravest_counts() -> None:
    assert overall_verdict([]) is K.ALLOW
    assert (
        overall_verdict([Verdict(K.FLAGGED, CALM), Verdict(K.BLOCKED, "request"), Verdict(K.ALLOW, QUIET)]) is K.BLOCKED
    )


counts = st.integers(0, 3)
lines = st.lists(st.builds(line, st.sampled_from(["request", CALM, QUIET]), counts, counts, counts), max_size=5)
events = st.lists(
    st.builds(
        GuardEvent,
        st.integers(0, 2),
        st.sampled_from(GuardAction),
        st.integers(0, 9),
        st.sampled_from([1.0, math.nan]),
        st.sampled_from(["request", CALM, QUIET]),
    )
)


@given(lines=lines, events=events)
def test_never_done_without_proof(lines, events) -> None:
    verdicts = verdicts_of(receipt(*lines, policies=("calm@1", "quiet@2")), events, {})
    assert {CALM, QUIET} <= {verdict.source for verdict in verdicts}
    missed = {entry.source for entry in lines if entry.tokens_covered < entry.tokens_in_scope}
    for verdict in verdicts:
        if verdict.kind in (K.ALLOW, K.MODIFIED):
            assert not missed - {"request"}
            assert any(entry.tokens_in_scope for entry in lines)
        if verdict.kind is K.MODIFIED:
            assert any(entry.tokens_edited for entry in lines if entry.source == verdict.source)
    if "request" in missed:
        assert any(verdict.kind is K.UNPROVEN and verdict.source == "request" for verdict in verdicts)


# Faults of the kernel, in an engine that runs.

FAULTS = ("site skipped", "token skipped", "norm lost")
PROMPT = "The quick brown fox"


def break_kernel(monkeypatch, fault: str, at_call: int, stage: Stage) -> None:
    """From the ``at_call``-th pass on, the kernel does not do, or does not report, all of its work once."""
    apply, num_calls = SiteBuffers.apply_, 0

    def broken(buffers: SiteBuffers, hidden) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls != at_call:
            apply(buffers, hidden)
        elif fault != "site skipped":
            apply(buffers, hidden)
            last = hidden.shape[1] - 1
            segment = STAGES * last + stage
            buffers.x_norm[segment] = -1.0
            if fault == "token skipped":
                buffers.activation[buffers.ptr[segment] : buffers.ptr[segment + 1]] = math.nan

    monkeypatch.setattr(SiteBuffers, "apply_", broken)


@pytest.fixture
def model(load_tiny):
    return load_tiny()


@pytest.mark.parametrize("at_call", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_response_whose_policy_missed_a_token_does_not_end_as_one(
    fault, at_call, model, make_engine, make_pack, run, monkeypatch
) -> None:
    engine = make_engine(model, [make_pack(model)])
    break_kernel(monkeypatch, fault, at_call, Stage.POLICY)
    response = run(engine, [request("r", PROMPT, policies=("mood",), max_tokens=6)])["r"]
    assert isinstance(response.error, DetectorError)
    assert response.finish_reason is None
    if fault == "norm lost":  # noticed by the sums at the end alone
        assert not response.receipt.steered
        assert "not proven" in str(response.error)
        assert {verdict.kind for verdict in response.outputs[-1].verdicts} == {K.UNPROVEN}


@pytest.mark.parametrize("at_call", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_response_whose_own_edit_missed_a_token_is_not_called_steered(
    fault, at_call, model, make_engine, run, monkeypatch
) -> None:
    engine = make_engine(model)
    break_kernel(monkeypatch, fault, at_call, Stage.REQUEST)
    steering = spec(feature(3, Op.CLAMP, 2.0))
    response = run(engine, [request("r", PROMPT, steering, max_tokens=6)])["r"]
    assert response.finish_reason is FinishReason.LENGTH
    assert not response.receipt.steered
    assert [(v.source, v.kind) for v in response.outputs[-1].verdicts] == [("request", K.UNPROVEN)]


def test_a_response_as_asked_is_proven(model, make_engine, make_pack, run) -> None:
    engine = make_engine(model, [make_pack(model)])
    guard = Guard(feature(4, Op.MONITOR).target, -1e6, GuardAction.FLAG)
    steering = spec(feature(3, Op.CLAMP, 2.0), guards=(guard,))
    response = run(engine, [request("r", PROMPT, steering, policies=("mood",), max_tokens=6)])["r"]
    assert response.receipt.steered
    policy, own = response.outputs[-1].verdicts
    assert (policy.source, policy.kind) == ("policy:mood@1", K.MODIFIED)
    assert (own.source, own.kind, own.threshold) == ("request", K.FLAGGED, -1e6)
    assert own.positions == tuple(range(len(PROMPT) + 6))
