"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``.

The SAE was trained on x · s with s = √d / (mean |x| over the dataset), and its encoder's and decoder's biases are in
those units, but ``jump_relu_threshold``, one number for all features, is in units of x itself: the threshold of
the stored encoder is θ · s. What is returned has s folded in, its features in the units of training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from steerserve.errors import AssetError
from steerserve.sae.formats.files import Source, identified, integer, positive, read_json, read_safetensors, sha256_of
from steerserve.sae.formats.folding import fold_input_scale
from steerserve.sae.formats.sites import named_site, read_site
from steerserve.sae.model import SAE

CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"
SMALLEST_NORM = 1e-8
"""A decoder row below it has no effect; its threshold stays finite."""

_REQUIRED = {
    "act_fn": ("jumprelu",),
    "norm_activation": ("dataset-wise",),
    "use_glu_encoder": (False, None),
    "apply_decoder_bias_to_pre_encoder": (False, None),
}


def read(source: Source) -> SAE:
    """Read an SAE directory.

    Raises:
        AssetError: files missing or damaged, a scale that is missing, or equations that are not supported.
    """
    path = source.path / CONFIG
    config = read_json(path)
    for key, supported in _REQUIRED.items():
        if (value := config.get(key)) not in supported:
            raise AssetError(f"{path}: {key}={value!r} is not supported (supported: {supported[0]!r})")
    site = read_site(source, path, "hook_point_in", config.get("hook_point_in")).site
    out_site = named_site(path, "hook_point_out", config.get("hook_point_out", config.get("hook_point_in")))
    d_in, d_sae = integer(path, config, "d_model"), integer(path, config, "d_sae")
    scale, out_scale = _scale(path, config, "in", d_in), _scale(path, config, "out", d_in)
    file = read_safetensors(source.path / WEIGHTS)
    tensors = {
        "W_enc": file.take("encoder.weight", d_sae, d_in).T,
        "W_dec": file.take("decoder.weight", d_in, d_sae).T.contiguous(),
        "b_dec": file.take("decoder.bias", d_in),
    }
    b_enc = file.take("encoder.bias", d_sae)
    file.finish("a Llama Scope SAE")
    theta = positive(path, config, "jump_relu_threshold") * scale
    threshold = torch.full((d_sae,), theta)
    by_decoder_norm = bool(config.get("sparsity_include_decoder_norm"))
    if by_decoder_norm:
        # pre · |W_dec| is compared, and f is pre
        threshold = threshold / tensors["W_dec"].norm(dim=1).clamp(min=SMALLEST_NORM)
    tensors = fold_input_scale(tensors, scale, out_scale)
    sae = SAE(
        name=source.name,
        site=site,
        W_enc=tensors["W_enc"],
        b_enc=b_enc,
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=threshold,
        apply_b_dec_to_input=False,
        sha256=sha256_of(source.path / WEIGHTS),
        metadata={"norm_scaling_factor": scale},
        transcodes_to=None if out_site == site else out_site,
    )
    return identified(sae, scale=scale, out_scale=out_scale, threshold=theta, by_decoder_norm=by_decoder_norm)


def _scale(path: Path, config: dict[str, Any], side: str, d_model: int) -> float:
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict) or side not in norms:
        raise AssetError(f"{path}: dataset_average_activation_norm.{side} is missing; it gives the SAE its scale")
    return math.sqrt(d_model) / positive(path, norms, side)
