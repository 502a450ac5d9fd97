"""Monitor plans: the file as it is written and read, and what its entries come to on what is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.monitor_plan import (
    ConceptReading,
    DirectionReading,
    FeatureReading,
    HeadReading,
    MonitorEntry,
    MonitorPlan,
    MonitorPlanFile,
    Provenance,
    load_monitor_plan,
    save_monitor_plan,
)
from steerserve.steering.monitors import Monitors, bind_monitors, read_monitors
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import DetectorCard, ModelRef
from steerserve.steering.plan import Stage
from steerserve.types import FloatArray, Op, Site, SteeringSpec, Stream

FINGERPRINT, SAE_SHA = "f" * 64, "a" * 64
SITE = Site.parse("blocks.2.hook_resid_post")
RNG = np.random.default_rng(0)
VECTORS = {name: RNG.standard_normal(width).astype(np.float32) for name, width in (("toxic", 8), ("own", 4))}
ENTRIES = (
    MonitorEntry(name="mood", reading=ConceptReading(concept="mood"), frequency=0.9, specificity=3.5),
    MonitorEntry(
        name="layer2",
        reading=FeatureReading(sae="toy-sae", sha256=SAE_SHA, features=(4, 1), weights=(0.5, -2.0)),
    ),
    MonitorEntry(name="stream", reading=DirectionReading(site="blocks.0.hook_resid_post", vector="toxic")),
    MonitorEntry(name="writes", reading=HeadReading(head="L1H2", vector="toxic")),
    MonitorEntry(name="own", reading=HeadReading(head="L3H0", vector="own")),
)


def plan(*entries: MonitorEntry, **changes: Any) -> MonitorPlan:
    model = ModelRef(name="toy", fingerprint=FINGERPRINT)
    values: dict[str, Any] = {"name": "names", "behaviour": "ioi", "model": model, "entries": entries or ENTRIES}
    return MonitorPlan(**(values | changes))


def bound(catalog: Catalog, *entries: MonitorEntry, vectors: dict[str, FloatArray] = VECTORS) -> Monitors:
    return bind_monitors(MonitorPlanFile(plan(*entries), vectors), catalog)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    provenance = Provenance(circuits={"c.json": "b" * 64}, bootstraps=8, thresholds=(0.01, 0.02), orders=("reverse",))
    written = plan(provenance=provenance, protocol={"auroc": 0.97})
    saved = save_monitor_plan(written, VECTORS, tmp_path / "deep" / "plan.json")
    read = load_monitor_plan(tmp_path / "deep" / "plan.json")
    assert saved.plan == read.plan == written.model_copy(update={"vectors_sha256": read.plan.vectors_sha256})
    assert read.plan.vectors_sha256 is not None
    assert read.vectors.keys() == VECTORS.keys()
    assert all(np.array_equal(read.vectors[name], vector) for name, vector in VECTORS.items())


def test_a_plan_without_vectors_is_one_file(tmp_path: Path) -> None:
    save_monitor_plan(plan(ENTRIES[0]), {}, tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert load_monitor_plan(tmp_path / "plan.json").vectors == {}


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.update(format="steerserve.monitor_plan/9"), "format: Input should be"),
        (lambda content: content.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda content: content.update(entries=[]), "entries: Tuple should have at least 1 item"),
        (
            lambda content: content.update(entries=65 * content["entries"]),
            "entries: Tuple should have at most 64 items",
        ),
        (lambda content: content["entries"][1].update(name="mood"), "entries.1.name: expected a name that no other"),
        (lambda content: content["entries"][0]["reading"].update(kind="smell"), "entries.0.reading: Input tag 'smell'"),
        (
            lambda content: content["entries"][3]["reading"].update(head="12.5"),
            "head: got '12.5', expected 'L<layer>H<head>'",
        ),
        (lambda content: content["entries"][3]["reading"].update(concept="mood"), "expected exactly one"),
        (lambda content: content["entries"][3]["reading"].pop("vector"), "expected exactly one"),
        (lambda content: content["entries"][1]["reading"].update(features=[1, 1]), "features: expected each once"),
        (lambda content: content["entries"][1]["reading"].update(weights=[1.0]), "weights: expected 2"),
        (lambda content: content["entries"][2]["reading"].update(site="layer 3"), "expected 'blocks.<layer>"),
        (lambda content: content["entries"].pop(4), "vectors: own: missing, or named by no entry"),
        (lambda content: content.update(vectors_sha256="0" * 64), "plan.safetensors has SHA-256"),
        (lambda content: content.update(vectors_sha256=None), "vectors: own, toxic: missing"),
    ],
)
def test_a_plan_that_is_wrong_says_where(change: Change, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_monitor_plan(plan(), VECTORS, path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(AssetError, match="monitor plan") as caught:
        load_monitor_plan(path)
    assert problem in str(caught.value)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(AssetError, match=r"cannot read .*plan.json: No such file"):
        load_monitor_plan(path)
    save_monitor_plan(plan(), VECTORS, path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(AssetError, match=r"cannot read .*plan.safetensors: No such file"):
        load_monitor_plan(path)
    for name, vector in (("own", VECTORS["own"] * np.nan), ("own", VECTORS["own"].astype(np.float64))):
        with pytest.raises(AssetError, match=r"vectors: own: .*expected one float32 vector, all finite"):
            save_monitor_plan(plan(), VECTORS | {name: vector}, path)


# What it comes to.


def test_every_entry_reads_its_own_site_and_changes_nothing(catalog) -> None:
    monitors = bound(catalog)
    z = [Site(1, Stream.ATTN_Z), Site(3, Stream.ATTN_Z)]
    assert [edit.target.site for edit in monitors.edits] == [SITE, SITE, Site(0, Stream.RESID_POST), *z]
    assert monitors.sites == {SITE, Site(0, Stream.RESID_POST), *z}
    assert [edit.label for edit in monitors.edits] == [entry.name for entry in ENTRIES]
    assert {(edit.source, edit.op, edit.stage, edit.fail_open) for edit in monitors.edits} == {
        ("monitor:names", Op.MONITOR, Stage.POLICY, True)
    }
    assert monitors.edits[1].target.weight.tolist() == [0.5, -2.0]
    assert monitors.edits[1].target.features == (4, 1)


def test_monitors_stand_in_front_of_every_plan(catalog) -> None:
    """So that a request's own readings and edits have the same cached prefixes as without."""
    monitors = bound(catalog)
    bare = compile_plan(SteeringSpec(), (), catalog, monitors=monitors.edits)
    steered = compile_plan(SteeringSpec(), ("mood",), catalog, monitors=monitors.edits)
    assert bare.num_monitors == steered.num_monitors == len(ENTRIES)
    assert [each.label for each in steered.interventions[: len(ENTRIES)]] == [entry.name for entry in ENTRIES]
    assert [each.source for each in steered.interventions[len(ENTRIES) :]] == ["policy:mood@2"]
    assert (len(bare.scores), len(bare.guards), bare.hold_back) == (0, 0, 0)


