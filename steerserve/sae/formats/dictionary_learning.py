"""dictionary_learning: ``ae.pt``, a pickled state dict, and ``config.json``.

``dict_class`` says which equations the tensors belong to. All but ``JumpReluAutoEncoder`` and ``AutoEncoderNew``
subtract b_dec first. ``AutoEncoderTopK`` selects by rank even where a threshold is stored; BatchTopK classes need
theirs, and −1 means that training ended before it was measured. ``AutoEncoder`` gets decoder rows of unit norm, as the
library's own loader gives it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from steerserve.errors import AssetError
from steerserve.sae.formats.files import Source, TensorFile, identified, read_json, read_pickled, sha256_of, tensors_of
from steerserve.sae.formats.folding import fold_decoder_norm, fold_gate, threshold_of
from steerserve.sae.formats.sites import site_from_name
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

CONFIG = "config.json"
WEIGHTS = "ae.pt"
_LINEAR = ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")
_MATRICES = ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
CLASSES = (*_LINEAR, *_MATRICES, "GatedAutoEncoder", "AutoEncoderNew")
_SUBMODULE = re.compile(r"(resid_pre|resid_post|mlp_out|attn_out)(?:_layer_(\d+))?")
_RULE = "expected trainer.layer, and trainer.submodule_name such as resid_post_layer_3"


def read(source: Source) -> SAE:
    """Read an SAE directory.

    Raises:
        AssetError: files missing or damaged, a pickle with code, a class that is not supported, or no site.
    """
    path = source.path / CONFIG
    trainer = read_json(path).get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in CLASSES:
        given = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise AssetError(f"{path}: trainer.dict_class is {given!r}, expected one of {', '.join(CLASSES)}")
    kind: str = trainer["dict_class"]
    site = site_from_name(source, _site(trainer), _RULE)
    file = tensors_of(source.path / WEIGHTS, read_pickled(source.path / WEIGHTS))
    if kind == "AutoEncoder" and "decoder.bias" in file:
        kind = "AutoEncoderNew"  # its trainer writes the other's name
    tensors = _read_weights(file, kind)
    k = _take_k(file) if kind == "AutoEncoderTopK" else None
    file.drop("k", "group_sizes")
    file.finish(f"an SAE of class {kind}")
    sae = SAE(
        name=source.name,
        site=site,
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=threshold_of(tensors["threshold"]),
        apply_b_dec_to_input=kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"),
        sha256=sha256_of(source.path / WEIGHTS),
        metadata={"model_name": trainer["lm_name"]} if trainer.get("lm_name") else {},
        k=k,
    )
    return identified(sae, dict_class=kind)


def _site(trainer: Mapping[str, Any]) -> Site | None:
    match = _SUBMODULE.fullmatch(str(trainer.get("submodule_name")))
    layer = trainer.get("layer")
    layer = int(match[2]) if match and match[2] else layer
    return Site(layer, Stream(match[1])) if match and isinstance(layer, int) else None


def _read_weights(file: TensorFile, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of ``SAE``, whatever the class calls them."""
    if kind in _MATRICES:
        d_in, d_sae = file.matrix_shape("W_enc")
        tensors = {"W_enc": file.take("W_enc", d_in, d_sae), "W_dec": file.take("W_dec", d_sae, d_in)}
        tensors |= {"b_enc": file.take("b_enc", d_sae), "b_dec": file.take("b_dec", d_in)}
    else:
        d_sae, d_in = file.matrix_shape("encoder.weight")
        W_enc = file.take("encoder.weight", d_sae, d_in).T
        tensors = {"W_enc": W_enc, "W_dec": file.take("decoder.weight", d_in, d_sae).T.contiguous()}
        b_dec = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
        tensors["b_dec"] = file.take(b_dec.get(kind, "b_dec"), d_in)
        if kind == "GatedAutoEncoder":
            gate = (file.take(name, d_sae) for name in ("gate_bias", "mag_bias", "r_mag"))
            return tensors | fold_gate(W_enc, *gate)
        tensors["b_enc"] = file.take("encoder.bias", d_sae)
    tensors["threshold"] = _threshold(file, kind, d_sae)
    if kind == "AutoEncoder":
        norm = tensors["W_dec"].norm(dim=1)
        return tensors if torch.allclose(norm, torch.ones_like(norm)) else fold_decoder_norm(tensors)
    return tensors


def _threshold(file: TensorFile, kind: str, d_sae: int) -> torch.Tensor:
    if kind == "JumpReluAutoEncoder":
        return file.take("threshold", d_sae)
    if kind not in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        file.drop("threshold")
        return torch.zeros(d_sae)
    value = file.take("threshold")
    if value < 0:
        raise AssetError(
            f"{file.path}: the threshold of this BatchTopK SAE was never set ({value:g}); without it, which features "
            "are active depends on the other tokens of a batch"
        )
    return value.expand(d_sae).clone()


def _take_k(file: TensorFile) -> int:
    k = int(file.take("k"))
    if k < 1:
        raise AssetError(f"{file.path}: k is {k}, expected a positive integer")
    return k
