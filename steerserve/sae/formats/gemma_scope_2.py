"""Gemma Scope 2: ``config.json`` and ``params.safetensors``, for Gemma 3. JumpReLU, without subtraction of b_dec.

Sites are modules of Hugging Face's model (``hf_hook_point_in``, ``hf_hook_point_out``); transcoders read behind the
norm and its gain. The skip connection is stored as ``[d_in, d_out]``. Cross-layer transcoders are refused.
"""

from __future__ import annotations

import torch

from steerserve.errors import AssetError
from steerserve.sae.formats.files import Source, TensorFile, identified, read_json, read_safetensors, sha256_of
from steerserve.sae.formats.folding import threshold_of
from steerserve.sae.formats.sites import named_site, read_site
from steerserve.sae.model import SAE

CONFIG = "config.json"
WEIGHTS = "params.safetensors"


def read(source: Source) -> SAE:
    """Read an SAE directory.

    Raises:
        AssetError: files missing or damaged, or a kind of SAE or a site that is not supported.
    """
    path = source.path / CONFIG
    config = read_json(path)
    if config.get("architecture") != "jump_relu":
        raise AssetError(f"{path}: architecture is {config.get('architecture')!r}, expected 'jump_relu'")
    site = read_site(source, path, "hf_hook_point_in", config.get("hf_hook_point_in")).site
    out_name = config.get("hf_hook_point_out")
    out_site = named_site(path, "hf_hook_point_out", out_name) if out_name else site
    tensors = _read_weights(read_safetensors(source.path / WEIGHTS))
    metadata = {key: config[key] for key in ("model_name", "type") if key in config}
    sae = SAE(
        name=source.name,
        site=site,
        W_enc=tensors["w_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["w_dec"],
        b_dec=tensors["b_dec"],
        threshold=threshold_of(tensors["threshold"]),
        apply_b_dec_to_input=False,
        sha256=sha256_of(source.path / WEIGHTS),
        metadata=metadata | ({"declared_l0": float(config["l0"])} if config.get("l0") else {}),
        W_skip=tensors.get("W_skip"),
        transcodes_to=None if out_site == site else out_site,
    )
    return identified(sae)


def _read_weights(file: TensorFile) -> dict[str, torch.Tensor]:
    if len(shape := file.shape("w_dec")) == 3:
        raise AssetError(f"{file.path}: a cross-layer transcoder (w_dec has shape {shape}) is not supported")
    d_in, d_sae = file.matrix_shape("w_enc")
    _, d_out = file.matrix_shape("w_dec")
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    tensors = {name: file.take(name, *shape) for name, shape in (shapes | {"threshold": (d_sae,)}).items()}
    if "affine_skip_connection" in file:
        tensors["W_skip"] = file.take("affine_skip_connection", d_in, d_out).T.contiguous()
    file.finish("a Gemma Scope 2 SAE")
    return tensors
