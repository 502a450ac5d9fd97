"""Names become arrays, and everything wrong with a spec is refused at the path of its field."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from steering_specs import ONES, concept, direction, feature, spec

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.compiler import compile_plan
from steerserve.steering.packs import PolicyAction
from steerserve.steering.plan import Stage
from steerserve.types import FeatureTarget, Op, Phase, Site, Stream, Unit

SIGNS = np.array([0.0, -1.0, 3.0, 0.0, 0.5, -0.0, 2.0, -7.0], dtype=np.float32)


def test_nothing_asked_gives_the_empty_plan(catalog) -> None:
    plan = compile_plan(spec(), (), catalog)
    assert (plan.interventions, plan.levels, plan.policies, plan.packs, plan.hash) == ((), ((),), (), {}, "")
    assert (plan.scores, plan.guards, plan.hold_back) == ((), (), 0)


@pytest.mark.parametrize(
    ("intervention", "codes", "values"),
    [
        (feature(1, Op.CLAMP, 5.0), [OpCode.CLAMP], [5]),
        (feature(1, Op.CLAMP, 5.0, always=True), [OpCode.CLAMP_ALWAYS], [5]),
        (feature(1, Op.CLAMP, 0.5, unit=Unit.MAX_ACTIVATION), [OpCode.CLAMP], [1]),
        (feature(1, Op.CLIP, 5.0), [OpCode.CLIP], [5]),
        (feature(1, Op.ADD, -5.0), [OpCode.ADD], [-5]),
        (feature(1, Op.SCALE, 0.5), [OpCode.SCALE], [0.5]),
        (feature(1, Op.BLOCK), [OpCode.SCALE], [0]),
        (feature(1, Op.MONITOR), [OpCode.MONITOR], [0]),
        (concept(Op.CLAMP, 5.0), [OpCode.CLAMP] * 2, [5, 5]),
        (concept(Op.ADD, 2.0, unit=Unit.MAX_ACTIVATION), [OpCode.ADD] * 2, [4, 8]),
        (direction(Op.ADD, 2.0), [OpCode.ADD], [2]),
        (direction(Op.CLIP, 2.0), [OpCode.CLIP], [2]),
    ],
)
def test_ops_and_values(intervention, codes, values, catalog) -> None:
    (part,) = compile_plan(spec(intervention), (), catalog).sites
    assert part.op.tolist() == codes
    assert part.value.tolist() == values
    assert part.score_index.tolist() == [-1] * len(codes)
    dtypes = (part.op.dtype, part.value.dtype, part.row.dtype, part.score_index.dtype)
    assert dtypes == (np.uint8, np.float32, np.int32, np.int32)


def test_feature_rows_have_the_bias_folded_in(catalog, sae) -> None:
    (part,) = compile_plan(spec(feature(4)), (), catalog).sites
    np.testing.assert_array_equal(part.rows.W_enc[0], sae.W_enc[:, 4])
    np.testing.assert_array_equal(part.rows.W_dec[0], sae.W_dec[4])
    np.testing.assert_allclose(part.rows.b_enc[0], sae.b_enc[4] - sae.b_dec @ sae.W_enc[:, 4], rtol=1e-5)
    assert part.rows.threshold[0] == sae.threshold[4]


@pytest.mark.parametrize("length", [1.0, 1e-30, 1e30])
def test_only_the_direction_of_a_vector_counts(length, catalog) -> None:
    (part,) = compile_plan(spec(direction(vector=length * ONES)), (), catalog).sites
    np.testing.assert_allclose(part.rows.W_enc[0], ONES / np.sqrt(8), rtol=1e-6)
    assert part.rows.threshold[0] == -np.inf


def test_a_policy_runs_the_calibrated_action_after_the_request(catalog) -> None:
    plan = compile_plan(spec(feature(1, Op.ADD, 3.0, phase=Phase.GENERATED)), ("mood@2",), catalog)
    request, policy = plan.interventions
    assert (request.source, request.label, request.phase) == ("request", "feature toy-sae/1: add 3", Phase.GENERATED)
    assert (policy.source, policy.label, policy.phase) == ("policy:mood@2", "concept mood: clamp always", Phase.ALL)
    assert [part.stage for part in plan.sites] == [Stage.REQUEST, Stage.POLICY]
    assert plan.sites[1].op.tolist() == [OpCode.CLAMP_ALWAYS] * 2
    assert plan.sites[1].value.tolist() == [-1, -2]
    assert plan.sites[1].intervention.tolist() == [1, 1]
    assert plan.sites[1].segments[0].weight.tolist() == [[0.5, 0.25]]
    assert plan.policies == ("mood@2",)
    assert plan.packs == {"mood@2": catalog.packs["mood"].sha256}


@pytest.mark.parametrize(("op", "code"), [(Op.BLOCK, OpCode.SCALE), (Op.MONITOR, OpCode.MONITOR)])
def test_a_policy_whose_op_takes_no_value_ignores_the_packs(op, code, catalog, make_pack) -> None:
    plain = replace(catalog, packs={"mood": make_pack(policy=PolicyAction(op=op))})
    (part,) = compile_plan(spec(), ("mood",), plain).sites
    assert (part.op.tolist(), part.value.tolist()) == ([code] * 2, [0, 0])


def test_a_policys_clip_leaves_inactive_features_alone(catalog, make_pack) -> None:
    """Where a feature reads 0, the kernel's clip would push it down to a cap below 0; a request may ask for that."""
    pack = make_pack(policy=PolicyAction(op=Op.CLIP))
    tensors = replace(pack.tensors, value=np.array([-1, 2], np.float32))
    plain = replace(catalog, packs={"mood": replace(pack, tensors=tensors)})
    (part,) = compile_plan(spec(), ("mood",), plain).sites
    assert part.op.tolist() == [OpCode.CLAMP, OpCode.CLIP]
    direction_row = replace(tensors, threshold=np.array([-np.inf, 0.1], np.float32))
    (part,) = compile_plan(
        spec(), ("mood",), replace(plain, packs={"mood": replace(pack, tensors=direction_row)})
    ).sites
    assert part.op.tolist() == [OpCode.CLIP, OpCode.CLIP], "a direction is active everywhere"
    (part,) = compile_plan(spec(concept(Op.CLIP, -1.0)), (), plain).sites
    assert part.op.tolist() == [OpCode.CLIP, OpCode.CLIP]


