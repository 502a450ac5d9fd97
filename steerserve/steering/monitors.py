"""What the server reads of every request: a monitor plan, worked out for the model and the assets that are loaded.

Monitors change nothing and nothing depends on them. They read what the request's own edits left, as the policies'
detectors do, and a score that is not finite ends no response.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from steerserve.errors import AssetError, IncompatibleError
from steerserve.steering.catalog import ASSETS, Catalog
from steerserve.steering.edits import Edit
from steerserve.steering.monitor_plan import (
    ConceptReading,
    DirectionReading,
    FeatureReading,
    HeadReading,
    MonitorPlan,
    MonitorPlanFile,
    load_monitor_plan,
)
from steerserve.steering.packs import ConceptPack
from steerserve.steering.plan import Stage
from steerserve.steering.targets import ResolvedTarget, resolve_read
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    FloatArray,
    HeadTarget,
    Op,
    Phase,
    Site,
)

BUILT_IN_PLANS = ASSETS / "monitor_plans"


@dataclass(frozen=True, eq=False)
class Monitors:
    """A plan as the compiler takes it.

    Attributes:
        plan: what it was made of; None if nothing is monitored.
        edits: one reading for each of its entries.
    """

    plan: MonitorPlan | None = None
    edits: tuple[Edit, ...] = ()

    @property
    def sites(self) -> frozenset[Site]:
        """Where they read."""
        return frozenset(edit.target.site for edit in self.edits)


NO_MONITORS = Monitors()


def read_monitors(path: Path, catalog: Catalog) -> Monitors:
    """Read a plan for what is loaded.

    Args:
        path: the file, or the name of a built-in plan.

    Raises:
        AssetError: there is neither, or the file, or that of its vectors, is missing or damaged.
        IncompatibleError: it was made for other weights, another SAE or another shape of the model.
        InvalidRequestError: it names what is not loaded.
    """
    return bind_monitors(load_monitor_plan(_plan_file(path)), catalog)


def _plan_file(path: Path) -> Path:
    built_in = {each.stem: each for each in sorted(BUILT_IN_PLANS.glob("*.json"))}
    if path.exists() or path.suffix:
        return path
    if str(path) in built_in:
        return built_in[str(path)]
    known = ", ".join(built_in) or "none"
    raise AssetError(f"monitor plan {str(path)!r} is neither a file nor a built-in one: {known}")


def bind_monitors(file: MonitorPlanFile, catalog: Catalog) -> Monitors:
    """Find what every entry of a plan reads.

    Raises:
        IncompatibleError: it was made for other weights, another SAE or another shape of the model.
        InvalidRequestError: it names what is not loaded.
    """
    plan, model = file.plan, catalog.model
    if plan.model.fingerprint != model.fingerprint:
        made_on, served = plan.model, f"the fingerprint of the served {model.name}, {model.fingerprint}"
        raise IncompatibleError("monitor_plan.model.fingerprint", f"{made_on.fingerprint} ({made_on.name})", served)
    return Monitors(plan, tuple(_bound(file, catalog)))


def _bound(file: MonitorPlanFile, catalog: Catalog) -> Iterator[Edit]:
    for index, entry in enumerate(file.plan.entries):
        path = f"monitor_plan.entries[{index}].reading"
        match entry.reading:
            case ConceptReading(concept=concept):
                target = resolve_read(ConceptTarget(concept), path, catalog)
            case FeatureReading() as reading:
                target = _features(reading, path, catalog)
            case DirectionReading(site=site, vector=vector):
                target = resolve_read(DirectionTarget(Site.parse(site), file.vectors[vector]), path, catalog)
            case HeadReading() as reading:
                target = _head(reading, file, path, catalog)
        yield Edit(
            field=path,
            source=f"monitor:{file.plan.name}",
            label=entry.name,
            stage=Stage.POLICY,
            phase=Phase.ALL,
            target=target,
            op=Op.MONITOR,
            always=False,
            value=target.weight.tolist(),
            fail_open=True,
        )


def _features(reading: FeatureReading, path: str, catalog: Catalog) -> ResolvedTarget:
    """The features as one target with the reading's weights."""
    sae = catalog.sae(reading.sae, f"{path}.sae")
    if sae.sha256 != reading.sha256:
        expected = f"the hash of the loaded {sae.name}, {sae.sha256}"
        raise IncompatibleError(f"{path}.sha256", reading.sha256, expected)
    each = [resolve_read(FeatureTarget(sae.name, feature), path, catalog) for feature in reading.features]
    weights = reading.weights or (1.0,) * len(each)
    return replace(
        each[0],
        label=f"{len(each)} features of {sae.name}",
        features=reading.features,
        keys=tuple(key for target in each for key in target.keys),
        identities=tuple(identity for target in each for identity in target.identities),
        weight=np.array(weights, dtype=np.float32),
    )


def _head(reading: HeadReading, file: MonitorPlanFile, path: str, catalog: Catalog) -> ResolvedTarget:
    head = HeadTarget.parse(reading.head)
    if reading.vector is not None:
        return resolve_read(DirectionTarget(head.site, file.vectors[reading.vector], head.head), path, catalog)
    assert reading.concept is not None
    probe = _probe(catalog.concept(reading.concept, f"{path}.concept"), f"{path}.concept")
    target = resolve_read(DirectionTarget(head.site, probe, head.head), path, catalog)
    # A target's vector counts for its direction alone; the probe's length makes the score a part of the probe's.
    length = np.linalg.norm(probe.astype(np.float64))
    return replace(target, pack=None, weight=np.array([length], dtype=np.float32))


def _probe(pack: ConceptPack, field: str) -> FloatArray:
    """``[d_model]``: a step along it raises the detector's score by the square of its length."""
    if pack.card.detector.kind != "probe":
        raise IncompatibleError(field, pack.name, "a concept whose detector is a probe: features have no one direction")
    rows = pack.at(pack.detector_site)
    probe: FloatArray = rows.weight @ rows.W_enc
    return probe
