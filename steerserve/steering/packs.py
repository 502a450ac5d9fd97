"""Concept packs: features and directions with a calibrated policy and a detector, self-contained on disk.

A pack is a directory of two files. ``pack.safetensors`` holds the rows in the kernel's terms (see
``FeatureRows``), at one or several sites, and their calibration; ``card.json`` says what they are
for, which weights they were made on and how well they work. Serving needs no SAE beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.steering.plan import FeatureRows
from steerserve.types import FloatArray, HeadTarget, Op, Phase, Site, Stream


def _canonical_site(name: str) -> str:
    try:
        site = Site.parse(name)
    except InvalidRequestError as error:
        raise ValueError(f"expected {error.expected}") from error
    if site.stream is Stream.MLP_IN:
        raise ValueError(f"{site} can be harvested, not steered")
    return str(site)


def _canonical_head(name: str) -> str:
    try:
        return str(HeadTarget.parse(name))
    except InvalidRequestError as error:
        raise ValueError(f"got {error.value}, expected {error.expected}") from error


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SiteName = Annotated[str, AfterValidator(_canonical_site)]
HeadName = Annotated[str, AfterValidator(_canonical_head)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Card(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRef(_Card):
    """The weights a pack was made on."""

    name: str
    fingerprint: Sha256


class SAERef(_Card):
    """The SAE that the features of a site come from."""

    name: str
    sha256: Sha256


class PolicyAction(_Card):
    """What the pack does when named as a policy: ``op`` on every edited row, with the row's ``value``.

    ``clip`` leaves inactive features alone: f' = min(f, value) where f > 0, everywhere on a direction (threshold
    −inf), outside its ``max_norm`` too, where f = 0. A cap below 0 that is to end there is a bias, with threshold 0.
    """

    op: Op
    always: bool = False
    phase: Phase = Phase.ALL

    @model_validator(mode="after")
    def _always_is_for_clamp(self) -> Self:
        if self.always and self.op is not Op.CLAMP:
            raise ValueError("always is for clamp only")
        return self


class DetectorCard(_Card):
    """How the concept is read: score = Σ weight · f over the rows of one site.

    Attributes:
        kind: SAE features, or a linear probe on the activation: one row whose bias is its ``b_enc``.
        threshold: score above which a text counts as showing the concept.
        auroc_features, auroc_probe: of both candidates on validation texts; None where one was not fitted.
    """

    kind: Literal["features", "probe"]
    site: SiteName
    threshold: float = Field(allow_inf_nan=False)
    auroc_features: Share | None = None
    auroc_probe: Share | None = None


class PackCard(_Card):
    """``card.json``; ``data`` and ``evaluation`` are free-form.

    Attributes:
        sites: in model order; the tensor ``site`` indexes it.
        saes: by site, where rows are features of an SAE.
        tensors_sha256: hash of the ``pack.safetensors`` it belongs to; cards of earlier versions have none.
    """

    format: Literal["steerserve.pack/2"] = "steerserve.pack/2"
    name: Name
    version: Name
    description: str
    model: ModelRef
    saes: dict[SiteName, SAERef] = {}
    sites: Annotated[list[SiteName], Field(min_length=1)]
    policy: PolicyAction
    detector: DetectorCard
    tensors_sha256: Sha256 | None = None
    data: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}

    @model_validator(mode="after")
    def _sites_fit_together(self) -> Self:
        sites = [Site.parse(name) for name in self.sites]
        if sites != sorted(set(sites)):
            raise ValueError(f"sites: expected each once and in model order, got {', '.join(self.sites)}")
        for site in (*self.saes, self.detector.site):
            if site not in self.sites:
                raise ValueError(f"sites: {site} is named elsewhere in the card and missing here")
        return self


@dataclass(frozen=True, eq=False)
class PackTensors:
    """``pack.safetensors``: k rows in the kernel's terms, and their calibration.

    Attributes:
        site: ``[k]`` index into the card's ``sites``.
        W_enc, W_dec: ``[k, d]`` float32; ``b_enc`` has −b_dec·W_enc folded in.
        threshold: ``[k]``; −inf for a plain direction or a probe.
        max_norm: ``[k]`` largest |x| the row is defined on; +inf where unbounded.
        edited: ``[k]`` rows that the policy, and a request that names the concept, edit.
        value: ``[k]`` operand of the policy's op, in activation units; 0 where not edited.
        weight: ``[k]`` the detector's score is ``weight · f``; 0 where it does not read.
        max_activation: ``[k]`` largest activation seen in calibration, above 0.
        feature_ids: ``[k]`` dimensions of the site's SAE; −1 for a direction or a probe.
    """

    site: npt.NDArray[np.int64]
    W_enc: FloatArray
    b_enc: FloatArray
    threshold: FloatArray
    max_norm: FloatArray
    W_dec: FloatArray
    edited: npt.NDArray[np.bool_]
    value: FloatArray
    weight: FloatArray
    max_activation: FloatArray
    feature_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.feature_ids)

    def take(self, rows: npt.NDArray[Any]) -> PackTensors:
        """Some of the rows, chosen by a mask or by indices."""
        return PackTensors(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class ModelFacts(Protocol):
    """What steering has to know of the served model."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...
    def head_writes(self, layer: int, head: int) -> FloatArray:
        """``[d_head, d_model]``: what a head's output becomes in the residual stream."""


