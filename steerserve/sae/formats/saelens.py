"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``.

BatchTopK and Matryoshka SAEs are ``jumprelu`` files. ``sparsity.safetensors`` beside them, the decimal logarithms of
the features' densities, gives the declared L0. What we write, SAELens itself loads; ``max_norm`` and
``weights_sha256`` of the metadata and ``max_activation.safetensors`` are ours, and it passes over them.

What we write replaces an SAE so that no reader takes parts of two for one: the config names its weight file by hash,
and the largest activations name their SAE.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.sae.formats.files import Source, identified, positive, read_safetensors, sha256_of
from steerserve.sae.formats.folding import (
    fold_centring,
    fold_decoder_norm,
    fold_gain,
    fold_gate,
    fold_input_scale,
    threshold_of,
)
from steerserve.sae.formats.saelens_config import SAELensConfig, read_config
from steerserve.sae.formats.sites import ReadSite, named_site, read_site
from steerserve.sae.formats.whole import written_whole
from steerserve.sae.model import SAE, Normalisation
from steerserve.types import Stream

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
MAX_ACTIVATION = "max_activation.safetensors"
WEIGHTS_SHA256 = "weights_sha256"
"""In the config's metadata."""
SAE_SHA256 = "sae_sha256"
"""In the metadata of ``max_activation.safetensors``."""
LAYOUT_VERSION = "6.0.0"
"""SAELens version whose ``cfg.json`` we write; of a file that names none, SAELens drops the metadata."""


def read(source: Source) -> SAE:
    """Read an SAE directory.

    Raises:
        AssetError: files missing, damaged or of several SAEs, tensors missing, unknown, of the wrong shape or not
            finite, or equations that ``SAE`` does not compute.
    """
    path = source.path / CONFIG
    config = read_config(path)
    where = read_site(source, path, "metadata.hook_name", _hook_name(config))
    scaled = config.normalisation == "expected_average_only_in"
    normalisation = Normalisation.NONE if scaled else Normalisation(config.normalisation)
    tensors = _folded(source, path, config, where, _read_weights(source.path / WEIGHTS, config))
    out_name = config.metadata.get("hook_name_out")
    out_site = named_site(path, "metadata.hook_name_out", out_name) if config.transcodes else None
    in_place = out_site == where.site and normalisation is Normalisation.NONE
    sae = SAE(
        name=source.name,
        site=where.site,
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"],
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        max_norm=positive(path, config.metadata, "max_norm", default=math.inf),
        sha256=_sha256_of_weights(source.path, config),
        metadata=_kept(config.metadata) | _declared(source.path / SPARSITY, config.d_sae),
        k=config.k,
        normalisation=normalisation,
        W_skip=tensors.get("W_skip"),
        transcodes_to=None if in_place else out_site,
    )
    sae = identified(
        sae,
        by_decoder_norm=config.rescale_acts_by_decoder_norm,
        centred=config.is_centred,
        gain=where.gain is not None,
        scale=source.norm_scaling_factor if scaled else None,
    )
    return replace(sae, max_activation=_max_activation(source.path / MAX_ACTIVATION, sae))


def _sha256_of_weights(directory: Path, config: SAELensConfig) -> str:
    found = sha256_of(directory / WEIGHTS)
    if (named := config.metadata.get(WEIGHTS_SHA256, found)) != found:
        raise AssetError(f"{directory / CONFIG} is of weights with SHA-256 {named}; {WEIGHTS} has {found}")
    return found


def _max_activation(path: Path, sae: SAE) -> torch.Tensor | None:
    """``[d_sae]``, or None if there is no such file; one that names no SAE is believed."""
    if not path.is_file():
        return None
    largest = read_safetensors(path).take("max_activation", sae.d_sae)
    with safe_open(path, framework="pt") as file:
        named = (file.metadata() or {}).get(SAE_SHA256, sae.sha256)
    if named != sae.sha256:
        raise AssetError(
            f"{path} was measured of an SAE with SHA-256 {named}; this one has {sae.sha256}; delete it, and "
            "`steerserve lab eval` measures again"
        )
    return largest


