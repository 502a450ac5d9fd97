"""A pack that edits at several sites and reads its score by a probe at one of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from steering_specs import ONES, SITE, concept, direction, feature, gate, guard, rewind, spec

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.pack_files import load_pack, save_pack
from steerserve.steering.packs import DetectorCard, PackCard, PackTensors, SAERef
from steerserve.steering.plan import Stage
from steerserve.types import ConceptTarget, DirectionTarget, Op, Site, Stream, Unit

EARLY, BETWEEN, LATE = Site(0, Stream.MLP_OUT), Site(1, Stream.RESID_POST), Site(3, Stream.RESID_PRE)
PROBE = np.arange(8, dtype=np.float32)


@pytest.fixture
def tensors(make_tensors) -> PackTensors:
    """Rows, out of the order of the sites: features 1 and 3 at SITE, one direction at EARLY, the probe at SITE."""
    both = make_tensors((1, 3))
    plain = replace(
        both,
        W_enc=np.stack([ONES / np.sqrt(8), PROBE]).astype(np.float32),
        b_enc=np.array([0, -1.5], dtype=np.float32),
        threshold=np.full(2, -np.inf, dtype=np.float32),
        W_dec=np.stack([ONES / np.sqrt(8), 0 * PROBE]).astype(np.float32),
        max_activation=np.array([7, 9], dtype=np.float32),
        value=np.array([-3, 0], dtype=np.float32),
        feature_ids=np.array([-1, -1]),
    )
    joined = {
        name: np.concatenate([getattr(both, name)[:1], getattr(plain, name), getattr(both, name)[1:]])
        for name in vars(both)
    }
    joined["site"] = np.array([1, 0, 1, 1])
    joined["edited"] = np.array([True, True, False, True])
    joined["weight"] = np.array([0, 0, 1, 0], dtype=np.float32)
    return PackTensors(**joined)


@pytest.fixture
def wide_card(card: PackCard) -> PackCard:
    return card.model_copy(
        update={
            "name": "wide",
            "sites": [str(EARLY), str(SITE)],
            "detector": DetectorCard(
                kind="probe", site=str(SITE), threshold=0.5, auroc_features=0.75, auroc_probe=0.875
            ),
        }
    )


@pytest.fixture
def wide(catalog, wide_card, tensors, tmp_path) -> Catalog:
    return replace(catalog, packs={**catalog.packs, "wide": save_pack(wide_card, tensors, tmp_path / "wide")})


def test_it_survives_the_disk_site_by_site(wide, tmp_path) -> None:
    pack = load_pack(tmp_path / "wide")
    assert pack.sites == pack.edited_sites == (EARLY, SITE)
    assert pack.detector_site == SITE
    assert pack.at(EARLY).feature_ids.tolist() == [-1]
    assert pack.at(SITE).feature_ids.tolist() == [1, -1, 3]
    assert [row for _, row in pack.rows(SITE).keys] == [0, 2, 3]
    np.testing.assert_array_equal(pack.rows(SITE).W_enc[1], PROBE)
    assert pack.card.detector.auroc_probe == 0.875
    assert wide.sites == [EARLY, SITE]


def test_a_policy_becomes_one_edit_for_each_site(wide) -> None:
    plan = compile_plan(spec(), ("wide",), wide)
    assert [(i.label, i.site) for i in plan.interventions] == [
        (f"concept wide at {EARLY}: clamp always -3", EARLY),
        (f"concept wide at {SITE}: clamp always", SITE),
    ]
    early, late = plan.sites
    assert (early.stage, late.stage) == (Stage.POLICY, Stage.POLICY)
    assert (early.value.tolist(), late.value.tolist()) == ([-3], [-1, -2])
    assert late.rows.keys == tuple((f"pack:{wide.packs['wide'].sha256}", row) for row in (0, 3)), (
        "the probe is not edited"
    )
    np.testing.assert_allclose(early.segments[0].weight, [[1 / 7]])
    np.testing.assert_allclose(late.segments[0].weight, [[1 / 2, 1 / 4]])
    assert plan.policies == ("wide@2",)


def test_a_reading_reads_the_probe_alone(wide) -> None:
    watched = concept(Op.MONITOR, name="wide")
    plan = compile_plan(spec(watched, guards=(guard(watched.target, 0.25),)), (), wide)
    for part in plan.sites:
        assert part.site == SITE
        assert part.op.tolist() == [OpCode.MONITOR]
        np.testing.assert_array_equal(part.rows.W_enc, [PROBE])
        assert part.rows.b_enc.tolist() == [-1.5]
        assert part.segments[0].weight.tolist() == [[1]]
    assert plan.sites[1].value.tolist() == [1], "what feeds the guard is weight times f"
    assert [score.threshold for score in plan.scores] == [0.25]


def test_a_request_edits_every_site_in_the_rows_own_units(wide) -> None:
    plan = compile_plan(spec(concept(Op.ADD, 2.0, name="wide", unit=Unit.MAX_ACTIVATION)), (), wide)
    assert [(part.site, part.value.tolist()) for part in plan.sites] == [(EARLY, [14]), (SITE, [4, 8])]


def test_features_that_a_pack_edits_at_one_of_its_sites_count_as_edited(wide) -> None:
    for asked, where in [
        ((feature(3), concept(name="wide")), "steering.interventions[1].target"),
        ((concept(name="wide"), feature(3)), "steering.interventions[1].target"),
        ((concept(name="mood"), concept(name="wide")), "steering.interventions[1].target"),
    ]:
        with pytest.raises(InvalidRequestError) as caught:
            compile_plan(spec(*asked), (), wide)
        assert caught.value.field == where
    assert compile_plan(spec(feature(4), concept(name="wide")), (), wide).hash
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(spec(), ("mood", "wide"), wide)
    assert caught.value.field == "policies[1]"


@pytest.mark.parametrize("site", [BETWEEN, SITE, LATE], ids=str)
def test_no_edit_comes_behind_the_first_site_of_a_policy(site, wide) -> None:
    """Although the policy acts once more behind it: what it did first could still be undone."""
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(spec(direction(Op.ADD, 1.0, site=site)), ("wide",), wide)
    assert caught.value.field == "steering.interventions[0].target"
    assert f"not behind {EARLY}, where policy:wide@2 acts" in caught.value.expected


@pytest.mark.parametrize("site", [EARLY, Site(0, Stream.RESID_PRE)], ids=str)
def test_edits_at_or_before_its_first_site_are_fine(site, wide) -> None:
    plan = compile_plan(spec(direction(Op.ADD, 1.0, site=site)), ("wide",), wide)
    assert [i.source for i in plan.interventions] == ["request", "policy:wide@2", "policy:wide@2"]


def test_an_edit_of_a_concept_is_refused_if_one_of_its_sites_is_behind_a_policy(
    wide, wide_card, tensors, tmp_path
) -> None:
    """``wide`` edits at EARLY, which is fine, and behind it at SITE."""
    first = tensors.take(np.array([1]))
    first = replace(first, site=np.zeros(1, np.int64), weight=np.ones(1, np.float32), W_enc=PROBE[None])
    at_once = wide_card.model_copy(
        update={
            "name": "first",
            "sites": [str(EARLY)],
            "saes": {},
            "detector": DetectorCard(kind="probe", site=str(EARLY), threshold=0.0),
        }
    )
    both = replace(wide, packs={**wide.packs, "first": save_pack(at_once, first, tmp_path / "first")})
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(spec(concept(name="wide")), ("first",), both)
    assert caught.value.field == "steering.interventions[0].target"
    assert repr(str(SITE)) in str(caught.value)
    assert compile_plan(spec(concept(name="first")), ("wide",), both).hash, "none of its sites is behind"


def test_a_gate_must_be_read_before_the_first_edit(wide) -> None:
    late = concept(name="wide", gate=gate(ConceptTarget("wide")))
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(spec(late), (), wide)
    assert caught.value.field == "steering.interventions[0].gate.target"
    early = concept(name="wide", gate=gate(DirectionTarget(EARLY, ONES)))
    plan = compile_plan(spec(early), (), wide)
    assert plan.interventions[2].label == f"gate of interventions[0]: direction at {EARLY} > 0.5"
    assert [part.score_index.tolist() for part in plan.sites] == [[0, 0], [0, 0]], "one score gates both sites"


def test_a_rewind_edits_every_site(wide) -> None:
    again = rewind(concept(Op.ADD, -1.0, name="wide"), max_retries=2)
    plan = compile_plan(spec(guards=(guard(ConceptTarget("wide"), rewind=again),)), (), wide)
    strength = [[part.value[part.op == OpCode.ADD].tolist() for part in level] for level in plan.levels]
    assert strength == [[[]], [[-1], [-1, -1], []], [[-2], [-2, -2], []]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight": np.array([0, 1, 1, 0], np.float32)}, "weight: expected 0 at every site but the detector's"),
        ({"site": np.array([1, 1, 1, 1])}, "site: names .1., expected each of the 2"),
        ({"site": np.array([1, 2, 1, 1])}, "site: names .1, 2."),
        ({"feature_ids": np.array([1, 2, -1, 3])}, f"features of an SAE at {EARLY}"),
        ({"feature_ids": np.array([3, -1, -1, 3])}, f"twice at {SITE}"),
    ],
)
def test_sites_that_do_not_fit_the_card_are_refused(change, complaint, wide_card, tensors, tmp_path) -> None:
    with pytest.raises(AssetError, match=complaint):
        save_pack(wide_card, replace(tensors, **change), tmp_path / "p")


def test_one_index_of_two_saes_is_two_features(wide, wide_card, tensors, tmp_path) -> None:
    saes = {**wide_card.saes, str(EARLY): SAERef(name="other", sha256="b" * 64)}
    named = replace(tensors, feature_ids=np.array([1, 3, -1, 3]))
    pack = save_pack(wide_card.model_copy(update={"saes": saes}), named, tmp_path / "p")
    both = replace(wide, packs={"wide": pack})
    assert len(compile_plan(spec(feature(4), concept(name="wide")), (), both).interventions) == 3