def width_of(model: ModelFacts, site: Site) -> int:
    """Of the activation at a site."""
    return model.n_heads * model.d_head if site.stream is Stream.ATTN_Z else model.d_model


def check_site(site: Site, field: str, model: ModelFacts) -> None:
    """Refuse a site that the model does not have.

    Raises:
        IncompatibleError: the layer is outside the model.
    """
    if not 0 <= site.layer < model.n_layers:
        expected = f"a layer from 0 to {model.n_layers - 1}: {model.name} has no other"
        raise IncompatibleError(field, str(site), expected)


def check_head(head: HeadTarget, field: str, model: ModelFacts) -> None:
    """Refuse a head that no layer of the model has.

    Raises:
        IncompatibleError: it is outside the model.
    """
    if not 0 <= head.head < model.n_heads:
        expected = f"a head from 0 to {model.n_heads - 1}: {model.name} has no other"
        raise IncompatibleError(field, str(head), expected)


@dataclass(frozen=True, eq=False)
class ConceptPack:
    """A pack as loaded.

    Attributes:
        sha256: of ``pack.safetensors`` followed by ``card.json``.
    """

    card: PackCard
    tensors: PackTensors
    sha256: str

    @property
    def name(self) -> str:
        """The concept's name, and that of the policy."""
        return self.card.name

    @property
    def tag(self) -> str:
        """``name@version``."""
        return f"{self.card.name}@{self.card.version}"

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Where its rows are read or edited, in model order."""
        return tuple(Site.parse(name) for name in self.card.sites)

    @property
    def edited_sites(self) -> tuple[Site, ...]:
        """Where its policy edits."""
        return tuple(site for site in self.sites if self.at(site).edited.any())

    @property
    def detector_site(self) -> Site:
        """Where its score is read."""
        return Site.parse(self.card.detector.site)

    def at(self, site: Site) -> PackTensors:
        """The rows of one of its sites, in the order of the file."""
        return self._parts[site][0]

    def rows(self, site: Site) -> FeatureRows:
        """Those of ``at``, as a plan has them."""
        return self._parts[site][1]

    @cached_property
    def _parts(self) -> Mapping[Site, tuple[PackTensors, FeatureRows]]:
        parts = {}
        for index, site in enumerate(self.sites):
            chosen = np.flatnonzero(self.tensors.site == index)
            part = self.tensors.take(chosen)
            keys = tuple((f"pack:{self.sha256}", int(row)) for row in chosen)
            parts[site] = part, FeatureRows(keys, part.W_enc, part.b_enc, part.threshold, part.max_norm, part.W_dec)
        return parts

    def check_model(self, model: ModelFacts) -> None:
        """Refuse a model that the pack was not made on.

        Raises:
            IncompatibleError: other weights, another width, or a layer that the model lacks.
        """
        if self.card.model.fingerprint != model.fingerprint:
            made_on, served = self.card.model, f"the fingerprint of the served {model.name}, {model.fingerprint}"
            raise IncompatibleError("pack.model.fingerprint", f"{made_on.fingerprint} ({made_on.name})", served)
        for site in self.sites:
            if self.tensors.W_enc.shape[1] != width_of(model, site):
                expected = f"[k, {width_of(model, site)}], the width of {model.name} at {site}"
                raise IncompatibleError("pack.W_enc", list(self.tensors.W_enc.shape), expected)
            if site.layer >= model.n_layers:
                raise IncompatibleError("pack.sites", str(site), f"a layer below {model.n_layers}")
