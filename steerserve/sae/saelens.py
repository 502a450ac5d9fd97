"""SAEs on disk in the SAELens format: ``cfg.json`` and ``sae_weights.safetensors``.

Read: architectures ``standard`` (ReLU) and ``jumprelu`` (also what SAELens saves for BatchTopK and
Matryoshka training), without run-time input normalisation. Anything else is refused with its
reason, never approximated. Written: ``jumprelu``, loadable by SAELens itself; the largest activations
go into ``max_activation.safetensors`` beside it, which SAELens does not read.

SAELens applies ReLU before it compares with the threshold: a negative threshold means 0 there, and is 0 here.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.sae.model import SAE
from steerserve.types import Site

WEIGHTS = "sae_weights.safetensors"
MAX_ACTIVATION = "max_activation.safetensors"
THRESHOLDED = ("standard", "jumprelu")
LAYOUT_VERSION = "6.0.0"
"""SAELens version whose ``cfg.json`` we write; of a file that names none, SAELens drops the metadata."""


def load_sae(directory: Path) -> SAE:
    """Load an SAE as fp32, named after its directory.

    Raises:
        AssetError: files missing or damaged, tensors missing or of the wrong shape, non-finite
            weights, or an architecture or normalisation that is not supported.
    """
    config = _read_config(directory)
    _check_equations(directory, config)
    tensors = _read_weights(directory / WEIGHTS, config)
    side = directory / MAX_ACTIVATION
    return SAE(
        name=directory.absolute().name,
        site=_site(directory, config),
        **tensors,
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        max_norm=_max_norm(directory, config),
        max_activation=_read_max_activation(side, config["d_sae"]) if side.is_file() else None,
        sha256=hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest(),
        metadata=config["metadata"],
    )


def save_sae(sae: SAE, directory: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write ``sae`` so that ``load_sae`` and SAELens read it; weights in ``dtype``, the rest in fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _metadata(sae),
    }
    (directory / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {name: getattr(sae, name).to(dtype).contiguous() for name in ("W_enc", "W_dec")}
    weights |= {name: getattr(sae, name).float().contiguous() for name in ("b_enc", "b_dec", "threshold")}
    save_file(weights, directory / WEIGHTS)
    if sae.max_activation is not None:
        save_max_activation(sae.max_activation, directory)


def save_max_activation(max_activation: torch.Tensor, directory: Path) -> None:
    """Record the largest activations ``[d_sae]`` beside an SAE; they give ``2.0x`` values their meaning."""
    save_file({"max_activation": max_activation.float().contiguous()}, directory / MAX_ACTIVATION)


def _metadata(sae: SAE) -> dict[str, Any]:
    metadata = {**sae.metadata, "hook_name": str(sae.site), "sae_lens_version": LAYOUT_VERSION}
    metadata.pop("max_norm", None)
    return metadata if math.isinf(sae.max_norm) else metadata | {"max_norm": sae.max_norm}


def _read_config(directory: Path) -> dict[str, Any]:
    """``cfg.json`` as a dict in which ``d_in``, ``d_sae`` and ``metadata`` are present and of the right type."""
    path = directory / "cfg.json"
    if not path.is_file():
        raise AssetError(f"{directory} holds no SAE in SAELens format (no cfg.json)")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise AssetError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.setdefault("metadata", {}), dict):
        raise AssetError(f"{path}: expected a JSON object whose metadata is one too")
    for key in ("d_in", "d_sae"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise AssetError(f"{path}: {key} is {config.get(key)!r}, expected a positive integer")
    return config


def _check_equations(directory: Path, config: dict[str, Any]) -> None:
    """Refuse what ``SAE`` does not compute; the names of activation functions are from SAELens before version 6."""
    architecture = config.setdefault("architecture", "standard")
    if architecture not in THRESHOLDED:
        raise AssetError(
            f"{directory}: architecture {architecture!r} is not supported (supported: {', '.join(THRESHOLDED)})"
        )
    normalisation = config.get("normalize_activations")
    if normalisation not in (None, False, "none"):
        raise AssetError(
            f"{directory}: normalize_activations={normalisation!r} is not supported; fold it into the weights"
        )
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation != "relu":
        raise AssetError(f"{directory}: activation function {activation!r} is not supported (supported: relu)")


def _site(directory: Path, config: dict[str, Any]) -> Site:
    name = config["metadata"].get("hook_name") or config.get("hook_name")
    if not isinstance(name, str):
        raise AssetError(f"{directory}/cfg.json: metadata.hook_name is missing; it says which site the SAE reads")
    try:
        return Site.parse(name, "metadata.hook_name")
    except InvalidRequestError as error:
        raise AssetError(f"{directory}/cfg.json: {error}") from error


def _max_norm(directory: Path, config: dict[str, Any]) -> float:
    value = config["metadata"].get("max_norm", math.inf)
    if not isinstance(value, int | float) or not value > 0:
        raise AssetError(f"{directory}/cfg.json: metadata.max_norm is {value!r}, expected a positive number")
    return float(value)


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The five tensors of ``SAE`` in fp32, complete and checked."""
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if config["architecture"] == "jumprelu":
        shapes["threshold"] = (d_sae,)
    tensors = _read_tensors(path)
    if (tensors.get("scaling_factor", torch.zeros(1)) == 1).all():
        del tensors["scaling_factor"]  # old files hold one that does nothing
    if unknown := tensors.keys() - shapes.keys():
        raise AssetError(f"{path}: {', '.join(sorted(unknown))} has no place in a {config['architecture']} SAE")
    for name, shape in shapes.items():
        _check_tensor(path, name, tensors.get(name), shape)
    threshold = tensors.pop("threshold", torch.zeros(d_sae)).float().clamp(min=0)
    return {name: tensor.float() for name, tensor in tensors.items()} | {"threshold": threshold}


def _read_max_activation(path: Path, d_sae: int) -> torch.Tensor:
    tensor = _read_tensors(path).get("max_activation")
    _check_tensor(path, "max_activation", tensor, (d_sae,))
    assert tensor is not None
    return tensor.float()


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{path} cannot be read as safetensors: {error}") from error


def _check_tensor(path: Path, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise AssetError(f"{path}: tensor {name} is missing")
    if tuple(tensor.shape) != shape:
        raise AssetError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not torch.isfinite(tensor).all():
        raise AssetError(f"{path}: {name} holds NaN or infinity")
