"""Names of sites: every form that is read, the one that is written, and what is refused."""

from __future__ import annotations

import random

import pytest

from steerserve.errors import InvalidRequestError
from steerserve.types import Site, Stream


@pytest.mark.parametrize("stream", Stream)
def test_what_is_written_is_read_again(stream: Stream) -> None:
    assert Site.parse(str(Site(12, stream))) == Site(12, stream)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.0.hook_resid_pre", Site(0, Stream.RESID_PRE)),
        ("blocks.3.mlp.hook_in", Site(3, Stream.MLP_IN)),
        ("blocks.10.hook_mlp_out", Site(10, Stream.MLP_OUT)),
        ("model.layers.4", Site(4, Stream.RESID_POST)),
        ("transformer.h.4", Site(4, Stream.RESID_POST)),
        ("gpt_neox.layers.4", Site(4, Stream.RESID_POST)),
    ],
)
def test_names_that_are_read(name: str, site: Site) -> None:
    assert Site.parse(name) == site


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.3",
        "blocks.-1.hook_resid_post",
        "blocks.3.hook_resid_mid",
        "blocks.3.hook_mlp_in",  # in TransformerLens the residual before the norm, which is another activation
        "blocks.3.hook_in",
        "blocks.3.attn.hook_in",
        "blocks.3.hook_mlp",
        "blocks.3.mlp.hook_out",
        "blocks.3.hook_resid_post ",
        "model.layers.4.mlp",
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"resid_pre, attn_out, mlp_out, resid_post, 'blocks\.<layer>\.mlp"):
        Site.parse(name)


def test_sites_sort_as_the_forward_pass_reaches_them() -> None:
    names = ["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    in_order = [Site(layer, Stream(name)) for layer in (0, 1) for name in names]
    assert sorted(random.Random(0).sample(in_order, len(in_order))) == in_order
