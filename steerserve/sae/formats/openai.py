"""OpenAI's SAEs of GPT-2 small: one ``.pt`` file each, a pickled state dict.

``activation`` names the function. With TopK, and only then, x is layer-normalised first, and the output
denormalised; nothing in the file says so. ``pre_bias`` is subtracted from the input and added to the output.
The site stands in the path: ``.../resid_post_mlp_v5_32k/autoencoders/8.pt``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from steerserve.errors import AssetError
from steerserve.sae.formats.files import Source, identified, integer, read_pickled, sha256_of, tensors_of
from steerserve.sae.formats.sites import site_from_name
from steerserve.sae.model import SAE, Normalisation
from steerserve.types import Site, Stream

_LOCATION = re.compile(r"(resid_post_mlp|resid_delta_mlp|resid_delta_attn)(?:_v\d+_\d+k)?/(?:autoencoders/)?(\d+)\.pt")
_STREAMS = {
    "resid_post_mlp": Stream.RESID_POST,
    "resid_delta_mlp": Stream.MLP_OUT,
    "resid_delta_attn": Stream.ATTN_OUT,
}
_RULE = f"expected a path such as resid_post_mlp_v5_32k/autoencoders/8.pt, with one of {', '.join(_STREAMS)}"


def read(source: Source) -> SAE:
    """Read a file.

    Raises:
        AssetError: a damaged file, a pickle with code, an activation function that is not supported, or no site.
    """
    content = read_pickled(source.path)
    activation = content.pop("activation", "ReLU")
    state = content.pop("activation_state_dict", {})
    k = _k(source, activation, state)
    match = _LOCATION.search(source.origin)
    site = site_from_name(source, Site(int(match[2]), _STREAMS[match[1]]) if match else None, _RULE)
    file = tensors_of(source.path, content)
    d_sae, d_in = file.matrix_shape("encoder.weight")
    encoder, decoder = file.take("encoder.weight", d_sae, d_in), file.take("decoder.weight", d_in, d_sae)
    b_enc, b_dec = file.take("latent_bias", d_sae), file.take("pre_bias", d_in)
    file.drop("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    file.finish("an SAE of OpenAI's")
    sae = SAE(
        name=source.name,
        site=site,
        W_enc=encoder.T,
        b_enc=b_enc,
        W_dec=decoder.T.contiguous(),
        b_dec=b_dec,
        threshold=torch.zeros(d_sae),
        sha256=sha256_of(source.path),
        metadata={"model_name": "gpt2"},
        k=k,
        normalisation=Normalisation.NONE if k is None else Normalisation.LAYER_NORM,
    )
    return identified(sae)


def _k(source: Source, activation: object, state: Mapping[str, Any]) -> int | None:
    """The k of TopK, or None with ReLU."""
    if activation == "ReLU":
        return None
    if activation != "TopK" or state.get("postact_fn", "ReLU") != "ReLU":
        given = f"{activation}, {state['postact_fn']}" if "postact_fn" in state else activation
        raise AssetError(f"{source.path}: activation {given!r} is not supported (supported: ReLU, TopK with ReLU)")
    return integer(source.path, state, "k")
