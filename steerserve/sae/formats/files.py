"""What all loaders share: reading files so that each error names the file, what it holds and what it should."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from steerserve.errors import AssetError
from steerserve.sae.model import SAE
from steerserve.types import Site

NormGain = Callable[[int], torch.Tensor]
"""By layer."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where an SAE is read from, and what its user adds to what the files say.

    Attributes:
        path: the directory, or the file of a format that is a single one.
        name: what the SAE will be called.
        origin: the path, or ``org/repository/folder`` on the hub; some formats state the site in such names alone.
        site: where the SAE reads, for a format whose files do not say.
        norm_scaling_factor: √d / mean |x| over the training activations, for ``expected_average_only_in``.
        norm_gain: gain ``[d_in]`` of the norm before a layer's MLP, for an SAE that reads ``ln2.hook_normalized``.
    """

    path: Path
    name: str
    origin: str
    site: Site | None = None
    norm_scaling_factor: float | None = None
    norm_gain: NormGain | None = None


class TensorFile:
    """The tensors of one file, handed out once each, checked and in fp32.

    What nobody has taken when ``finish`` is called would change the equations in a way that we do not know.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there.

        Raises:
            AssetError: it is missing.
        """
        if name not in self._tensors:
            raise AssetError(f"{self.path}: tensor {name} is missing")
        return tuple(self._tensors[name].shape)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix that must be there.

        Raises:
            AssetError: it is missing, or no matrix.
        """
        shape = self.shape(name)
        if len(shape) != 2:
            raise AssetError(f"{self.path}: {name} has shape {shape}, expected a matrix")
        return shape[0], shape[1]

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor ``name`` as fp32, which must have ``shape``.

        Raises:
            AssetError: it is missing, of another shape, or holds NaN or infinity.
        """
        if self.shape(name) != shape:
            raise AssetError(f"{self.path}: {name} has shape {self.shape(name)}, expected {shape}")
        tensor = self._tensors.pop(name).float()
        if not torch.isfinite(tensor).all():
            raise AssetError(f"{self.path}: {name} holds NaN or infinity")
        return tensor

    def drop(self, *names: str) -> None:
        """Pass over tensors that say nothing about the equations."""
        for name in names:
            self._tensors.pop(name, None)

    def finish(self, kind: str) -> None:
        """Refuse what is left.

        Raises:
            AssetError: a tensor that has no place in ``kind``.
        """
        if self._tensors:
            raise AssetError(f"{self.path}: {', '.join(sorted(self._tensors))} has no place in {kind}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AssetError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise AssetError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise AssetError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AssetError(f"{path}: expected a JSON object")
    return content


def read_safetensors(path: Path) -> TensorFile:
    """All tensors of a safetensors file.

    Raises:
        AssetError: missing or damaged.
    """
    try:
        return TensorFile(path, load_file(path))
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{path} cannot be read as safetensors: {error}") from error


def read_npz(path: Path) -> TensorFile:
    """All arrays of a numpy archive; pickled objects in it are refused.

    Raises:
        AssetError: missing, damaged, or with arrays that are not of numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return TensorFile(path, {name: torch.from_numpy(arrays[name]) for name in arrays.files})
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise AssetError(f"{path} cannot be read as a numpy archive of numbers: {error}") from error


def read_pickled(path: Path) -> dict[str, Any]:
    """A dictionary that ``torch.save`` wrote; a file that would run code is refused, and none of it is run.

    Raises:
        AssetError: missing, damaged, not a dictionary, or with anything but tensors and plain data.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AssetError(f"{path} is refused: it holds more than tensors, and loading it could run code") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise AssetError(f"{path} cannot be read as a torch file: {error}") from error
    if not isinstance(content, dict):
        raise AssetError(f"{path}: expected a dictionary of tensors, not a {type(content).__name__}")
    return content


def tensors_of(path: Path, content: Mapping[str, Any]) -> TensorFile:
    """A state dict that ``read_pickled`` read.

    Raises:
        AssetError: an entry is no tensor.
    """
    if others := [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise AssetError(f"{path}: {', '.join(others)}: expected tensors alone")
    return TensorFile(path, content)


def integer(path: Path, config: Mapping[str, Any], key: str) -> int:
    """A positive integer of a config.

    Raises:
        AssetError: missing or something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AssetError(f"{path}: {key} is {value!r}, expected a positive integer")
    return value


def positive(path: Path, config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of a config; may be infinite.

    Raises:
        AssetError: missing and without ``default``, or something else.
    """
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or value <= 0:
        raise AssetError(f"{path}: {key} is {value!r}, expected a positive number")
    return float(value)


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def identified(sae: SAE, **folded: object) -> SAE:
    """``sae``, whose ``sha256`` is that of its weight file, with the hash of all that decides what it computes.

    Not the tensors themselves are hashed, which differ in their last bits between processors.

    Args:
        folded: what else than the weight file its tensors were made of.
    """
    facts = {
        "weights": sae.sha256,
        "site": str(sae.site),
        "out_site": str(sae.out_site),
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "max_norm": sae.max_norm,
        "k": sae.k,
        "normalisation": str(sae.normalisation),
        **folded,
    }
    return replace(sae, sha256=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
