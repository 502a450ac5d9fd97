"""Packs of a tiny model, end to end: what is written, what is refused, and that the same comes out twice."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.kernels.steer_delta import OpCode, edit_of
from steerserve.lab.activations import MASSIVE_NORM_RATIO, activations_of, ordinary_rows
from steerserve.lab.concept_build.build import BuildConfig, build_from_direction, build_from_features
from steerserve.lab.concept_build.concept import Concept
from steerserve.lab.concept_build.detectors import Detector
from steerserve.lab.concept_build.draft import PackDraft
from steerserve.lab.concept_build.fitting import FitConfig
from steerserve.lab.concept_build.selection import SelectionConfig
from steerserve.lab.concept_build.shortlists import read_shortlists
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_build.strength import Budget
from steerserve.lab.concept_eval.judges import Judge
from steerserve.lab.concept_eval.texts import Labels
from steerserve.lab.concept_eval.trial import Direction
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.pack_files import load_pack
from steerserve.types import ConceptTarget, Guard, GuardAction, Op, Site, SteeringSpec

EARLY, LATE = Site.parse("blocks.0.hook_resid_post"), Site.parse("blocks.1.hook_resid_post")
CONFIG = BuildConfig(
    SelectionConfig(num_features=6, num_candidates=24, num_detector_features=8, num_proof_contexts=2, max_texts=60),
    FitConfig(steps=4, batch_size=4),
    suppressing=(2.0, 0.0),
    amplifying=(4.0, 1.0),
    directions=2,
    on_policy_prompts=4,
    validation_prompts=2,
    validation_seeds=1,
)
GENEROUS = Budget(kl=100.0, perplexity_ratio=None)
SHORT = Judge("one letter", lambda texts: np.array([any(letter in text for letter in "aeo") for text in texts]))
"""A random model writes letters enough."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of labelled texts: those of ``dog`` hold ``duck``."""
    rng = random.Random(0)
    words = ["river", "stone", "cloud", "small", "green", "walks"]
    path = tmp_path_factory.mktemp("texts") / "labelled.jsonl"
    with path.open("w") as file:
        for number in range(600):
            chosen = rng.choices(words, k=5)
            if number % 2:
                chosen.insert(rng.randrange(5), "duck")
            label = "dog" if number % 2 else "other"
            file.write(json.dumps({"text": f"{' '.join(chosen)} {number}", "label": label}) + "\n")
    return path


@pytest.fixture
def concept(texts: Path) -> Concept:
    labels = Labels(frozenset({"dog"}), frozenset({"other"}))
    return Concept("duck", Direction.SUPPRESS, [texts], [texts], GENEROUS, labels, judge=SHORT)


@pytest.fixture
def saes(random_sae: SAE) -> list[SAE]:
    """Given out of order."""
    return [random_sae, replace(random_sae, name="early", site=EARLY, sha256="b" * 64)]


