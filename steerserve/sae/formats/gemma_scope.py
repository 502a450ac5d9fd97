"""Gemma Scope: ``params.npz``, for Gemma 2. JumpReLU, without subtraction of b_dec.

The file holds five tensors and nothing else: what it reads stands in the repository's name (``-res``, ``-mlp``,
``-att``, ``-transcoders``) and the layer in the folder's (``layer_12/width_16k/average_l0_82``).
Transcoders read the norm's output before its gain and write behind the second norm; see ``sites``.
"""

from __future__ import annotations

import re

from steerserve.errors import AssetError
from steerserve.sae.formats.files import Source, identified, read_npz, sha256_of
from steerserve.sae.formats.folding import fold_gain, threshold_of
from steerserve.sae.formats.sites import ReadSite, read_site
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

WEIGHTS = "params.npz"
_REPOSITORY = re.compile(r"gemma-scope-(?P<model>\d+b)-(?P<tuning>pt|it)-(?P<kind>res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(\d+)")
_L0 = re.compile(r"average_l0_(\d+)")
_HOOKS = {
    "res": "blocks.{}.hook_resid_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    "transcoders": "blocks.{}.ln2.hook_normalized",
}


def read(source: Source) -> SAE:
    """Read an SAE directory.

    Raises:
        AssetError: a damaged file, a site that is not supported, or one that nothing says.
    """
    path = source.path / WEIGHTS
    repository, layer = _REPOSITORY.search(source.origin), _LAYER.search(source.origin)
    where = _read_site(source, repository, layer)
    transcodes = where.site.stream is Stream.MLP_IN
    file = read_npz(path)
    d_in, d_sae = file.matrix_shape("W_enc")
    _, d_out = file.matrix_shape("W_dec")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    tensors = {name: file.take(name, *shape) for name, shape in (shapes | {"threshold": (d_sae,)}).items()}
    file.finish("a Gemma Scope SAE")
    if where.gain is not None:
        tensors = fold_gain(tensors, where.gain, transcodes)
    metadata = {"model_name": _model_name(repository)} if repository else {}
    l0 = _L0.search(source.origin)
    sae = SAE(
        name=source.name,
        site=where.site,
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=threshold_of(tensors["threshold"]),
        apply_b_dec_to_input=False,
        sha256=sha256_of(path),
        metadata=metadata | ({"declared_l0": float(l0[1])} if l0 else {}),
        transcodes_to=Site(where.site.layer, Stream.MLP_OUT) if transcodes else None,
    )
    return identified(sae, gain=where.gain is not None)


def _read_site(source: Source, repository: re.Match[str] | None, layer: re.Match[str] | None) -> ReadSite:
    if "embedding" in source.origin:
        raise AssetError(f"{source.origin}: the SAE reads the embedding, which is not a site")
    if repository is None or layer is None:
        if source.site is None:
            raise AssetError(
                f"{source.origin} does not say which site the SAE reads: expected a name such as "
                "gemma-scope-2b-pt-res/layer_12/..., or the site"
            )
        if source.site.stream is not Stream.MLP_IN:
            return ReadSite(source.site)
        hook = _HOOKS["transcoders"].format(source.site.layer)
    else:
        hook = _HOOKS[repository["kind"]].format(layer[1])
    return read_site(source, source.path / WEIGHTS, "hook", hook)


def _model_name(repository: re.Match[str]) -> str:
    return f"google/gemma-2-{repository['model']}" + ("-it" if repository["tuning"] == "it" else "")
