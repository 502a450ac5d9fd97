"""Policy files: what is read, what is refused and in which words, and what a policy comes to in a plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_specs import SITE, concept, direction, feature, guard, rewind, spec

from steerserve.errors import AssetError, InvalidRequestError, PolicyError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan, find_policies
from steerserve.steering.limits import check_limits
from steerserve.steering.plan import Plan, Stage
from steerserve.steering.policies import Policy, parse_policy, read_policy
from steerserve.steering.policy_set import BUILT_IN, PolicySet, policy_files
from steerserve.steering.policy_words import explain
from steerserve.types import (
    GenerateRequest,
    Guard,
    GuardAction,
    Intervention,
    Op,
    Phase,
    SamplingParams,
    Site,
    SteeringSpec,
    Stream,
)

EARLY, LATE = Site(0, Stream.RESID_POST), Site(3, Stream.RESID_POST)


def policy(*rules: dict[str, object], name: str = "calm", version: str = "1", **rest: object) -> Policy:
    """Rules are of the concept ``mood`` unless they say otherwise."""
    written = [{"concept": "mood", "name": f"rule{i}"} | rule for i, rule in enumerate(rules)]
    content = {"format": "steerserve.policy/1", "name": name, "version": version, "rules": written} | rest
    return parse_policy(yaml.safe_dump(content).encode(), "calm.yaml")


CLAMP, FLAG = {"action": "clamp"}, {"action": "flag"}
REWIND = {"action": "rewind", "rewind": {"tokens": 3, "retries": 2, "otherwise": "redact"}}

WithPolicies = Callable[..., Catalog]


@pytest.fixture
def with_policies(catalog) -> WithPolicies:
    def make(*policies: Policy) -> Catalog:
        return replace(catalog, policy_files={each.name: each for each in policies})

    return make


# Files.


def test_what_is_left_out_has_its_default() -> None:
    plain = policy(CLAMP, {"action": "rewind", "name": None})
    clamp, again = plain.rules
    assert (clamp.applied_edit, clamp.guard_action, clamp.label, clamp.phase) == ("calibrated", None, "rule0", None)
    assert (again.applied_edit, again.guard_action, again.label) == (None, GuardAction.REWIND, "mood")
    assert again.rewind_terms == again.rewind_terms.model_validate({"tokens": 8, "retries": 1, "otherwise": "block"})
    assert not again.fail_open
    assert set(vars(plain.limits).values()) == {None}
    assert (plain.tag, plain.source, plain.concepts) == ("calm@1", "policy:calm@1", ("mood",))


HEAD = 'format: steerserve.policy/1\nname: calm\nversion: "1"\n'


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (HEAD, ["calm.yaml:1: rules: missing, expected a value"]),
        (HEAD + "rules: []", ["calm.yaml:4: rules: got [], expected"]),
        (
            HEAD + "rules:\n- concept: a\n  action: clamp\n  colour: red",
            ["calm.yaml:7: rules[0].colour: unknown, expected only"],
        ),
        (
            HEAD + "rules:\n- {concept: a, action: flag, treshold: 1}",
            ["rules[0].treshold: unknown, expected threshold"],
        ),
        (HEAD + "rules: []\nLIMITS: 1", ["calm.yaml:5: LIMITS: unknown, expected only format, name, version, desc"]),
        (
            HEAD + "rules:\n- {concept: a, action: rewind, rewind: {token: 1}}",
            ["calm.yaml:5: rules[0].rewind.token: unknown, expected tokens"],
        ),
        (
            HEAD + "rules: {concept: a, action: flag}",
            ["rules: got {'concept': 'a', 'action': 'flag'}, expected a list"],
        ),
        (
            HEAD + "rules:\n- concept: a\n  action: blok",
            ["calm.yaml:6: rules[0].action: got 'blok', expected 'clamp', 'flag', 'rewind', 'redact' or 'block'"],
        ),
        (
            HEAD + "rules:\n- concept: a\n  action: flag\n  threshold: .nan\n  phase: never",
            ["calm.yaml:7: rules[0].threshold: got nan", "calm.yaml:8: rules[0].phase: got 'never', expected 'all'"],
        ),
        (HEAD + "rules:\n- {concept: a, action: clamp, threshold: 1}", ["rules[0]: threshold: expected none"]),
        (HEAD + "rules:\n- {concept: a, action: flag, rewind: {}}", ["rules[0]: rewind: expected none"]),
        (
            HEAD + "rules:\n- {concept: a, action: rewind, rewind: {tokens: 65, otherwise: rewind}}",
            ["rules[0].rewind.tokens: got 65, expected less", "otherwise: expected 'flag', 'redact' or 'block'"],
        ),
        (HEAD + "rules:\n- {concept: a, action: clamp, edit: calibratd}", ["rules[0].edit: got 'calibratd', expected"]),
        (HEAD + "rules:\n- {concept: a, action: clamp, edit: {op: monitor}}", ["rules[0].edit.op: expected an edit"]),
        (HEAD + "rules:\n- &x {concept: a, action: flag}\n- *x", ["calm.yaml:5: an alias"]),
        (HEAD + "name: b\nrules:\n- {concept: a, action: flag}", ["calm.yaml:4: name: given twice"]),
        (HEAD.replace('"1"', "1.10"), ["version: expected a version in quotes"]),
        (HEAD.replace("calm", "a b"), ["name: got 'a b', expected letters"]),
        (HEAD.replace("policy/1", "policy/9"), ["calm.yaml:1: format: got 'steerserve.policy/9', expected"]),
        (
            HEAD + "rules:\n- {concept: a, action: flag}\n- {concept: a, action: block}",
            ["calm.yaml:6: rules[1].name: expected a name that no other rule has, got 'a'"],
        ),
        (
            HEAD + "rules:\n- {concept: a, action: rewind}\n- {concept: b, action: rewind}",
            ["calm.yaml:6: rules[1].action: expected one rule that rewinds, and rules[0] does already"],
        ),
        (
            HEAD + "rules:\n- {concept: a, action: flag}\nlimits: {n: 0, priority: [2, 1], ops: [think]}",
            ["limits.n: got 0", "limits.ops[0]: got 'think', expected 'clamp'"],
        ),
        ("- 1", ["calm.yaml:1: got a list, expected named fields"]),
        ("", ["calm.yaml:1: got nothing, expected named fields"]),
        ("a: [", ["calm.yaml:1: not YAML"]),
        ("[" * 5000, ["calm.yaml:1: nested too deeply, expected at most 16 levels"]),
        ("\0", ["calm.yaml: not YAML"]),
    ],
)
def test_a_wrong_file_is_refused_with_line_field_and_what_would_be_valid(text, problems) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text.encode(), "calm.yaml")
    assert len(caught.value.problems) >= len(problems)
    for problem in problems:
        assert any(problem in told for told in caught.value.problems), caught.value.problems


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["format", "name", "version", "rules", "limits", "edit", "rewind", "op"]), inner),
    max_leaves=12,
).map(lambda content: yaml.safe_dump(content).encode())))  # fmt: skip
def test_no_file_ends_in_anything_but_a_policy_or_its_error(data) -> None:
    with pytest.raises(PolicyError):
        parse_policy(data, "x.yaml")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(position=st.integers(0, 400), junk=st.sampled_from(["", ":", "-", "[", "'", "\t", "&a", "0", "\n  x"]))
def test_a_damaged_file_is_read_or_refused(position, junk) -> None:
    text = (BUILT_IN / "family-friendly.yaml").read_text()
    with suppress(PolicyError):
        parse_policy((text[:position] + junk + text[position + 1 :]).encode(), "x.yaml")


def test_the_built_in_policies_are_sound() -> None:
    read = {policy.name: policy for policy in map(read_policy, policy_files(BUILT_IN))}
    assert set(read) == {"family-friendly", "profanity-monitor"}
    assert [rule.action for rule in read["family-friendly"].rules] == ["clamp", "rewind"]


# Sets.


def write(directory: Path, *policies: Policy) -> None:
    for each in policies:
        text = yaml.safe_dump(each.model_dump(mode="json", exclude_none=True))
        (directory / f"{each.name}-{each.version}.yaml").write_text(text)


def test_a_set_is_what_a_directory_holds(tmp_path, catalog) -> None:
    write(tmp_path, policy(CLAMP), policy(FLAG, name="watch"))
    (tmp_path / "notes.txt").write_text("not a policy")
    assert PolicySet.read(tmp_path, catalog.packs).policies == {
        "calm": policy(CLAMP),
        "watch": policy(FLAG, name="watch"),
    }
    assert PolicySet.read(tmp_path / "calm-1.yaml", catalog.packs).policies.keys() == {"calm"}
    with pytest.raises(AssetError, match="no policy file"):
        PolicySet.read(tmp_path / "elsewhere", catalog.packs)


@pytest.mark.parametrize(
    ("policies", "problems"),
    [
        ([policy(CLAMP | {"concept": "mud"})], ["rules[0].concept: got 'mud', expected a loaded concept: mood"]),
        ([policy(CLAMP, limits={"concepts": ["mud"]})], ["limits.concepts[0]: got 'mud', expected a loaded concept"]),
        ([policy(CLAMP, name="mood")], ["name: got 'mood', expected another: the concept pack"]),
        ([policy(CLAMP), policy(CLAMP, version="2")], ["calm-2.yaml:4: name: got 'calm', expected another: "]),
        ([policy(CLAMP | {"edit": {"op": "clamp"}})], ["rules[0].edit.value: got None, expected a finite number"]),
        ([policy(CLAMP | {"edit": {"op": "block", "value": 1}})], ["rules[0].edit.value: got 1.0, expected no value"]),
        ([policy(FLAG | {"threshold": 1e39})], ["rules[0].threshold: got 1e+39, expected a finite number"]),
        (
            [policy(CLAMP, CLAMP | {"edit": {"op": "block"}})],
            ["rules[1].edit: got 'concept mood: feature 1', expected a feature that rules[0] does not already edit"],
        ),
        (
            [policy(REWIND | {"rewind": {"edit": {"op": "add", "value": 3e38}, "retries": 2}})],
            ["rules[0].rewind.edit.value: got 3e+38, expected a number that float32 can hold 2 times"],
        ),
    ],
)
def test_a_set_that_does_not_fit_the_packs_is_refused(policies, problems, tmp_path, catalog) -> None:
    write(tmp_path, *policies, policy(FLAG, name="good"))
    with pytest.raises(PolicyError) as caught:
        PolicySet.read(tmp_path, catalog.packs)
    for problem in problems:
        assert problem in str(caught.value)


def test_a_calibrated_edit_needs_a_pack_that_has_one(tmp_path, catalog, make_pack) -> None:
    reading = make_pack(name="seen", policy={"op": "monitor"})
    for rule in (CLAMP, FLAG | {"edit": "calibrated"}, REWIND):
        write(tmp_path, policy(rule | {"concept": "seen"}))
        with pytest.raises(PolicyError, match="concept seen has no calibrated one"):
            PolicySet.read(tmp_path, {"seen": reading})


def test_every_wrong_file_is_told_at_once(tmp_path, catalog) -> None:
    (tmp_path / "a.yaml").write_text("- 1")
    (tmp_path / "b.yaml").write_text("[")
    with pytest.raises(PolicyError) as caught:
        PolicySet.read(tmp_path, catalog.packs)
    assert [Path(problem.split(":")[0]).name for problem in caught.value.problems] == ["a.yaml", "b.yaml"]


def test_changes_name_what_came_changed_and_went() -> None:
    def of(*policies: Policy) -> PolicySet:
        return PolicySet({each.name: each for each in policies})

    old = of(policy(CLAMP), policy(FLAG, name="gone"), policy(FLAG, name="same"))
    new = of(policy(FLAG, version="2"), policy(FLAG, name="new"), policy(FLAG, name="same"))
    changes = new.changes_since(old)
    assert str(changes) == "added new@1; changed calm@2; removed gone@1"
    assert not old.changes_since(old)
    with pytest.raises(PolicyError, match="calm@1: changed, expected another version"):
        of(policy(FLAG)).changes_since(old)


# Plans.


def lines(plan: Plan) -> list[tuple[str, str]]:
    return [(planned.source, planned.label) for planned in plan.interventions]


def test_a_policys_rules_are_bound_in_their_order(with_policies) -> None:
    rules = [
        CLAMP,
        {"action": "block", "threshold": 0.25, "phase": "generated"},
        {"action": "flag", "fail": "open"},
        {"action": "redact", "edit": None},
    ]
    plan = compile_plan(spec(guards=(guard(4),)), ("calm",), with_policies(policy(*rules)))
    source = "policy:calm@1"
    assert lines(plan) == [
        ("request", "guard: feature toy-sae/4 > 0.5"),
        (source, "concept mood: clamp always"),
        (source, "rule rule1: concept mood > 0.25"),
        (source, "rule rule2: concept mood > 0.5"),
        (source, "rule rule3: concept mood > 0.5"),
    ]
    assert [(g.source, g.place, g.label, g.action, g.fail_open, g.score) for g in plan.guards] == [
        ("request", 0, "guard: feature toy-sae/4 > 0.5", GuardAction.FLAG, False, 0),
        (source, 1, "rule1", GuardAction.BLOCK, False, 1),
        (source, 2, "rule2", GuardAction.FLAG, True, 2),
        (source, 3, "rule3", GuardAction.REDACT, False, 3),
    ]
    assert [(s.intervention, s.threshold, s.phase) for s in plan.scores] == [
        (0, 0.5, Phase.ALL), (2, 0.25, Phase.GENERATED), (3, 0.5, Phase.ALL), (4, 0.5, Phase.ALL)
    ]  # fmt: skip
    assert [planned.fail_open for planned in plan.interventions] == [False, False, False, True, False]
    assert all(part.stage is Stage.POLICY for part in plan.sites)
    assert (plan.policies, plan.redacts, plan.hold_back) == (("calm@1",), True, 1)


def test_an_explicit_edit_is_what_a_request_would_write(with_policies) -> None:
    edit = {"op": "clamp", "value": 2, "unit": "max_activation", "always": True}
    catalog = with_policies(policy(CLAMP | {"edit": edit, "phase": "generated"}))
    (part,) = compile_plan(spec(), ("calm",), catalog).sites
    assert part.op.tolist() == [OpCode.CLAMP_ALWAYS] * 2
    assert part.value.tolist() == [4.0, 8.0]
    assert compile_plan(spec(), ("calm",), catalog).interventions[0].phase is Phase.GENERATED


def test_a_rewind_makes_the_policys_own_edit_stronger(with_policies, sae) -> None:
    """x' = x + (1 + r) · Σ (f' − f) W_dec at the r-th retry, whatever the operation."""
    plan = compile_plan(spec(), ("calm",), with_policies(policy(CLAMP, REWIND)))
    assert [label for _, label in lines(plan)] == [
        "concept mood: clamp always",
        "rule rule1: concept mood > 0.5",
        "rewind: concept mood: clamp always",
    ]
    assert len(plan.levels) == 3
    for level, (part,) in enumerate(plan.levels):
        edits = part.op != OpCode.MONITOR
        assert set(part.intervention[edits].tolist()) == ({0} if level == 0 else {2})
        np.testing.assert_array_equal(part.value[edits], [-1, -2])
        np.testing.assert_allclose(part.rows.W_dec[part.row[edits]], (1 + level) * sae.W_dec[[1, 3]].numpy())
        np.testing.assert_allclose(part.rows.W_enc[part.row[edits]], sae.W_enc.T[[1, 3]].numpy())
        assert set(part.intervention[~edits].tolist()) == {1}
    assert plan.guards[0].rewind.otherwise is GuardAction.REDACT
    assert plan.hold_back == 3


def test_a_rewind_may_say_which_edit(with_policies) -> None:
    edit = {"op": "add", "value": -1.5}
    rule = {"action": "rewind", "rewind": {"retries": 2, "edit": edit}}
    plan = compile_plan(spec(feature(1, Op.ADD, 9.0)), ("calm",), with_policies(policy(CLAMP, rule)))
    values = [{part.stage: part.value[part.op == OpCode.ADD].tolist() for part in level} for level in plan.levels]
    assert values == [
        {Stage.REQUEST: [9.0], Stage.POLICY: []},
        {Stage.REQUEST: [9.0], Stage.POLICY: [-1.5, -1.5]},
        {Stage.REQUEST: [9.0], Stage.POLICY: [-3.0, -3.0]},
    ], "the request's edit stays, the policy's clamp goes"
    assert all((part.op != OpCode.CLAMP_ALWAYS).all() for level in plan.levels[1:] for part in level)


def test_the_same_edit_of_two_policies_is_made_once(with_policies) -> None:
    catalog = with_policies(policy(CLAMP, REWIND), policy(CLAMP, name="other"))
    plan = compile_plan(spec(), ("mood", "calm", "other"), catalog)
    assert lines(plan)[0] == ("policy:mood@2", "concept mood: clamp always")
    assert [label.startswith("concept") for _, label in lines(plan)].count(True) == 1
    assert plan.policies == ("mood@2", "calm@1", "other@1")
    edits = [part.intervention[part.op != OpCode.MONITOR].tolist() for (part,) in plan.levels]
    assert edits == [[0, 0], [2, 2], [2, 2]]


BLOCKING = policy(CLAMP | {"edit": {"op": "block"}}, name="blocking")


@pytest.mark.parametrize(
    ("policies", "asked", "field", "words"),
    [
        (("mood", "blocking"), spec(), "policies[1]", "policies[0] does not already edit"),
        (("calm", "again"), spec(), "policies[1]", "rule rule0 of policy:again@1"),
        (("calm", "again"), spec(), "policies[1]", "rule rule0 of policy:calm@1"),
        (
            ("calm",),
            spec(guards=(guard(rewind=rewind(feature(4))),)),
            "steering.guards[0].rewind",
            "here rule rule0 of policy:calm@1",
        ),
        (("blocking", "calm"), spec(), "policies[1]", "policy:blocking@1 does as well"),
        (("blocking",), spec(direction(site=LATE)), "steering.interventions[0].target", "policy:blocking@1 acts"),
        (("calm", "calm@1"), spec(), "policies[1]", "calm@1 is already named"),
        (("calm@2",), spec(), "policies[0]", "the loaded version, calm@1"),
        (("clam",), spec(), "policies[0]", "a loaded policy: again@1, blocking@1, calm@1"),
    ],
)
def test_what_does_not_go_together_is_refused_and_names_both(policies, asked, field, words, with_policies) -> None:
    catalog = with_policies(policy(REWIND), policy(REWIND, name="again"), BLOCKING, policy(FLAG, name="watch"))
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(asked, policies, catalog)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_requests_may_edit_behind_what_a_policy_only_reads(with_policies) -> None:
    """It has read already what they change: nothing is undone."""
    plan = compile_plan(spec(direction(site=LATE)), ("watch",), with_policies(policy(FLAG, name="watch")))
    assert [part.site for part in plan.sites] == [SITE, LATE]


@pytest.mark.parametrize(
    ("asked", "overridden"),
    [
        (concept(Op.ADD, 3.0), True),
        (concept(Op.MONITOR), False),
        (feature(3, Op.ADD, 1.0), True),
        (feature(3, Op.ADD, 1.0, phase=Phase.PROMPT), True),
        (feature(4, Op.ADD, 1.0), False),
        (direction(Op.ADD, 1.0), False),
    ],
)
def test_a_clash_is_no_error_and_the_receipt_can_say_who_wins(asked, overridden, with_policies) -> None:
    catalog = with_policies(policy(CLAMP))
    plan = compile_plan(spec(asked), ("calm",), catalog)
    assert plan.interventions[0].overridden_by == (("policy:calm@1",) if overridden else ())
    assert all(planned.overridden_by == () for planned in plan.interventions[1:])
    if asked.phase is Phase.ALL:
        generated = with_policies(policy(CLAMP | {"phase": "generated"}))
        plan = compile_plan(spec(replace(asked, phase=Phase.PROMPT)), ("calm",), generated)
        assert plan.interventions[0].overridden_by == (), "they never meet"


def test_plans_that_differ_in_who_guards_differ_in_hash(with_policies) -> None:
    one = with_policies(policy(FLAG))
    variants = [FLAG | {"fail": "open"}, FLAG | {"name": "other"}, FLAG | {"action": "redact"}, FLAG]
    hashes = {compile_plan(spec(), ("calm",), with_policies(policy(rule))).hash for rule in variants}
    hashes.add(compile_plan(spec(), ("calm",), with_policies(policy(FLAG, version="2"))).hash)
    assert len(hashes) == 5
    assert compile_plan(spec(), ("calm",), one).hash in hashes


# Limits.


def asking(*interventions: Intervention, guards: tuple[Guard, ...] = (), priority: int = 0, **rest) -> GenerateRequest:
    return GenerateRequest("r", "x", SamplingParams(**rest), SteeringSpec(interventions, guards), priority=priority)


IN_REWIND = guard(rewind=rewind(concept(Op.ADD, 1.0)))


@pytest.mark.parametrize(
    ("limits", "allowed", "refused", "field"),
    [
        ({"interventions": 1}, asking(feature(0)), asking(feature(0), feature(1)), "steering.interventions"),
        ({"interventions": 0}, asking(guards=(guard(),)), asking(guards=(IN_REWIND,)), "steering.interventions"),
        ({"ops": ["add"]}, asking(guards=(IN_REWIND,)), asking(feature(0)), "steering.interventions[0].op"),
        ({"concepts": ["mood"]}, asking(concept()), asking(concept(name="x")), "steering.interventions[0].target"),
        ({"concepts": ["mood"]}, asking(), asking(concept(), direction()), "steering.interventions[1].target"),
        (
            {"concepts": []},
            asking(guards=(guard(),)),
            asking(guards=(guard(), IN_REWIND)),
            "steering.guards[1].rewind.edits[0].target",
        ),
        ({"guards": 0}, asking(feature(0)), asking(guards=(guard(),)), "steering.guards"),
        ({"max_tokens": 9}, asking(max_tokens=9), asking(max_tokens=10), "sampling.max_tokens"),
        ({"n": 2}, asking(n=2), asking(n=3), "sampling.n"),
        ({"priority": [0, 5]}, asking(priority=5), asking(priority=-1), "priority"),
    ],
)
def test_limits_hold_for_each_policy_that_is_named(limits, allowed, refused, field, with_policies) -> None:
    catalog = with_policies(policy(FLAG, limits=limits), policy(FLAG, name="free"))
    named = find_policies(("free", "calm", "mood"), catalog)
    check_limits(allowed, named)
    check_limits(refused, find_policies(("free", "mood"), catalog))
    with pytest.raises(InvalidRequestError, match="policy calm@1") as caught:
        check_limits(refused, named)
    assert caught.value.field == field


# Words.


def test_a_policy_explains_itself(catalog) -> None:
    told = policy(
        CLAMP,
        REWIND | {"threshold": 2, "fail": "open", "phase": "generated"},
        FLAG | {"edit": {"op": "add", "value": -2, "unit": "max_activation"}},
        limits={"interventions": 2, "ops": ["add"], "concepts": ["mood"], "guards": 0, "n": 3, "priority": [0, 9]},
        description="be calm",
    )
    assert list(explain(told, catalog.packs)) == [
        "calm@1: be calm",
        "rule rule0, concept mood (mood@2)",
        "  edit: sets features to the pack's calibrated values where they are active or not "
        f"(2 at {SITE}), at every token",
        "  if it cannot be read or edited there: the response ends with an error",
        "rule rule1, concept mood (mood@2)",
        f"  read: the features at {SITE}, at every generated token",
        "  above 2 (this policy's threshold): the last 3 tokens are written again, up to 2 times; the edit is made "
        "stronger with each retry. After that, or in the prompt: the word is not shown",
        "  `steerserve policy test` shows what other thresholds would find in your texts",
        "  if it cannot be read or edited there: the response goes on",
        "rule rule2, concept mood (mood@2)",
        f"  edit: adds -2 times their recorded maximum to features (2 at {SITE}), at every token",
        f"  read: the features at {SITE}, at every token",
        "  above 0.5 (the card's threshold): the response says so",
        "  `steerserve policy test` shows what other thresholds would find in your texts",
        "  if it cannot be read or edited there: the response ends with an error",
        "requests under it",
        "  may make at most 2 interventions of their own (add alone) on the concepts mood alone; where both edit the "
        "same, the policy wins",
        "  may bring no guards of their own",
        "  may ask for at most 3 responses",
        "  may have a priority from 0 to 9",
    ]
