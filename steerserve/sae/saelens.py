"""SAEs on disk in the SAELens format: ``cfg.json`` and ``sae_weights.safetensors``.

Read: architectures ``standard`` (ReLU) and ``jumprelu`` (also what SAELens saves for BatchTopK and
Matryoshka training), without run-time input normalisation. Anything else is refused with its
reason, never approximated. Written: ``jumprelu``, loadable by SAELens itself; the largest activations
go into ``max_activation.safetensors`` beside it, which SAELens does not read.
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

from steerserve.errors import AssetError
from steerserve.sae.model import SAE
from steerserve.types import Site

WEIGHTS = "sae_weights.safetensors"
MAX_ACTIVATION = "max_activation.safetensors"
THRESHOLDED = ("standard", "jumprelu")


def load_sae(directory: Path) -> SAE:
    """Load an SAE as fp32, named after its directory.

    Raises:
        AssetError: files missing or damaged, tensors missing or of the wrong shape, non-finite
            weights, or an architecture or normalisation that is not supported.
    """
    config = _read_config(directory)
    architecture = config.get("architecture", "standard")
    if architecture not in THRESHOLDED:
        raise AssetError(
            f"{directory}: architecture {architecture!r} is not supported (supported: {', '.join(THRESHOLDED)})"
        )
    if config.get("normalize_activations", "none") != "none":
        mode = config["normalize_activations"]
        raise AssetError(f"{directory}: normalize_activations={mode!r} is not supported; fold it into the weights")
    tensors = _read_tensors(directory / WEIGHTS)
    d_in, d_sae = int(config["d_in"]), int(config["d_sae"])
    if architecture == "standard":
        tensors.setdefault("threshold", torch.zeros(d_sae))
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    for name, shape in shapes.items():
        _check_tensor(directory, name, tensors.get(name), shape)
    side = directory / MAX_ACTIVATION
    return SAE(
        name=directory.name,
        site=Site.parse(_hook_name(config, directory)),
        **{name: tensors[name].float() for name in shapes},
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        max_norm=float(config.get("metadata", {}).get("max_norm", math.inf)),
        max_activation=_read_tensors(side)["max_activation"].float() if side.is_file() else None,
        sha256=hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest(),
        metadata=config.get("metadata", {}),
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
        "metadata": {**sae.metadata, "hook_name": str(sae.site), **_domain(sae)},
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


def _domain(sae: SAE) -> dict[str, float]:
    return {} if math.isinf(sae.max_norm) else {"max_norm": sae.max_norm}


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "cfg.json"
    if not path.is_file():
        raise AssetError(f"{directory} holds no SAE in SAELens format (no cfg.json)")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise AssetError(f"{path} is not valid JSON: {error}") from error
    for key in ("d_in", "d_sae"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise AssetError(f"{path}: {key} is {config.get(key)!r}, expected a positive integer")
    return config


def _hook_name(config: dict[str, Any], directory: Path) -> str:
    name = config.get("metadata", {}).get("hook_name") or config.get("hook_name")
    if not isinstance(name, str):
        raise AssetError(f"{directory}/cfg.json: metadata.hook_name is missing; it says which site the SAE reads")
    return name


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{path} cannot be read as safetensors: {error}") from error


def _check_tensor(directory: Path, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise AssetError(f"{directory}/{WEIGHTS}: tensor {name} is missing")
    if tuple(tensor.shape) != shape:
        raise AssetError(f"{directory}/{WEIGHTS}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not torch.isfinite(tensor).all():
        raise AssetError(f"{directory}/{WEIGHTS}: {name} holds NaN or infinity")
