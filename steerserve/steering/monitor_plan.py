"""The monitor plan: which layers and heads to watch for a behaviour, and what to read there.

Circuit discovery writes it, ``steerserve serve --monitor-plan`` reads it. It is a JSON file; vectors that it names lie
in a safetensors file of the same name beside it, whose hash it has. What it comes to on a served model is worked out in
``monitors``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from steerserve.errors import AssetError
from steerserve.sae.formats.whole import written_whole
from steerserve.steering.packs import HeadName, ModelRef, Name, Sha256, Share, SiteName
from steerserve.types import FloatArray

FORMAT = "steerserve.monitor_plan/1"
VECTORS_SUFFIX = ".safetensors"
MAX_ENTRIES = 64
MAX_FEATURES = 256
"""Of one entry."""


Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ConceptReading(_Strict):
    """The detector of a concept pack that is loaded, at the site it was made for."""

    kind: Literal["concept"] = "concept"
    concept: Name


class FeatureReading(_Strict):
    """Features of an SAE that is loaded, at its site: score = Σ weight · f.

    Attributes:
        sae: its name; ``sha256`` that of its weights, as ``GetModelInfo`` reports it.
        weights: one for each feature; left out, 1.
    """

    kind: Literal["features"] = "features"
    sae: str
    sha256: Sha256
    features: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=MAX_FEATURES)]
    weights: tuple[Finite, ...] | None = None

    @model_validator(mode="after")
    def _features_fit_weights(self) -> Self:
        if len(set(self.features)) < len(self.features):
            raise ValueError("features: expected each once")
        if self.weights is not None and len(self.weights) != len(self.features):
            raise ValueError(f"weights: expected {len(self.features)}, one for each feature, got {len(self.weights)}")
        return self


class DirectionReading(_Strict):
    """The activation of a site along a direction.

    Attributes:
        vector: name of the direction in the vectors file, as wide as the site; only its direction counts.
    """

    kind: Literal["direction"] = "direction"
    site: SiteName
    vector: str


class HeadReading(_Strict):
    """What one head puts out, along a direction.

    Attributes:
        head: ``L12H5``.
        vector: name of the direction in the vectors file: ``[d_head]`` of the head's own output, or ``[d_model]`` of
            the residual stream, along which the head writes z · (W_O u). Only its direction counts.
        concept: in place of a vector, a loaded concept pack whose detector is a probe: the score is what the head adds
            to the probe's, as far as no norm or later layer comes between.
    """

    kind: Literal["head"] = "head"
    head: HeadName
    vector: str | None = None
    concept: Name | None = None

    @model_validator(mode="after")
    def _has_one_direction(self) -> Self:
        if (self.vector is None) == (self.concept is None):
            raise ValueError("vector and concept: expected exactly one")
        return self


Reading = Annotated[ConceptReading | FeatureReading | DirectionReading | HeadReading, Field(discriminator="kind")]


class MonitorEntry(_Strict):
    """One score to report.

    Attributes:
        name: what responses and metrics call it.
        frequency: share of the circuits, over bootstraps, orders and thresholds, that have the site or head.
        specificity: how much more often than in circuits of control behaviours; None if there was no control.
    """

    name: Name
    reading: Reading
    frequency: Share | None = None
    specificity: Finite | None = None


class Provenance(_Strict):
    """What the choice rests on.

    Attributes:
        circuits: SHA-256 of each circuit file, by its name.
        bootstraps: draws of the prompts; with ``thresholds`` (τ) and ``orders`` these span the searches.
    """

    circuits: dict[str, Sha256] = {}
    bootstraps: Annotated[int, Field(ge=0)] = 0
    thresholds: tuple[Finite, ...] = ()
    orders: tuple[str, ...] = ()
    command: str = ""


class MonitorPlan(_Strict):
    """The file; ``protocol`` is free-form: how well the scores tell the behaviour, and on what that was measured.

    Attributes:
        model: the weights it was made on; no others are served with it.
        vectors_sha256: of the vectors file; None if no entry names a vector.
    """

    format: Literal["steerserve.monitor_plan/1"] = "steerserve.monitor_plan/1"
    name: Name
    behaviour: str
    model: ModelRef
    entries: Annotated[tuple[MonitorEntry, ...], Field(min_length=1, max_length=MAX_ENTRIES)]
    vectors_sha256: Sha256 | None = None
    provenance: Provenance = Provenance()
    protocol: dict[str, Any] = {}

    @property
    def vector_names(self) -> set[str]:
        """Vectors that its entries name."""
        readings = (entry.reading for entry in self.entries)
        named = {r.vector for r in readings if isinstance(r, DirectionReading | HeadReading)}
        return {name for name in named if name is not None}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [entry.name for entry in self.entries]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"entries.{index}.name: expected a name that no other entry has, got {name!r}")
        return self


@dataclass(frozen=True, eq=False)
class MonitorPlanFile:
    """A plan as loaded.

    Attributes:
        vectors: those that it names, float32 and finite.
    """

    plan: MonitorPlan
    vectors: Mapping[str, FloatArray]


def load_monitor_plan(path: Path) -> MonitorPlanFile:
    """Read a plan and its vectors.

    Raises:
        AssetError: a file is missing or damaged, does not follow the schema, or belongs to another one.
    """
    vectors_path = path.with_suffix(VECTORS_SUFFIX)
    try:
        plan = MonitorPlan.model_validate_json(path.read_bytes())
        if plan.vectors_sha256 is None:
            return MonitorPlanFile(plan, _checked_vectors(plan, {}, path))
        data = vectors_path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != plan.vectors_sha256:
            expected = f"the plan belongs to one with SHA-256 {plan.vectors_sha256}"
            raise AssetError(f"monitor plan {path}: {vectors_path.name} has SHA-256 {found}, but {expected}")
        return MonitorPlanFile(plan, _checked_vectors(plan, load(data), path))
    except OSError as error:
        raise AssetError(f"monitor plan {path}: cannot read {error.filename}: {error.strerror}") from error
    except SafetensorError as error:
        raise AssetError(f"monitor plan {path}: {vectors_path.name} is damaged: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        message = problem["msg"].removeprefix("Value error, ")
        raise AssetError(f"monitor plan {path}: {where}: {message}") from error


def save_monitor_plan(plan: MonitorPlan, vectors: Mapping[str, FloatArray], path: Path) -> MonitorPlanFile:
    """Write a plan and the vectors that it names, and return it as loaded.

    Args:
        path: ends in ``.json``; the vectors come beside it.

    Raises:
        AssetError: the vectors are not those that the plan names, or not finite.
    """
    chosen = _checked_vectors(plan, vectors, path)
    data = save({name: np.ascontiguousarray(vector) for name, vector in chosen.items()}) if chosen else None
    digest = None if data is None else hashlib.sha256(data).hexdigest()
    plan = plan.model_copy(update={"vectors_sha256": digest})
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is not None:
        with written_whole(path.with_suffix(VECTORS_SUFFIX)) as file:
            file.write_bytes(data)
    with written_whole(path) as file:
        file.write_text(plan.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
    return load_monitor_plan(path)


def _checked_vectors(plan: MonitorPlan, vectors: Mapping[str, FloatArray], path: Path) -> dict[str, FloatArray]:
    differ = plan.vector_names ^ set(vectors)
    if differ:
        raise AssetError(f"monitor plan {path}: vectors: {', '.join(sorted(differ))}: missing, or named by no entry")
    for name, vector in vectors.items():
        if vector.ndim != 1 or vector.dtype != np.float32 or not np.isfinite(vector).all():
            found = f"{vector.dtype} {list(vector.shape)}"
            raise AssetError(f"monitor plan {path}: vectors: {name}: {found}, expected one float32 vector, all finite")
    return dict(vectors)