def test_limits_of_requests_do_not_count_monitors(catalog) -> None:
    monitors = bound(catalog)
    sites = frozenset({Site(0, Stream.MLP_OUT)})
    assert compile_plan(SteeringSpec(), (), catalog, sites, monitors.edits).num_monitors == len(ENTRIES)


def test_a_probe_of_a_concept_is_read_as_a_part_of_its_score(catalog, card, make_tensors, tmp_path) -> None:
    """What a head adds to the probe's own score, whatever the probe's length."""
    tensors = make_tensors(threshold=np.full(2, -np.inf, dtype=np.float32), weight=np.float32([0.0, 2.0]))
    detector = DetectorCard(kind="probe", site=str(SITE), threshold=0.5)
    pack = save_pack(card.model_copy(update={"name": "probed", "detector": detector}), tensors, tmp_path / "probed")
    with_probe = Catalog(catalog.model, catalog.saes, {"probed": pack})
    reading = HeadReading(head="L1H2", concept="probed")
    (edit,) = bound(with_probe, MonitorEntry(name="part", reading=reading), vectors={}).edits
    z = np.random.default_rng(1).standard_normal(4)
    written = z @ catalog.model.head_writes(1, 2)
    rows = edit.target.source.W_enc[0]
    assert edit.target.weight[0] * (z @ rows[8:]) == pytest.approx(2.0 * written @ tensors.W_enc[1], rel=1e-4)


@pytest.mark.parametrize(
    ("entry", "error", "field", "expected"),
    [
        (ConceptReading(concept="modo"), InvalidRequestError, "concept", "a loaded concept: mood"),
        (FeatureReading(sae="toy", sha256=SAE_SHA, features=(1,)), InvalidRequestError, "sae", "a loaded SAE: toy-sae"),
        (FeatureReading(sae="toy-sae", sha256="b" * 64, features=(1,)), IncompatibleError, "sha256", "the hash of the"),
        (FeatureReading(sae="toy-sae", sha256=SAE_SHA, features=(6,)), InvalidRequestError, "feature", "from 0 to 5"),
        (DirectionReading(site="blocks.4.hook_mlp_out", vector="toxic"), IncompatibleError, "site", "from 0 to 3"),
        (DirectionReading(site="blocks.1.hook_mlp_out", vector="own"), IncompatibleError, "vector", "[8]"),
        (HeadReading(head="L1H3", vector="own"), IncompatibleError, "head", "a head from 0 to 2"),
        (HeadReading(head="L1H0", concept="mood"), IncompatibleError, "concept", "a concept whose detector is a probe"),
    ],
)
def test_a_plan_that_does_not_fit_what_is_loaded_is_refused(entry, error, field, expected, catalog) -> None:
    with pytest.raises(error) as caught:
        bound(catalog, MonitorEntry(name="wrong", reading=entry))
    assert caught.value.field == f"monitor_plan.entries[0].reading.{field}"
    assert expected in caught.value.expected


def test_a_plan_of_other_weights_is_refused(catalog, tmp_path: Path) -> None:
    other = plan(model=ModelRef(name="toy", fingerprint="0" * 64))
    save_monitor_plan(other, VECTORS, tmp_path / "plan.json")
    with pytest.raises(IncompatibleError, match=r"monitor_plan.model.fingerprint: got '0+ \(toy\)', expected"):
        read_monitors(tmp_path / "plan.json", catalog)
