"""Policies in the engine: whose guards fired, what replaces them while streams run, and what no request can undo."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import EARLY, LATE, direction, drive, feature, guard, outcomes, request, rewind, spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_steering import SITE, assert_close, recording

from steerserve.engine.engine import Engine
from steerserve.errors import CapacityError, DetectorError, InvalidRequestError, PolicyError
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import ConceptPack
from steerserve.steering.policies import Policy
from steerserve.steering.policy_set import PolicySet
from steerserve.types import REDACTED_TOKEN_ID, FinishReason, GuardAction, Op, Phase, Site, Stream

PROMPT = "The quick brown fox"
NUM_PROMPT = len(PROMPT)
SOURCE = "policy:calm@1"


def policy(*rules: dict[str, object], version: str = "1", name: str = "calm", **rest: Any) -> Policy:
    """Rules are of the concept ``mood`` unless they say otherwise."""
    named = [{"concept": "mood", "name": f"rule{i}"} | rule for i, rule in enumerate(rules)]
    content = {"format": "steerserve.policy/1", "name": name, "version": version, "rules": named}
    return Policy.model_validate(content | rest)


def install(engine: Engine, *policies: Policy) -> str:
    return str(engine.replace_policies(PolicySet({each.name: each for each in policies})))


def ask(name: str = "r", **rest: Any):
    return request(name, PROMPT, **{"policies": ("calm",), "max_tokens": 12} | rest)


@pytest.fixture
def engine(load_tiny, make_engine, make_pack) -> Engine:
    model = load_tiny()
    return make_engine(model, [make_pack(model)])


@pytest.fixture
def scores(engine) -> np.ndarray:
    """``[positions]`` of the detector, in a response that nothing edits."""
    install(engine, policy({"action": "flag", "threshold": -1e6}))
    events = drive(engine, [ask()])["r", 0].guard_events
    install(engine)
    assert [event.position for event in events] == list(range(NUM_PROMPT + 12))
    return np.array([event.score for event in events])


def fires_once(scores: np.ndarray, **rest: object) -> tuple[dict[str, object], int]:
    """A rule that fires in the response, and where it does so first."""
    generated = scores[NUM_PROMPT:]
    at = int(generated[2:-2].argmax()) + 2
    return {"threshold": float(generated[at] - 1e-3), "phase": "generated"} | rest, NUM_PROMPT + at


def test_a_flag_says_whose_rule_fired_and_where(engine, scores) -> None:
    rule, at = fires_once(scores, action="flag")
    install(engine, policy({"action": "flag", "threshold": 1e6}, rule))
    plain, result = drive(engine, [ask("p", policies=()), ask()]).values()
    (event,) = [event for event in result.guard_events if event.position == at]
    assert (event.source, event.guard, event.label, event.action) == (SOURCE, 1, "rule1", GuardAction.FLAG)
    assert event.score == pytest.approx(scores[at], rel=1e-5)
    assert result.token_ids == plain.token_ids
    assert result.receipt.policies == ("calm@1",)


def test_a_block_releases_nothing_from_its_token_on(engine, scores) -> None:
    rule, at = fires_once(scores, action="block")
    install(engine, policy(rule))
    plain, result = drive(engine, [ask("p", policies=()), ask()]).values()
    first = next(event.position for event in result.guard_events)
    assert first <= at
    assert result.finish_reason is FinishReason.BLOCKED
    assert result.token_ids == plain.token_ids[: first - NUM_PROMPT]


def test_a_redaction_hides_the_token_and_goes_on(engine, scores) -> None:
    rule, at = fires_once(scores, action="redact")
    install(engine, policy(rule))
    result = drive(engine, [ask()])["r", 0]
    assert result.token_ids[at - NUM_PROMPT] == REDACTED_TOKEN_ID
    assert result.finish_reason is FinishReason.LENGTH
    assert result.receipt.num_redacted_tokens == result.token_ids.count(REDACTED_TOKEN_ID)


def test_a_rewind_edits_what_the_pack_does_and_more(engine, scores) -> None:
    rule, at = fires_once(scores, action="rewind", rewind={"tokens": 2, "retries": 2, "otherwise": "flag"})
    install(engine, policy(rule))
    plain, result = drive(engine, [ask("p", policies=()), ask()]).values()
    first = result.guard_events[0]
    assert (first.position, first.action, first.source) == (at, GuardAction.REWIND, SOURCE)
    kept = at + 1 - 2 - NUM_PROMPT
    assert result.token_ids[:kept] == plain.token_ids[:kept]
    reading, edit = result.receipt.interventions
    read_again = result.receipt.num_rewound_tokens + result.receipt.num_rewinds
    assert reading.tokens_in_scope == 12 + read_again
    assert edit.label == "rewind: concept mood: clamp 0"
    assert edit.tokens_in_scope == edit.tokens_covered > 0
    assert edit.tokens_edited > 0


def test_policy_and_request_guards_act_side_by_side(engine, scores) -> None:
    rule, _ = fires_once(scores, action="flag")
    install(engine, policy(rule, {"action": "clamp"}))
    own = guard(3, -1e6, phase=Phase.GENERATED)
    asked = spec(feature(5, Op.ADD, 1.0), guards=(own, guard(4, 1e6, rewind(feature(4, Op.BLOCK, None)))))
    result = drive(engine, [ask(steering=asked)])["r", 0]
    assert {event.source for event in result.guard_events} <= {"request", SOURCE}
    assert [event.guard for event in result.guard_events if event.source == "request"] == [0] * 12
    assert [entry.source for entry in result.receipt.interventions] == ["request"] * 4 + [SOURCE] * 2


def test_limits_are_held_at_admission(engine) -> None:
    install(engine, policy({"action": "clamp"}, limits={"interventions": 0, "max_tokens": 12}))
    drive(engine, [ask()])
    with pytest.raises(InvalidRequestError, match=r"policy calm@1"):
        engine.add_request(ask(steering=spec(feature(3))))
    with pytest.raises(InvalidRequestError, match=r"sampling.max_tokens: got 13, expected at most 12"):
        engine.add_request(ask(max_tokens=13))
    assert not engine.has_unfinished()


# Replacing policies.


def test_streams_keep_the_version_they_began_with(engine, scores) -> None:
    rule, _ = fires_once(scores, action="block")
    install(engine, policy({"action": "clamp"}))
    engine.add_request(ask("old"))
    outputs = [output for _ in range(4) for output in engine.step()]
    assert install(engine, policy(rule, version="2")) == "changed calm@2"
    engine.add_request(ask("new"))
    with pytest.raises(InvalidRequestError, match="the loaded version, calm@2"):
        engine.add_request(ask("pinned", policies=("calm@1",)))
    while engine.has_unfinished():
        outputs += engine.step()
    results = outcomes(outputs)
    assert results["old", 0].receipt.policies == ("calm@1",)
    assert (results["old", 0].finish_reason, results["old", 0].guard_events) == (FinishReason.LENGTH, ())
    assert results["new", 0].receipt.policies == ("calm@2",)
    assert results["new", 0].finish_reason is FinishReason.BLOCKED
    assert install(engine) == "removed calm@2"
    with pytest.raises(InvalidRequestError, match="a loaded policy: mood@1"):
        engine.add_request(ask("gone"))


def test_a_set_that_is_refused_leaves_the_old_one_in_force(load_tiny, make_engine, make_pack) -> None:
    model = load_tiny()
    packs = [make_pack(model), make_pack(model, features=(5, 6, 7, 8), name="wide")]
    engine = make_engine(model, packs, bank_capacity=8, sites=[str(SITE)])
    install(engine, policy({"action": "clamp"}))
    with pytest.raises(PolicyError, match="calm@1: changed, expected another version"):
        install(engine, policy({"action": "flag"}))
    growing = policy({"action": "rewind", "concept": "wide", "rewind": {"retries": 4}}, version="2")
    with pytest.raises(PolicyError, match=r"all policies together: .*at most 8 distinct features"):
        install(engine, growing)
    once = policy({"action": "rewind", "rewind": {"retries": 1}}, version="2")  # two more rows, of the eight
    engine.add_request(request("full", PROMPT, spec(feature(1), feature(2))))
    with pytest.raises(CapacityError, match="slots"):
        install(engine, once)
    assert drive(engine, [ask()])["r", 0].receipt.policies == ("calm@1",)
    assert install(engine, once) == "changed calm@2"


def test_a_policy_at_a_site_that_is_not_steered_is_refused(load_tiny, make_engine, make_pack) -> None:
    model = load_tiny()
    engine = make_engine(model, [make_pack(model)], sites=[str(LATE)])
    with pytest.raises(PolicyError, match=f"calm@1: acts at sites that are not steered, expected {LATE}"):
        install(engine, policy({"action": "clamp"}))


# What no request can undo.


@pytest.fixture
def limited(load_tiny, make_pack, tmp_path):
    """The model, and ``mood`` with rows that end at a norm: a feature and a direction."""

    def make(max_norm: float, **changes: object) -> tuple[object, ConceptPack]:
        model = load_tiny()
        pack = make_pack(model, always=True, value=-2.0)
        tensors = replace(
            pack.tensors,
            max_norm=np.full(2, max_norm, dtype=np.float32),
            threshold=np.array([0.0, -np.inf], dtype=np.float32),
        )
        return model, save_pack(pack.card, tensors, tmp_path / f"limited-{max_norm}" / "mood")

    return make


BEFORE = (EARLY, Site(0, Stream.RESID_POST), Site(1, Stream.ATTN_OUT))
"""Sites in front of that of ``mood``."""

EDITS = st.builds(
    lambda op, magnitude, sign, site, seed, phase: direction(
        op, None if op is Op.BLOCK else sign * 10.0**magnitude, site, seed, phase=phase
    ),
    st.sampled_from([Op.ADD, Op.SCALE, Op.CLIP, Op.BLOCK]), st.floats(-1, 7), st.sampled_from([-1, 1]),
    st.sampled_from(BEFORE), st.integers(0, 3), st.sampled_from(Phase),
)  # fmt: skip


def test_no_edit_before_a_policy_lowers_what_it_guarantees_in_silence(limited, make_engine) -> None:
    """Either the response ends with an error, or at every position the policy's rows are read and set as if they were
    defined everywhere, and its detector reports what it reads."""
    model, pack = limited(200.0)
    rule = {"action": "flag", "threshold": -1e30}
    seen = {"ended": 0, "served": 0}
    with recording(model, SITE, lambda: make_engine(model, [pack], enable_prefix_caching=False)) as (recorder, engine):
        install(engine, policy({"action": "clamp"}, rule))
        drive(engine, [ask()])
        natural = np.linalg.norm(recorder.row()[0], axis=1)
        assert natural.max() < 100

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.lists(EDITS, min_size=1, max_size=3, unique_by=lambda edit: str(edit.target.site)))
        def check(edits) -> None:
            recorder.before.clear()
            recorder.after.clear()
            result = drive(engine, [ask(steering=spec(*edits), max_tokens=5)])["r", 0]
            if result.error:
                assert "calm@1" in result.error or "finite" in result.error
                assert (result.token_ids, result.text) == ((), "") or "position" not in result.error
                seen["ended"] += 1
                return
            seen["served"] += 1
            x, changed = recorder.row()
            tensors = pack.tensors
            pre = x @ tensors.W_enc.T.astype(float) + tensors.b_enc
            f = np.where(pre > tensors.threshold, pre, 0.0)
            assert_close(changed, x + (-2.0 - f) @ tensors.W_dec.astype(float), x, torch.float32)
            events = [event for event in result.guard_events if event.source == SOURCE]
            assert [event.position for event in events] == list(range(NUM_PROMPT + 5))
            np.testing.assert_allclose([event.score for event in events], f.sum(axis=1), rtol=1e-3, atol=1e-3)

        check()
    assert min(seen.values()) > 5, "both happen"


def away(phase: Phase = Phase.ALL, site: Site = EARLY):
    """Pushes the activation far beyond the norm that ``limited`` ends at."""
    return spec(direction(Op.ADD, 1e4, site, phase=phase))


@pytest.mark.parametrize("rule", [{"action": "clamp"}, {"action": "flag"}, {"action": "block", "threshold": 1e6}])
@pytest.mark.parametrize("phase", list(Phase))
def test_what_is_pushed_beyond_a_norm_ends_the_response_unless_the_rule_fails_open(
    rule, phase, limited, make_engine
) -> None:
    model, pack = limited(200.0)
    engine = make_engine(model, [pack])
    install(engine, policy(rule), policy(rule | {"fail": "open"}, name="open"))
    for site in BEFORE:
        engine.add_request(ask(steering=away(phase, site)))
        *_, last = [output for _ in range(30) for output in engine.step()]
        assert isinstance(last.error, DetectorError)
        assert "calm@1" in str(last.error)
    opened = drive(engine, [ask(steering=away(phase), policies=("open",))])["r", 0]
    assert opened.finish_reason is FinishReason.LENGTH
    both = drive(engine, [ask(steering=away(phase), policies=("open", "mood"))])["r", 0]
    assert "mood@1" in both.error, "another policy still fails closed"


def test_the_first_position_is_left_to_its_nature(limited, make_engine) -> None:
    """It may lie beyond the norm as attention sinks do, and is no error there: so no request may put it there."""
    model, pack = limited(200.0)
    with recording(model, SITE, lambda: make_engine(model, [pack], enable_prefix_caching=False)) as (recorder, engine):
        install(engine, policy({"action": "clamp"}))
        for steering in (spec(), spec(direction(Op.ADD, 1.0)), away(Phase.PROMPT)):
            recorder.before.clear()
            recorder.after.clear()
            one = request("r", PROMPT[0], steering, policies=("calm",), max_tokens=1)
            result = drive(engine, [one])["r", 0]
            x, changed = recorder.row()
            assert len(x) == 1
            if steering == spec():
                natural, guarded, plain = x, changed, result
            np.testing.assert_array_equal(x, natural)
            np.testing.assert_array_equal(changed, guarded)
            assert result.token_ids == plain.token_ids
        assert result.receipt.interventions[0].tokens_in_scope == 0
        assert not result.receipt.steered
        whole = drive(engine, [ask(steering=spec(direction(Op.ADD, 1.0)))])["r", 0].receipt
        assert [entry.tokens_in_scope for entry in whole.interventions] == [NUM_PROMPT + 10, NUM_PROMPT + 11]


def test_without_policies_the_first_position_is_a_requests_own(limited, make_engine) -> None:
    model, pack = limited(math.inf)
    engine = make_engine(model, [pack])
    install(engine, policy({"action": "clamp"}))
    for policies in ((), ("calm",)):
        result = drive(engine, [ask(steering=spec(direction(Op.ADD, 1.0)), policies=policies)])["r", 0]
        assert result.receipt.interventions[0].tokens_in_scope == NUM_PROMPT + 11


def test_a_clash_is_the_policys_win_and_the_receipt_says_so(engine) -> None:
    install(engine, policy({"action": "clamp"}, version="3"))
    asked = spec(feature(3, Op.CLAMP, 50.0, always=True), feature(7, Op.ADD, 1.0))
    result = drive(engine, [ask(steering=asked, return_activations=True)])["r", 0]
    receipt = result.receipt
    assert [entry.overridden_by for entry in receipt.interventions] == [("policy:calm@3",), (), ()]
    assert receipt.steered
    assert receipt.interventions[2].tokens_edited == receipt.interventions[2].tokens_in_scope


def test_what_a_policy_reads_is_replayed_from_the_prefix_cache(engine, scores) -> None:
    rule, _ = fires_once(scores, action="redact")
    install(engine, policy(rule, {"action": "flag", "threshold": -1e6}))
    first, second = (drive(engine, [ask(name)])[name, 0] for name in "ab")
    assert second.receipt.num_cached_tokens > 0
    assert (first.guard_events, first.token_ids, first.text) == (second.guard_events, second.token_ids, second.text)