def test_gram_gives_the_length_of_an_edit(catalog, sae) -> None:
    (part,) = compile_plan(spec(feature(2), concept(), feature(5)), (), catalog).sites
    single, pair = part.segments
    assert (single.intervention.tolist(), pair.intervention.tolist()) == ([0, 2], [1])
    assert (single.entries.tolist(), pair.entries.tolist()) == ([[0, 3]], [[1], [2]])
    W_dec = sae.W_dec.double().numpy()
    np.testing.assert_allclose(single.gram[:, 0, 0], (W_dec[[2, 5]] ** 2).sum(axis=1))
    edit = np.array([0.5, -2.0])
    moved = edit @ W_dec[[1, 3]]
    assert edit @ pair.gram[0] @ edit == pytest.approx(moved @ moved)


def test_interventions_at_several_sites_are_grouped_in_model_order(catalog) -> None:
    early = direction(Op.ADD, 1.0, site=Site(0, Stream.MLP_OUT))
    plan = compile_plan(spec(feature(1), early, feature(4)), (), catalog)
    assert [part.site.layer for part in plan.sites] == [0, 2]
    assert plan.sites[1].intervention.tolist() == [0, 2]


def test_a_feature_may_be_edited_once_and_monitored_beside(catalog) -> None:
    plan = compile_plan(spec(feature(1, Op.BLOCK), feature(1, Op.MONITOR), feature(1, Op.MONITOR)), (), catalog)
    (part,) = plan.sites
    assert len(part.rows) == 1
    assert part.row.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("interventions", "error", "field", "expected"),
    [
        ([feature(1), replace(feature(1), target=FeatureTarget("toy", 1))], InvalidRequestError,
         "steering.interventions[1].target.sae", "toy-sae"),
        ([feature(6)], InvalidRequestError, "steering.interventions[0].target.feature", "from 0 to 5"),
        ([feature(-1)], InvalidRequestError, "steering.interventions[0].target.feature", "from 0 to 5"),
        ([concept(name="modo")], InvalidRequestError, "steering.interventions[0].target.concept", "mood"),
        ([direction(site=Site(4, Stream.RESID_POST))], IncompatibleError,
         "steering.interventions[0].target.site", "from 0 to 3"),
        ([direction(vector=ONES[:7])], IncompatibleError, "steering.interventions[0].target.vector", "[8]"),
        ([direction(vector=ONES[None])], IncompatibleError, "steering.interventions[0].target.vector", "[8]"),
        ([direction(vector=ONES * np.nan)], InvalidRequestError, "steering.interventions[0].target.vector", "finite"),
        ([direction(vector=ONES * np.inf)], InvalidRequestError, "steering.interventions[0].target.vector", "finite"),
        ([direction(vector=ONES * 0)], InvalidRequestError, "steering.interventions[0].target.vector", "direction"),
        ([feature(1, Op.ADD, float("nan"))], InvalidRequestError, "steering.interventions[0].value", "finite"),
        ([feature(1, Op.ADD, float("-inf"))], InvalidRequestError, "steering.interventions[0].value", "finite"),
        ([feature(1, Op.ADD, 1e39)], InvalidRequestError, "steering.interventions[0].value", "float32"),
        ([feature(1, Op.CLAMP)], InvalidRequestError, "steering.interventions[0].value", "clamp needs one"),
        ([concept(Op.SCALE)], InvalidRequestError, "steering.interventions[0].value", "scale needs one"),
        ([feature(1, Op.BLOCK, 0.0)], InvalidRequestError, "steering.interventions[0].value", "block takes none"),
        ([feature(1, Op.MONITOR, 1.0)], InvalidRequestError, "steering.interventions[0].value", "monitor takes none"),
        ([direction(Op.ADD, 1.0, unit=Unit.MAX_ACTIVATION)], InvalidRequestError,
         "steering.interventions[0].unit", "no recorded maximum"),
        ([feature(5, Op.ADD, 1.0, unit=Unit.MAX_ACTIVATION)], InvalidRequestError,
         "steering.interventions[0].unit", "no recorded maximum"),
        ([feature(1, Op.SCALE, 1.0, unit=Unit.MAX_ACTIVATION)], InvalidRequestError,
         "steering.interventions[0].unit", "raw"),
        ([feature(1, Op.ADD, 1.0, always=True)], InvalidRequestError, "steering.interventions[0].always", "clamp"),
        ([direction(Op.CLAMP, 1.0)], InvalidRequestError, "steering.interventions[0].op", "add, clip, block"),
        ([feature(1), feature(2), feature(1, Op.ADD, 1.0)], InvalidRequestError,
         "steering.interventions[2].target", "steering.interventions[0]"),
        ([feature(3), concept()], InvalidRequestError, "steering.interventions[1].target", "steering.interventions[0]"),
        ([direction(), direction(Op.ADD, 1.0, vector=3 * ONES)], InvalidRequestError,
         "steering.interventions[1].target", "steering.interventions[0]"),
        ([direction(vector=SIGNS), direction(Op.ADD, 1.0, vector=np.where(SIGNS == 0, 0, -2 * SIGNS))],
         InvalidRequestError, "steering.interventions[1].target", "steering.interventions[0]"),
    ],
)  # fmt: skip
def test_wrong_interventions_are_refused_by_field(interventions, error, field, expected, catalog) -> None:
    with pytest.raises(error) as caught:
        compile_plan(spec(*interventions), (), catalog)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert expected in caught.value.expected