def test_a_pack_of_several_sites_is_built_and_served(
    tiny: LoadedModel, saes: list[SAE], concept: Concept, tmp_path: Path
) -> None:
    console = Console(record=True, quiet=True)
    pack = build_from_features(tiny, saes, concept, CONFIG, tmp_path / "one", console)
    assert pack.edited_sites == (EARLY, LATE)
    assert pack.card.saes[str(EARLY)].name == "early"
    assert pack.card.policy.op is Op.CLIP
    t = pack.tensors
    features, directions = (t.edited & of for of in (t.feature_ids >= 0, t.feature_ids < 0))
    assert (features.sum(), directions.sum()) == (6, 2)
    assert (t.site[directions] == 1).all(), "at the last site"
    np.testing.assert_allclose(np.linalg.norm(t.W_dec[directions], axis=1), 1, rtol=1e-5)
    for row in np.flatnonzero(features):
        sae = {0: saes[1], 1: saes[0]}[int(t.site[row])]
        np.testing.assert_allclose(t.W_dec[row], sae.W_dec[t.feature_ids[row]], rtol=1e-6)
    assert (t.value[~t.edited] == 0).all()
    assert (t.value[features] < 0).all(), "strength 2 lowers every operand below 0"
    data = pack.card.data
    assert data["words"] == {"learned": ["duck"]}
    assert data["strength"] == 2.0
    assert data["within_budget"] is True
    assert data["validation"]["kl"]["value"] > 0
    assert data["labels"] == {"positive": ["dog"], "negative": ["other"]}
    assert 230 < data["texts"]["train"]["positive"] < 300
    detector = pack.card.detector
    assert max(detector.auroc_probe, detector.auroc_features) > 0.9
    assert {"probe": detector.auroc_probe, "features": detector.auroc_features}[detector.kind] == max(
        detector.auroc_probe, detector.auroc_features
    )
    catalog = Catalog.load(tiny, packs=[str(tmp_path / "one")])
    guard = Guard(ConceptTarget("duck"), detector.threshold, GuardAction.FLAG)
    plan = compile_plan(SteeringSpec(guards=(guard,)), ("duck",), catalog)
    assert [i.site for i in plan.interventions if i.source != "request"] == [EARLY, LATE]


def test_a_detector_may_read_before_the_policy_edits(
    tiny: LoadedModel, saes: list[SAE], concept: Concept, tmp_path: Path
) -> None:
    config = replace(CONFIG, detector_sites=(EARLY,))
    pack = build_from_features(tiny, saes[:1], concept, config, tmp_path / "one", Console(quiet=True))
    assert (pack.edited_sites, pack.detector_site, pack.card.detector.kind) == ((LATE,), EARLY, "probe")
    assert pack.card.sites == [str(EARLY), str(LATE)]
    assert pack.card.data["config"]["detector_sites"] == [str(EARLY)]
    catalog = Catalog.load(tiny, packs=[str(tmp_path / "one")])
    plan = compile_plan(SteeringSpec(guards=(Guard(ConceptTarget("duck"), 0.0, GuardAction.FLAG),)), (), catalog)
    assert plan.num_layers == EARLY.layer + 1


def list_of(sae: SAE, features: list[int], path: Path) -> Path:
    """As ``analyse features`` writes it."""
    rows = [{"id": feature, "removed": 0.1, "swapped": 0.1, "active": 1.0} for feature in features]
    path.write_text(json.dumps({"sae": sae.name, "sae_sha256": sae.sha256, "features": rows}))
    return path


def test_listed_candidates_take_the_place_of_those_by_contrast(
    tiny: LoadedModel, saes: list[SAE], concept: Concept, tmp_path: Path
) -> None:
    console = Console(quiet=True)
    own = build_from_features(tiny, saes, concept, CONFIG, tmp_path / "own", console).card.data["effect"][str(LATE)]
    listed = [int(feature) for feature in own][:2]
    lists = read_shortlists([list_of(saes[0], listed, tmp_path / "list.json")], saes)
    config = replace(CONFIG, selection=replace(CONFIG.selection, shortlists=lists))
    pack = build_from_features(tiny, saes, concept, config, tmp_path / "listed", console)
    assert {int(feature) for feature in pack.card.data["effect"][str(LATE)]} == set(listed)
    assert pack.card.data["config"]["selection"]["shortlists"] == {saes[0].sha256: listed}


