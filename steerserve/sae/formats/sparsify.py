"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``. TopK after ReLU, which gives the values of TopK before.

The site is in the directory's name alone, a module of the model: ``layers.10`` (the residual stream behind it),
``layers.10.mlp``, ``h.0.attn``. With ``transcode`` the SAE reads that module's input and writes its output. Unless it
transcodes, b_dec is subtracted from the input, whatever ``normalize_decoder`` says; the skip connection reads x itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from steerserve.errors import AssetError
from steerserve.sae.formats.files import Source, TensorFile, identified, integer, read_json, read_safetensors, sha256_of
from steerserve.sae.formats.sites import site_from_name
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
_HOOKPOINT = re.compile(r"(?:layers|h)\.(?P<layer>\d+)(?:\.(?P<module>mlp|attn|self_attn|attention))?")
_RULE = "expected a directory named after a module, such as layers.10, layers.10.mlp or h.0.attn"


def read(source: Source) -> SAE:
    """Read an SAE directory.

    Raises:
        AssetError: files missing or damaged, an activation function that is not supported, or no site.
    """
    path = source.path / CONFIG
    config = read_json(path)
    _check(path, config)
    transcodes = bool(config.get("transcode", False))
    site, out_site = _sites(source, transcodes)
    d_in = integer(path, config, "d_in")
    d_sae = config.get("num_latents") or d_in * integer(path, config, "expansion_factor")
    tensors = _read_weights(read_safetensors(source.path / WEIGHTS), d_in, d_sae, bool(config.get("skip_connection")))
    run = source.path.parent / "config.json"
    model_name = read_json(run).get("model") if run.is_file() else None
    _check_model(source, site, out_site, model_name)
    sae = SAE(
        name=source.name,
        site=site,
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=torch.zeros(d_sae),
        apply_b_dec_to_input=not transcodes,
        sha256=sha256_of(source.path / WEIGHTS),
        metadata={"model_name": model_name} if model_name else {},
        k=integer(path, config, "k"),
        W_skip=tensors.get("W_skip"),
        transcodes_to=out_site if transcodes else None,
    )
    return identified(sae)


def _check(path: Path, config: dict[str, Any]) -> None:
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise AssetError(f"{path}: activation {activation!r} is not supported (supported: 'topk')")
    if config.get("signed"):
        raise AssetError(f"{path}: signed TopK, whose features may be negative, is not supported")


def _sites(source: Source, transcodes: bool) -> tuple[Site, Site]:
    """Where the SAE reads and where it writes."""
    name = source.origin.rstrip("/").rpartition("/")[2]
    match = _HOOKPOINT.fullmatch(name)
    module = match["module"] if match else None
    if transcodes and (match is None or module not in (None, "mlp")):
        raise AssetError(f"{source.origin}: a transcoder of a whole layer or its MLP is supported ({_RULE})")
    outputs = {None: Stream.RESID_POST, "mlp": Stream.MLP_OUT}
    out = Site(int(match["layer"]), outputs.get(module, Stream.ATTN_OUT)) if match else None
    if not transcodes:
        site = site_from_name(source, out, _RULE)
        return site, site
    assert out is not None
    return Site(out.layer, Stream.RESID_PRE if module is None else Stream.MLP_IN), out


def _read_weights(file: TensorFile, d_in: int, d_sae: int, skips: bool) -> dict[str, torch.Tensor]:
    """``W_dec`` is ``[d_sae, d_in]`` in the file too."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if skips:
        shapes["W_skip"] = (d_in, d_in)
    tensors = {name: file.take(name, *shape) for name, shape in shapes.items()}
    file.finish("a sparsify SAE")
    return tensors


def _check_model(source: Source, site: Site, out_site: Site, model_name: object) -> None:
    """In Gemma a norm follows attention and MLP, so that the module's output is not what the residual stream gets."""
    behind_norm = {Stream.MLP_OUT, Stream.ATTN_OUT} & {site.stream, out_site.stream}
    if behind_norm and "gemma" in str(model_name).lower():
        raise AssetError(f"{source.origin}: the output of a module of {model_name} before its norm is not a site")
