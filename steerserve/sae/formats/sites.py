"""The names by which formats call a site, and what has to be folded so that an SAE reads it there.

``ln2.hook_normalized`` in a model with RMSNorm is the norm's output *before* its gain, which no module of
Hugging Face's models computes. ``mlp.hook_in`` is that times the gain; with W_enc divided by the gain, row by
row, the SAE reads it there and computes the same. The gain is the model's, so it must be given.

In SAELens' list, Gemma Scope 2's transcoders read ``hook_mlp_in``, which in TransformerLens is the residual
stream before the norm, while they were trained behind it: that name is refused, unless the site is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.sae.formats.files import Source
from steerserve.types import Site, Stream

_BEFORE_GAIN = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")
_MISNAMED = re.compile(r"blocks\.\d+\.hook_mlp_in")
_HUGGING_FACE = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GEMMA_MODULES = {
    "output": Stream.RESID_POST,
    "post_attention_layernorm.output": Stream.ATTN_OUT,
    "pre_feedforward_layernorm.output": Stream.MLP_IN,
    "post_feedforward_layernorm.output": Stream.MLP_OUT,
}
"""Gemma's norms surround attention and MLP; ``hook_attn_out`` and ``hook_mlp_out`` are behind the second one."""


@dataclass(frozen=True, eq=False)
class ReadSite:
    """Where an SAE reads, and the gain ``[d_in]`` by which the activation there exceeds the named one, if any."""

    site: Site
    gain: torch.Tensor | None = None


def read_site(source: Source, file: Path, key: str, name: object) -> ReadSite:
    """The site that ``name``, found in ``file`` under ``key``, means.

    Raises:
        AssetError: no name, no such site, another one than ``source.site``, or a gain is needed and not given.
    """
    if source.site is not None and (name is None or _MISNAMED.fullmatch(str(name))):
        return ReadSite(source.site)
    if before_gain := _BEFORE_GAIN.fullmatch(str(name)):
        layer = int(before_gain[1])
        return ReadSite(Site(layer, Stream.MLP_IN), _gain(source, file, str(name), layer))
    site = named_site(file, key, name)
    if source.site not in (None, site):
        raise AssetError(f"{file}: {key} is {name!r}, which is {site}; {source.site} was asked for")
    return ReadSite(site)


def named_site(file: Path, key: str, name: object) -> Site:
    """The site called ``name``: a TransformerLens hook, or a module of a Gemma as ``model.layers.L.module.output``.

    Raises:
        AssetError: no name, or no such site.
    """
    if not isinstance(name, str):
        raise AssetError(f"{file}: {key} is missing; it says which site the SAE reads")
    module = _HUGGING_FACE.fullmatch(name)
    if module and module[2] in _GEMMA_MODULES:
        return Site(int(module[1]), _GEMMA_MODULES[module[2]])
    try:
        return Site.parse(name, key)
    except InvalidRequestError as error:
        raise AssetError(f"{file}: {error}") from error


def site_from_name(source: Source, derived: Site | None, rule: str) -> Site:
    """``source.site``, or else the one ``derived`` from a name outside of the files.

    Raises:
        AssetError: neither is there; ``rule`` says what the name would have to be.
    """
    site = source.site or derived
    if site is None:
        raise AssetError(f"{source.origin} does not say which site the SAE reads ({rule}); give the site")
    return site


def _gain(source: Source, file: Path, name: str, layer: int) -> torch.Tensor:
    if source.norm_gain is None:
        raise AssetError(
            f"{file}: the SAE reads {name}, the norm's output before its gain; "
            "give the model, whose gain is then folded into the encoder"
        )
    gain = source.norm_gain(layer).float()
    if not (gain.isfinite() & (gain != 0)).all():
        raise AssetError(f"{file}: the gain of {name} is zero or not finite in places, and cannot be folded")
    return gain