@pytest.mark.parametrize("sign", [1, -1])
def test_values_reach_to_the_last_number_that_float32_holds(sign, catalog) -> None:
    largest = float(np.finfo(np.float32).max)
    halfway = largest + 2.0**103  # rounds to even, which is infinity
    (part,) = compile_plan(spec(feature(1, Op.ADD, sign * np.nextafter(halfway, 0))), (), catalog).sites
    assert part.value.tolist() == [sign * largest]
    with pytest.raises(InvalidRequestError, match="float32"):
        compile_plan(spec(feature(1, Op.ADD, sign * halfway)), (), catalog)


def test_rows_of_several_sources_at_one_site_keep_to_their_entries(catalog, sae) -> None:
    asked = [feature(4), direction(Op.ADD, 1.0), feature(2, Op.MONITOR), concept(), feature(4, Op.MONITOR)]
    (part,) = compile_plan(spec(*asked), (), catalog).sites
    unit = ONES / np.sqrt(8)
    expected = np.stack([sae.W_dec[4], unit, *sae.W_dec[[2, 1, 3, 4]]])
    assert len(part.rows) == 5
    np.testing.assert_allclose(part.rows.W_dec[part.row], expected, rtol=1e-6)
    assert part.rows.threshold[part.row[1]] == -np.inf


