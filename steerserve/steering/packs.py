"""Concept packs: a named set of features with a calibrated policy, self-contained on disk.

A pack is a directory of two files. ``pack.safetensors`` holds the feature rows in the kernel's
terms (see ``FeatureRows``) and their calibration; ``card.json`` says what they are for, which
weights they were made on and how well they work. Serving needs no SAE beside it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.steering.plan import FeatureRows
from steerserve.types import FloatArray, Op, Phase, Site

TENSORS = "pack.safetensors"
CARD = "card.json"
UNBOUNDED = {"threshold": -np.inf, "max_norm": np.inf}
"""Tensors that may hold an infinity, and which."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Card(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRef(_Card):
    """The weights a pack was made on."""

    name: str
    fingerprint: Sha256


class SAERef(_Card):
    """The SAE its features come from."""

    name: str
    sha256: Sha256


class PolicyAction(_Card):
    """What the pack does when named as a policy; the operands are the pack's ``value``."""

    op: Op
    always: bool = False
    phase: Phase = Phase.ALL

    @model_validator(mode="after")
    def _always_is_for_clamp(self) -> Self:
        if self.always and self.op is not Op.CLAMP:
            raise ValueError("always is for clamp only")
        return self


class PackCard(_Card):
    """``card.json``; ``data`` and ``evaluation`` are free-form."""

    format: Literal["steerserve.pack/1"] = "steerserve.pack/1"
    name: Name
    version: Name
    description: str
    model: ModelRef
    sae: SAERef | None
    site: str
    policy: PolicyAction
    score_threshold: float = Field(allow_inf_nan=False)
    data: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}

    @field_validator("site")
    @classmethod
    def _canonical_site(cls, value: str) -> str:
        try:
            return str(Site.parse(value))
        except InvalidRequestError as error:
            raise ValueError(f"expected {error.expected}") from error


@dataclass(frozen=True, eq=False)
class PackTensors:
    """``pack.safetensors``: k features in the kernel's terms, and their calibration.

    Attributes:
        W_enc, W_dec: ``[k, d]`` float32; ``b_enc`` has −b_dec·W_enc folded in.
        threshold: ``[k]``; −inf for a plain direction.
        max_norm: ``[k]`` largest |x| the feature is defined on; +inf where unbounded.
        value: ``[k]`` operand of the policy's op, in activation units.
        weight: ``[k]`` the concept's score is ``weight · f``.
        max_activation: ``[k]`` largest activation seen in calibration.
        feature_ids: ``[k]`` dimensions of the SAE; −1 for a direction.
    """

    W_enc: FloatArray
    b_enc: FloatArray
    threshold: FloatArray
    max_norm: FloatArray
    W_dec: FloatArray
    value: FloatArray
    weight: FloatArray
    max_activation: FloatArray
    feature_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.feature_ids)


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

    @property
    def site(self) -> Site:
        """Where its features are read and edited."""
        return Site.parse(self.card.site)

    def rows(self) -> FeatureRows:
        """All features, in the order of the file."""
        tensors = self.tensors
        keys = tuple((f"pack:{self.sha256}", index) for index in range(len(tensors)))
        return FeatureRows(keys, tensors.W_enc, tensors.b_enc, tensors.threshold, tensors.max_norm, tensors.W_dec)

    def check_model(self, model: ModelFacts) -> None:
        """Refuse a model that the pack was not made on.

        Raises:
            IncompatibleError: other weights, another width, or a layer that the model lacks.
        """
        if self.card.model.fingerprint != model.fingerprint:
            made_on, served = self.card.model, f"the fingerprint of the served {model.name}, {model.fingerprint}"
            raise IncompatibleError("pack.model.fingerprint", f"{made_on.fingerprint} ({made_on.name})", served)
        if self.tensors.W_enc.shape[1] != model.d_model:
            expected = f"[k, {model.d_model}], the width of {model.name}"
            raise IncompatibleError("pack.W_enc", list(self.tensors.W_enc.shape), expected)
        if self.site.layer >= model.n_layers:
            raise IncompatibleError("pack.site", self.card.site, f"a layer below {model.n_layers}")


def load_pack(directory: Path) -> ConceptPack:
    """Read and check a pack.

    Raises:
        AssetError: a file is missing or damaged, or the two do not make a valid pack.
    """
    try:
        tensor_bytes = (directory / TENSORS).read_bytes()
        card_bytes = (directory / CARD).read_bytes()
        card = PackCard.model_validate_json(card_bytes)
        arrays = load_file(directory / TENSORS)
    except OSError as error:
        raise AssetError(f"concept pack {directory}: cannot read {error.filename}: {error.strerror}") from error
    except SafetensorError as error:
        raise AssetError(f"concept pack {directory}: {TENSORS} is damaged: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise AssetError(f"concept pack {directory}: {CARD}: {where}: {problem['msg']}") from error
    tensors = _checked_tensors(arrays, card, directory)
    return ConceptPack(card, tensors, hashlib.sha256(tensor_bytes + card_bytes).hexdigest())


def save_pack(card: PackCard, tensors: PackTensors, directory: Path) -> ConceptPack:
    """Write a pack and return it as loaded.

    Raises:
        AssetError: the tensors do not make a valid pack.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in vars(tensors).items()}
    _checked_tensors(arrays, card, directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, directory / TENSORS)
    (directory / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return load_pack(directory)


def _checked_tensors(arrays: dict[str, npt.NDArray[Any]], card: PackCard, directory: Path) -> PackTensors:
    def refuse(name: str, problem: str) -> AssetError:
        return AssetError(f"concept pack {directory}: {TENSORS}: {name}: {problem}")

    names = set(PackTensors.__dataclass_fields__)
    if set(arrays) != names:
        raise refuse(", ".join(sorted(names ^ set(arrays))), "missing or unknown tensor")
    encoder = arrays["W_enc"]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise refuse("W_enc", f"shape {list(encoder.shape)}, expected [k, d]")
    for name, array in arrays.items():
        shape = encoder.shape if name in ("W_enc", "W_dec") else encoder.shape[:1]
        dtype = np.int64 if name == "feature_ids" else np.float32
        if array.shape != shape or array.dtype != dtype:
            expected = f"{np.dtype(dtype).name} {list(shape)}"
            raise refuse(name, f"{array.dtype.name} {list(array.shape)}, expected {expected}")
        allowed = np.isfinite(array) | (array == UNBOUNDED.get(name, 0.0))
        if not allowed.all():
            raise refuse(name, "NaN or infinite values")
    features = arrays["feature_ids"][arrays["feature_ids"] >= 0]
    if len(np.unique(features)) < len(features):
        raise refuse("feature_ids", "a feature appears twice")
    if len(features) and card.sae is None:
        raise refuse("feature_ids", f"features of an SAE, but {CARD} names none")
    return PackTensors(**arrays)
