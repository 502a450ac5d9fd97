"""Concept packs on disk: read, checked, written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from steerserve.errors import AssetError
from steerserve.sae.formats.whole import written_whole
from steerserve.steering.packs import ConceptPack, PackCard, PackTensors
from steerserve.types import Op

TENSORS = "pack.safetensors"
CARD = "card.json"
UNBOUNDED = {"threshold": -np.inf, "max_norm": np.inf}
"""Tensors that may hold an infinity, and which."""
DTYPES = {"site": np.dtype(np.int64), "feature_ids": np.dtype(np.int64), "edited": np.dtype(np.bool_)}
"""Of those tensors that are not float32."""

Arrays = dict[str, npt.NDArray[Any]]


class _TensorError(Exception):
    """What is wrong with which tensor; ``load_pack`` and ``save_pack`` add the directory."""


def load_pack(directory: Path) -> ConceptPack:
    """Read and check a pack.

    Raises:
        AssetError: a file is missing or damaged, the two are of different packs, or do not make a valid one.
    """
    try:
        tensor_bytes = (directory / TENSORS).read_bytes()
        card_bytes = (directory / CARD).read_bytes()
        card = PackCard.model_validate_json(card_bytes)
        arrays = load(tensor_bytes)
    except OSError as error:
        raise AssetError(f"concept pack {directory}: cannot read {error.filename}: {error.strerror}") from error
    except SafetensorError as error:
        raise AssetError(f"concept pack {directory}: {TENSORS} is damaged: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        remedy = "; a pack of another format has to be built again" if where == "format" else ""
        raise AssetError(f"concept pack {directory}: {CARD}: {where}: {problem['msg']}{remedy}") from error
    tensors = _checked_tensors(arrays, card, directory)
    found = hashlib.sha256(tensor_bytes).hexdigest()
    if card.tensors_sha256 not in (None, found):
        expected = f"{CARD} belongs to one with SHA-256 {card.tensors_sha256}"
        raise AssetError(f"concept pack {directory}: {TENSORS} has SHA-256 {found}, but {expected}")
    return ConceptPack(card, tensors, hashlib.sha256(tensor_bytes + card_bytes).hexdigest())


def save_pack(card: PackCard, tensors: PackTensors, directory: Path) -> ConceptPack:
    """Write a pack and return it as loaded; its card names its tensors, so that no reader takes parts of two for one.

    Raises:
        AssetError: the tensors do not make a valid pack.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in vars(tensors).items()}
    _checked_tensors(arrays, card, directory)
    tensor_bytes = save(arrays)
    card = card.model_copy(update={"tensors_sha256": hashlib.sha256(tensor_bytes).hexdigest()})
    directory.mkdir(parents=True, exist_ok=True)
    with written_whole(directory / TENSORS) as tensors_file, written_whole(directory / CARD) as card_file:
        tensors_file.write_bytes(tensor_bytes)
        card_file.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return load_pack(directory)


def _checked_tensors(arrays: Arrays, card: PackCard, directory: Path) -> PackTensors:
    try:
        _check_arrays(arrays)
        tensors = PackTensors(**arrays)
        _check_sites(tensors, card)
        _check_use(tensors, card)
    except _TensorError as error:
        raise AssetError(f"concept pack {directory}: {TENSORS}: {error}") from None
    return tensors


def _check_arrays(arrays: Arrays) -> None:
    """Names, shapes, types and finite values."""
    names = set(PackTensors.__dataclass_fields__)
    if set(arrays) != names:
        raise _TensorError(f"{', '.join(sorted(names ^ set(arrays)))}: missing or unknown tensor")
    encoder = arrays["W_enc"]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise _TensorError(f"W_enc: shape {list(encoder.shape)}, expected [k, d]")
    for name, array in arrays.items():
        shape = encoder.shape if name in ("W_enc", "W_dec") else encoder.shape[:1]
        dtype = DTYPES.get(name, np.dtype(np.float32))
        if array.shape != shape or array.dtype != dtype:
            expected = f"{dtype.name} {list(shape)}"
            raise _TensorError(f"{name}: {array.dtype.name} {list(array.shape)}, expected {expected}")
        allowed = np.isfinite(array) | (array == UNBOUNDED.get(name, 0.0))
        if not allowed.all():
            raise _TensorError(f"{name}: NaN or infinite values")
    if not (arrays["max_activation"] > 0).all():
        raise _TensorError("max_activation: expected values above 0")


def _check_sites(tensors: PackTensors, card: PackCard) -> None:
    """Every site has rows, and no feature of its SAE twice."""
    if set(tensors.site.tolist()) != set(range(len(card.sites))):
        expected = f"each of the {len(card.sites)} of {CARD}, counted from 0"
        raise _TensorError(f"site: names {sorted(set(tensors.site.tolist()))}, expected {expected}")
    for index, site in enumerate(card.sites):
        features = tensors.feature_ids[(tensors.site == index) & (tensors.feature_ids >= 0)]
        if len(np.unique(features)) < len(features):
            raise _TensorError(f"feature_ids: a feature appears twice at {site}")
        if len(features) and site not in card.saes:
            raise _TensorError(f"feature_ids: features of an SAE at {site}, but {CARD} names none there")


def _check_use(tensors: PackTensors, card: PackCard) -> None:
    """Every row is edited or read by the detector, which reads one site."""
    read = tensors.weight != 0
    if not (read | tensors.edited).all():
        row = int(np.flatnonzero(~(read | tensors.edited))[0])
        raise _TensorError(f"edited: row {row} is neither edited nor has a weight in the detector")
    if not read.any():
        raise _TensorError("weight: all zero: the detector reads nothing")
    if (tensors.site[read] != card.sites.index(card.detector.site)).any():
        raise _TensorError(f"weight: expected 0 at every site but the detector's, {card.detector.site}")
    if not tensors.edited.any() and card.policy.op is not Op.MONITOR:
        raise _TensorError(f"edited: no row, but the policy's op is {card.policy.op}")