def test_lists_that_do_not_fit_are_refused(saes: list[SAE], tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    two = read_shortlists([list_of(saes[0], [3, 1], path), path], saes)
    assert two == {saes[0].sha256: (3, 1)}
    with pytest.raises(IncompatibleError, match=f"features of {saes[0].name}"):
        read_shortlists([path], saes[1:])
    with pytest.raises(AssetError, match="feature 99999, where"):
        read_shortlists([list_of(saes[0], [1, 99999], path)], saes)
    path.write_text('{"features": []}')
    with pytest.raises(AssetError, match="sae_sha256"):
        read_shortlists([path], saes)


def test_the_same_inputs_give_the_same_bytes(
    tiny: LoadedModel, saes: list[SAE], concept: Concept, tmp_path: Path
) -> None:
    hashes = {
        build_from_features(tiny, given, concept, CONFIG, tmp_path / name, Console(quiet=True)).sha256
        for name, given in (("one", saes), ("other", saes[::-1]))
    }
    assert len(hashes) == 1


def test_amplifying_adds_and_obeys_the_budget(
    tiny: LoadedModel, saes: list[SAE], concept: Concept, tmp_path: Path
) -> None:
    order = replace(concept, direction=Direction.AMPLIFY)
    strong = build_from_features(tiny, saes, order, CONFIG, tmp_path / "strong", Console(quiet=True))
    assert strong.card.policy.op is Op.ADD
    assert strong.card.data["strength"] == 4.0
    spent = strong.card.data["validation"]["kl"]["value"]
    thrifty = replace(order, budget=Budget(spent / 2, None))
    weak = build_from_features(tiny, saes, thrifty, CONFIG, tmp_path / "weak", Console(quiet=True))
    assert weak.card.data["strength"] == 1.0
    np.testing.assert_allclose(4 * weak.tensors.value, strong.tensors.value, rtol=1e-5)


def test_a_card_claims_no_budget_that_was_not_kept(tiny: LoadedModel, concept: Concept, tmp_path: Path) -> None:
    impossible = replace(concept, direction=Direction.AMPLIFY, budget=Budget(0.0, None))
    console = Console(record=True, quiet=True)
    pack = build_from_direction(tiny, [LATE], impossible, CONFIG, tmp_path / "p", console)
    assert pack.card.data["validation"] is None
    assert pack.card.data["strength"] == 1.0, "the weakest"
    assert pack.card.data["within_budget"] is False


@pytest.mark.parametrize(("direction", "op"), [(Direction.SUPPRESS, Op.CLIP), (Direction.AMPLIFY, Op.ADD)])
def test_a_direction_is_the_unit_difference_of_means(
    direction: Direction, op: Op, tiny: LoadedModel, concept: Concept, tmp_path: Path
) -> None:
    order = replace(concept, direction=direction)
    pack = build_from_direction(tiny, [LATE, EARLY], order, CONFIG, tmp_path / "p", Console(quiet=True))
    assert pack.card.policy.op is op
    assert pack.card.saes == {}
    assert pack.edited_sites == (EARLY, LATE)
    for site in pack.sites:
        rows = pack.at(site)
        edited = rows.take(rows.edited)
        assert len(edited) == 1
        assert np.linalg.norm(edited.W_dec[0]) == pytest.approx(1, abs=1e-5)
        np.testing.assert_array_equal(edited.W_enc, edited.W_dec)
        assert edited.feature_ids[0] == -1
        texts = [f"{pack.name} {number}" for number in range(20)]
        batch = tokenize(tiny, texts, 48)
        x = activations_of(tiny, batch.tokens, (site,))[site]
        typical = float(x[ordinary_rows(x, batch.real)].norm(dim=1).median())
        assert edited.max_norm[0] == pytest.approx(MASSIVE_NORM_RATIO * typical, rel=0.3)
        if op is Op.ADD:
            assert edited.threshold[0] == -np.inf
            assert edited.value[0] > 0
        else:  # active above its cap, and cut to it
            assert edited.threshold[0] == edited.value[0] == 0
    assert load_pack(tmp_path / "p").sha256 == pack.sha256


def test_the_cap_is_where_negative_texts_are(tiny: LoadedModel, concept: Concept, tmp_path: Path) -> None:
    """One unit of strength lowers it by the distance of the means."""
    values = []
    for strength in (0.0, 1.0):
        config = replace(CONFIG, suppressing=(strength,))
        pack = build_from_direction(tiny, [LATE], concept, config, tmp_path / str(strength), Console(quiet=True))
        values.append(-float(pack.tensors.b_enc[pack.tensors.edited][0]))
    gap = build_from_direction(
        tiny, [LATE], replace(concept, direction=Direction.AMPLIFY), replace(CONFIG, amplifying=(1.0,)),
        tmp_path / "gap", Console(quiet=True),
    )  # fmt: skip
    assert values[0] - values[1] == pytest.approx(float(gap.tensors.value[gap.tensors.edited][0]), rel=1e-4)


def test_what_nothing_can_be_built_from_is_refused(
    tiny: LoadedModel, saes: list[SAE], concept: Concept, tmp_path: Path
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n".join(f"a duck {number}" for number in range(12)))
    rare = tmp_path / "words.json"
    rare.write_text('{"selection": {"river": ["rivers"], "duck": ["duck"]}, "held_out": {}}')
    unlabelled = Labels(frozenset({"cat"}), frozenset({"other"}))
    for change, complaint in [
        (
            {"positive": [few], "labels": Labels()},
            r"few\.txt: 1\d positive texts in the train split, expected at least 20",
        ),
        ({"labels": unlabelled}, "has the label 'cat'; labels there: dog, other"),
        ({"labels": Labels(frozenset({"other"}), frozenset({"other"}))}, "no word tells"),
    ]:
        with pytest.raises(AssetError, match=complaint):
            build_from_features(tiny, saes, replace(concept, **change), CONFIG, tmp_path / "p", Console(quiet=True))
    with pytest.raises(AssetError, match="random and again are both SAEs"):
        twice = [saes[0], replace(saes[0], name="again")]
        build_from_features(tiny, twice, concept, CONFIG, tmp_path / "p", Console(quiet=True))
    assert not (tmp_path / "p").exists()


def test_what_can_be_known_at_once_is_refused_before_texts_are_read(
    tiny: LoadedModel, saes: list[SAE], concept: Concept, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match=r"name: got 'two words', expected letters, digits, .* beginning"):
        replace(concept, name="two words")
    unread = replace(concept, positive=[tmp_path / "nothing.txt"])
    topk = replace(saes[1], k=4)
    with pytest.raises(IncompatibleError, match="one by one: early is a TopK SAE"):
        build_from_features(tiny, [saes[0], topk], unread, CONFIG, tmp_path / "p", Console(quiet=True))


@pytest.mark.parametrize("cap", [-2.0, 2.0])
def test_a_capped_direction_is_served_as_it_was_fitted_and_ends_at_its_domain(tiny: LoadedModel, cap: float) -> None:
    unit = torch.nn.functional.one_hot(torch.tensor(0), 32).float()
    rows = SiteRows.of_direction(LATE, unit, unit, bias=0.5, max_norm=10.0)
    probe = Detector("probe", rows, torch.ones(1), 0.0, None, 1.0)
    at, one = torch.tensor([cap]), torch.ones(1)
    draft = PackDraft("duck", "", Op.CLIP, Direction.SUPPRESS, [rows], [at], [one], probe)
    t = draft.pack(tiny, 0.0, {}).tensors
    x = torch.zeros(5, 32)
    x[:, 0] = torch.tensor([-5.0, -1.0, 5.0, 30.0, -30.0])  # the last two out of the domain
    expected = torch.cat([x[:3, 0].clamp(max=cap - 0.5), x[3:, 0]])
    torch.testing.assert_close(rows.edited(x, Op.CLIP, at)[:, 0], expected)
    pre = x.numpy() @ t.W_enc[0] + t.b_enc[0]
    f = np.where((pre > t.threshold[0]) & (np.abs(x[:, 0].numpy()) <= t.max_norm[0]), pre, 0)
    edit = edit_of(torch.full((5,), OpCode.CLIP), torch.from_numpy(f), torch.full((5,), float(t.value[0])))
    torch.testing.assert_close(x[:, 0] + edit, expected)