def save_sae(sae: SAE, directory: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write ``sae`` so that ``load_sae`` and SAELens read it; matrices in ``dtype``, the rest in fp32.

    Raises:
        IncompatibleError: SAELens has no architecture for it.
    """
    architecture = _architecture_of(sae)
    transcodes = "transcoder" in architecture
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input and not transcodes,
        "normalize_activations": str(sae.normalisation),
        "reshape_activations": "none",
    }
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors["b_enc"] = sae.encoder_bias() if transcodes else sae.b_enc
    if "jumprelu" in architecture:
        tensors["threshold"] = sae.threshold
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    if transcodes:
        config["d_out"] = sae.d_out
    config["metadata"] = _metadata(sae, transcodes)
    kept = {name: tensor.to(dtype if name.startswith("W_") else torch.float32) for name, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    with written_whole(directory / WEIGHTS) as weights_file, written_whole(directory / CONFIG) as config_file:
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, weights_file)
        config["metadata"][WEIGHTS_SHA256] = sha256_of(weights_file)
        config_file.write_text(json.dumps(config, indent=1) + "\n")
        (directory / MAX_ACTIVATION).unlink(missing_ok=True)
    if sae.max_activation is not None:
        saved = read(Source(directory, sae.name, origin=""))
        save_max_activation(sae.max_activation, saved, directory)


def save_max_activation(max_activation: torch.Tensor, sae: SAE, directory: Path) -> None:
    """Record the largest activations ``[d_sae]`` beside ``sae``, as loaded; they give ``2.0x`` values their meaning."""
    with written_whole(directory / MAX_ACTIVATION) as partial:
        save_file({"max_activation": max_activation.float().contiguous()}, partial, {SAE_SHA256: sae.sha256})


def _architecture_of(sae: SAE) -> str:
    """SAELens' name; an SAE with a skip connection at one site is a skip transcoder from that site to itself."""
    transcodes = sae.transcodes_to is not None or sae.W_skip is not None
    if (transcodes and sae.k is not None) or (sae.W_skip is not None and sae.normalises and not sae.transcodes_to):
        kind = "TopK transcoder" if sae.k is not None else "autoencoder with both normalisation and skip connection"
        raise IncompatibleError("sae", sae.name, f"an architecture of SAELens, which has no {kind}")
    if sae.k is not None:
        return "topk"
    jumps = bool((sae.threshold > 0).any())
    if not transcodes:
        return "jumprelu" if jumps else "standard"
    return ("jumprelu_" if jumps else "") + ("transcoder" if sae.W_skip is None else "skip_transcoder")


def _metadata(sae: SAE, transcodes: bool) -> dict[str, Any]:
    metadata = {**sae.metadata, "hook_name": str(sae.site), "sae_lens_version": LAYOUT_VERSION}
    for stale in ("max_norm", "hook_name_out", "hf_hook_name", "hf_hook_name_out"):
        metadata.pop(stale, None)
    if processing := metadata.get("model_from_pretrained_kwargs"):
        kept = {name: value for name, value in processing.items() if name != "center_writing_weights"}
        metadata["model_from_pretrained_kwargs"] = kept
    if transcodes:
        metadata["hook_name_out"] = str(sae.out_site)
    return metadata if math.isinf(sae.max_norm) else metadata | {"max_norm": sae.max_norm}


def _kept(metadata: dict[str, Any]) -> dict[str, Any]:
    """Without what says something of the file alone."""
    return {name: value for name, value in metadata.items() if name != WEIGHTS_SHA256}


def _hook_name(config: SAELensConfig) -> object:
    """The name of the site read; SAELens calls Gemma Scope 2's by a hook before the norm and keeps the true one."""
    name = config.metadata.get("hook_name")
    true_name = config.metadata.get("hf_hook_name")
    return true_name if true_name and str(name).endswith(".hook_mlp_in") else name


def _read_weights(path: Path, config: SAELensConfig) -> dict[str, torch.Tensor]:
    """The tensors of the file in fp32, complete and checked; a gate becomes a threshold."""
    file = read_safetensors(path)
    kind = f"a {config.architecture} SAE"
    if "scaling_factor" in file and (file.take("scaling_factor", config.d_sae) != 1).any():
        raise AssetError(f"{path}: scaling_factor has no place in {kind}")  # of ones, old files have it for nothing
    tensors = {name: file.take(name, *shape) for name, shape in config.shapes.items()}
    file.finish(kind)
    if config.architecture == "gated":
        tensors |= fold_gate(tensors["W_enc"], *(tensors.pop(name) for name in ("b_gate", "b_mag", "r_mag")))
    return tensors | {"threshold": threshold_of(tensors.get("threshold", torch.zeros(config.d_sae)))}


def _folded(
    source: Source, path: Path, config: SAELensConfig, where: ReadSite, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``tensors`` with all that happened to the activations before this SAE read them, in the order of SAELens."""
    if config.normalisation == "expected_average_only_in":
        if (scale := source.norm_scaling_factor) is None:
            raise AssetError(
                f"{path}: the SAE was trained on normalised activations (expected_average_only_in) and the file lacks "
                "their scale; give the norm scaling factor, √d / mean |x|"
            )
        tensors = fold_input_scale(tensors, scale, scale)
    if config.rescale_acts_by_decoder_norm:
        tensors = fold_decoder_norm(tensors)
    centred = config.is_centred and where.site.stream is not Stream.MLP_IN
    normalises = config.normalisation in ("layer_norm", "constant_norm_rescale")
    if (normalises and where.gain is not None) or (config.normalisation == "constant_norm_rescale" and centred):
        raise AssetError(f"{path}: normalize_activations={config.normalisation!r} is not supported at this site")
    if centred:
        tensors = fold_centring(tensors, config.apply_b_dec_to_input)
    return tensors if where.gain is None else fold_gain(tensors, where.gain, config.transcodes)


def _declared(path: Path, d_sae: int) -> dict[str, float]:
    if not path.is_file():
        return {}
    return {"declared_l0": round((10 ** read_safetensors(path).take("sparsity", d_sae).double()).sum().item(), 2)}
