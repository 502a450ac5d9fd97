"""What attention heads come to in a plan, in requests and in policy files, and what is refused by which field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from steering_specs import concept, direction, gate, guard, rewind, spec

from steerserve.errors import IncompatibleError, InvalidRequestError, PolicyError
from steerserve.steering.compiler import compile_plan
from steerserve.steering.plan import FeatureRows
from steerserve.steering.policies import Policy, parse_policy
from steerserve.steering.policy_set import PolicySet
from steerserve.steering.policy_words import explain
from steerserve.steering.targets import resolve_read
from steerserve.types import DirectionTarget, HeadTarget, Intervention, Op, Phase, Site, Stream, Unit

Z = Site(1, Stream.ATTN_Z)
D_HEAD, N_HEADS, D_MODEL = 4, 3, 8
OWN, RESIDUAL, WHOLE = (np.ones(width, dtype=np.float32) for width in (D_HEAD, D_MODEL, N_HEADS * D_HEAD))


def head(layer: int = 1, index: int = 2, op: Op = Op.SCALE, value: float | None = 0.5, **rest: object) -> Intervention:
    return Intervention(HeadTarget(layer, index), op, value, **rest)


def along(vector: np.ndarray, index: int | None = 2, op: Op = Op.MONITOR, value: float | None = None) -> Intervention:
    return Intervention(DirectionTarget(Z, vector, index), op, value)


def test_a_head_is_a_row_for_each_value_of_its_output(catalog) -> None:
    plan = compile_plan(spec(head(), head(index=0, value=2.0)), (), catalog)
    (part,) = plan.sites
    assert part.site == Z
    assert part.rows.W_enc.shape == (2 * D_HEAD, N_HEADS * D_HEAD)
    places = part.rows.W_enc[part.row].argmax(axis=1)
    assert places.tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert np.array_equal(part.rows.W_enc, part.rows.W_dec)
    assert part.value.tolist() == [0.5] * 4 + [2.0] * 4
    assert [planned.label for planned in plan.interventions] == ["head L1H2: scale 0.5", "head L1H0: scale 2"]


@pytest.mark.parametrize("seed", range(20))
def test_an_edit_of_what_a_head_writes_has_that_effect_and_is_the_shortest(seed, catalog) -> None:
    rng = np.random.default_rng(seed)
    index = int(rng.integers(N_HEADS))
    vector = (rng.choice([1e-3, 1.0, 1e3]) * rng.standard_normal(D_MODEL)).astype(np.float32)
    rows = resolve_read(along(vector, index).target, "target", catalog).source
    assert isinstance(rows, FeatureRows)
    own = slice(index * D_HEAD, (index + 1) * D_HEAD)
    unit = vector / np.linalg.norm(vector.astype(np.float64))
    writes = catalog.model.head_writes(Z.layer, index).astype(np.float64) @ unit
    z = rng.standard_normal(N_HEADS * D_HEAD)
    assert z @ rows.W_enc[0] == pytest.approx(z[own] @ writes, abs=1e-5)
    step = rows.W_dec[0].astype(np.float64)
    assert step[own] @ writes == pytest.approx(1.0, rel=1e-5)
    assert np.linalg.norm(step) == pytest.approx(1 / np.linalg.norm(writes), rel=1e-5)
    assert not np.delete(step, np.r_[own]).any()


FIRST = "steering.interventions[0]"


@pytest.mark.parametrize(
    ("interventions", "error", "field", "expected"),
    [
        ([head(layer=4)], IncompatibleError, f"{FIRST}.target.layer", "a layer from 0 to 3"),
        ([head(index=3)], IncompatibleError, f"{FIRST}.target.head", "a head from 0 to 2"),
        ([head(index=-1)], IncompatibleError, f"{FIRST}.target.head", "a head from 0 to 2"),
        ([head(op=Op.ADD)], InvalidRequestError, f"{FIRST}.op", "scale or block"),
        ([head(op=Op.CLAMP)], InvalidRequestError, f"{FIRST}.op", "scale or block"),
        ([head(op=Op.MONITOR, value=None)], InvalidRequestError, f"{FIRST}.op", "a direction of it has"),
        ([head(value=None)], InvalidRequestError, f"{FIRST}.value", "scale needs one"),
        ([head(value=float("nan"))], InvalidRequestError, f"{FIRST}.value", "finite"),
        ([head(unit=Unit.MAX_ACTIVATION)], InvalidRequestError, f"{FIRST}.unit", "scale takes no activation"),
        ([head(), head(value=2.0)], InvalidRequestError, "steering.interventions[1].target", FIRST),
        ([concept(gate=gate(HeadTarget(1, 2)))], InvalidRequestError, f"{FIRST}.gate.target", "has no score"),
        ([along(OWN[:3])], IncompatibleError, f"{FIRST}.target.vector", "[8], of the residual stream or [4], of the"),
        ([along(WHOLE)], IncompatibleError, f"{FIRST}.target.vector", "[4], of the output of L1H2"),
        ([along(OWN, None)], IncompatibleError, f"{FIRST}.target.vector", "[12], the width of blocks.1.attn.hook_z"),
        ([along(OWN, 3)], IncompatibleError, f"{FIRST}.target.head", "a head from 0 to 2"),
        ([along(0 * RESIDUAL)], InvalidRequestError, f"{FIRST}.target.vector", "a vector with a direction"),
        ([Intervention(DirectionTarget(Site(1, Stream.ATTN_OUT), RESIDUAL, 0), Op.MONITOR)], InvalidRequestError,
         f"{FIRST}.target.head", "blocks.1.hook_attn_out has no heads, blocks.1.attn.hook_z has"),
        ([along(OWN, 2, Op.BLOCK), along(np.r_[0 * RESIDUAL, OWN], None, Op.ADD, 1.0)], InvalidRequestError,
         "steering.interventions[1].target", FIRST),
        ([along(RESIDUAL, 2, Op.BLOCK), along(-2 * RESIDUAL, 2, Op.ADD, 1.0)], InvalidRequestError,
         "steering.interventions[1].target", FIRST),
    ],
)  # fmt: skip
def test_wrong_heads_are_refused_by_field(interventions, error, field, expected, catalog) -> None:
    with pytest.raises(error) as caught:
        compile_plan(spec(*interventions), (), catalog)
    assert (type(caught.value), caught.value.field) == (error, field)
    assert expected in caught.value.expected


def test_a_head_that_does_not_write_to_a_direction_is_not_read_along_it(catalog, monkeypatch) -> None:
    monkeypatch.setattr(type(catalog.model), "head_writes", lambda *_: np.zeros((D_HEAD, D_MODEL), dtype=np.float32))
    with pytest.raises(InvalidRequestError, match=r"target.vector: .*expected a direction that head L1H2 writes to"):
        compile_plan(spec(along(RESIDUAL)), (), catalog)


def test_heads_gate_and_guard_through_their_directions(catalog) -> None:
    read = along(RESIDUAL).target
    again = rewind(head(op=Op.BLOCK, value=None))
    plan = compile_plan(spec(direction(gate=gate(read)), guards=(guard(read, rewind=again),)), (), catalog)
    assert [planned.label for planned in plan.interventions] == [
        "direction at blocks.2.hook_resid_post: block",
        "gate of interventions[0]: direction that head L1H2 writes to > 0.5",
        "guard: direction that head L1H2 writes to > 0.5",
        "rewind: head L1H2: block",
    ]


# Policies.


def policy(*rules: dict[str, object]) -> Policy:
    content = {"format": "steerserve.policy/1", "name": "quiet", "version": "1", "rules": list(rules)}
    return parse_policy(yaml.safe_dump(content).encode(), "quiet.yaml")


SCALE = {"op": "scale", "value": 0.5, "heads": ["L1H2", "L0H0"]}
QUIET = {"action": "clamp", "edit": SCALE}


def test_a_policy_edits_heads_without_a_concept(catalog) -> None:
    quiet = policy(QUIET | {"phase": "generated"})
    plan = compile_plan(spec(), ("quiet",), replace(catalog, policy_files={"quiet": quiet}))
    assert [(each.source, each.label, each.phase) for each in plan.interventions] == [
        ("policy:quiet@1", "head L1H2: scale 0.5", Phase.GENERATED),
        ("policy:quiet@1", "head L0H0: scale 0.5", Phase.GENERATED),
    ]
    assert (quiet.concepts, quiet.rules[0].label, plan.packs) == ((), "L1H2, L0H0", {})


def test_a_rewind_without_an_edit_of_its_own_makes_that_of_heads_stronger(catalog) -> None:
    rule = {"concept": "mood", "action": "rewind", "edit": SCALE, "rewind": {"retries": 2}}
    plan = compile_plan(spec(), ("quiet",), replace(catalog, policy_files={"quiet": policy(rule)}))
    written = [[part.rows.W_dec.max() for part in level if part.site == Z] for level in plan.levels]
    assert written == [[1.0], [2.0], [3.0]], "z' = z + (1 + r) · (0.5 z − z)"


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"action": "clamp"}, "concept: missing, expected a loaded one, or a clamp with an edit of heads"),
        ({"action": "flag", "edit": SCALE}, "concept: missing"),
        ({"action": "clamp", "edit": SCALE | {"heads": []}}, "rules[0].edit.heads: got []"),
        (
            {"action": "clamp", "edit": SCALE | {"heads": ["a1.h2"]}},
            "heads[0]: got 'a1.h2', expected 'L<layer>H<head>'",
        ),
        ({"action": "clamp", "edit": SCALE | {"heads": ["L1H2", "L1H2"]}}, "heads: expected each head once"),
        (
            {"action": "clamp", "edit": {"op": "add", "value": 1.0, "heads": ["L1H2"]}},
            "rules[0].edit.op: got 'add', expected scale or block",
        ),
        ({"action": "clamp", "edit": {"op": "scale", "heads": ["L1H2"]}}, "rules[0].edit.value: got None"),
        ({"action": "clamp", "edit": SCALE | {"heads": ["L1H3"]}}, "edit.heads[0].head: got 'L1H3', expected a head"),
        ({"action": "clamp", "edit": SCALE | {"heads": ["L0H0", "L4H0"]}}, "edit.heads[1].layer: got 'blocks.4"),
    ],
)
def test_policies_with_wrong_heads_are_refused_by_field(rule, problem, tmp_path: Path, catalog) -> None:
    content = {"format": "steerserve.policy/1", "name": "quiet", "version": "1", "rules": [rule]}
    (tmp_path / "quiet.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(PolicyError) as caught:
        PolicySet.read(tmp_path, catalog.packs, catalog.model)
    assert problem in str(caught.value)


def test_without_a_model_nobody_can_say_that_it_lacks_a_head(tmp_path: Path, catalog) -> None:
    (tmp_path / "quiet.yaml").write_text(policy(QUIET | {"edit": SCALE | {"heads": ["L99H0"]}}).model_dump_json())
    assert set(PolicySet.read(tmp_path, catalog.packs).policies) == {"quiet"}
    with pytest.raises(PolicyError, match="a layer from 0 to 3"):
        PolicySet.read(tmp_path, catalog.packs, catalog.model)


def test_a_policy_of_heads_explains_itself(catalog) -> None:
    told = policy(
        QUIET, {"action": "clamp", "name": "mute", "edit": {"op": "block", "heads": ["L2H1"]}, "fail": "open"}
    )
    assert list(explain(told, catalog.packs))[1:7] == [
        "attention heads",
        "  edit: multiplies what heads put out by 0.5 (L1H2, L0H0), at every token",
        "  if it cannot be read or edited there: the response ends with an error",
        "rule mute, attention heads",
        "  edit: silences heads (L2H1), at every token",
        "  if it cannot be read or edited there: the response goes on",
    ]