@pytest.mark.parametrize(
    ("policies", "field", "expected"),
    [
        (("mood", "anger"), "policies[1]", "mood@2"),
        (("mood@1",), "policies[0]", "mood@2"),
        (("mood@",), "policies[0]", "mood@2"),
        (("mood", "mood@2"), "policies[1]", "already named"),
    ],
)
def test_wrong_policies_are_refused_by_field(policies, field, expected, catalog) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(spec(), policies, catalog)
    assert caught.value.field == field
    assert expected in caught.value.expected


def test_policies_that_edit_one_feature_are_refused(catalog, make_pack) -> None:
    other = make_pack(features=(3, 4), name="other")
    both = replace(catalog, packs={**catalog.packs, "other": other})
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(spec(), ("mood", "other"), both)
    assert caught.value.field == "policies[1]"
    # A request may touch what a policy edits: the stages have an order.
    assert compile_plan(spec(feature(3)), ("mood",), catalog).hash


BEHIND = [Site(3, Stream.RESID_PRE), Site(3, Stream.MLP_OUT), Site(3, Stream.RESID_POST)]
BEFORE = [Site(0, Stream.RESID_POST), Site(2, Stream.RESID_PRE), Site(2, Stream.ATTN_OUT)]


@pytest.mark.parametrize("site", BEHIND, ids=str)
def test_an_edit_behind_a_policy_is_refused(site, catalog) -> None:
    late = spec(feature(1, Op.MONITOR), direction(Op.ADD, 1.0, site=site))
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(late, ("mood",), catalog)
    assert caught.value.field == "steering.interventions[1].target"
    assert "policy:mood@2" in caught.value.expected
    assert compile_plan(late, (), catalog).interventions, "without the policy it is fine"
    reading = spec(direction(Op.MONITOR, site=site))
    assert compile_plan(reading, ("mood",), catalog).interventions, "reading is always fine"


@pytest.mark.parametrize("site", BEFORE, ids=str)
def test_an_edit_before_a_policy_is_fine(site, catalog) -> None:
    assert compile_plan(spec(direction(Op.ADD, 1.0, site=site)), ("mood",), catalog).policies == ("mood@2",)


def test_features_without_recorded_maxima_refuse_relative_values(catalog, sae) -> None:
    bare = replace(catalog, saes={"toy-sae": replace(sae, max_activation=None)})
    with pytest.raises(InvalidRequestError, match="no recorded maximum"):
        compile_plan(spec(feature(1, Op.ADD, 1.0, unit=Unit.MAX_ACTIVATION)), (), bare)


def test_a_feature_that_never_fired_refuses_relative_values(catalog, sae) -> None:
    never = replace(sae, max_activation=sae.max_activation * 0)
    with pytest.raises(InvalidRequestError, match="no recorded maximum"):
        compile_plan(
            spec(feature(1, Op.ADD, 1.0, unit=Unit.MAX_ACTIVATION)), (), replace(catalog, saes={"toy-sae": never})
        )


def test_long_lists_of_names_are_cut_to_the_nearest(catalog, make_pack) -> None:
    pack = catalog.packs["mood"]
    many = replace(catalog, packs={f"concept-{i}": pack for i in range(20)})
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(spec(concept(name="concept-1x")), (), many)
    assert "concept-1," in caught.value.expected
    assert caught.value.expected.count("concept-") == 8
