"""Names of sites and heads: every form that is read, the one that is written, and what is refused."""

from __future__ import annotations

import random

import pytest

from steerserve.errors import InvalidRequestError
from steerserve.types import HeadTarget, Site, Stream


@pytest.mark.parametrize("stream", Stream)
def test_what_is_written_is_read_again(stream: Stream) -> None:
    assert Site.parse(str(Site(12, stream))) == Site(12, stream)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.0.hook_resid_pre", Site(0, Stream.RESID_PRE)),
        ("blocks.3.mlp.hook_in", Site(3, Stream.MLP_IN)),
        ("blocks.3.attn.hook_z", Site(3, Stream.ATTN_Z)),
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
        "blocks.3.hook_attn_z",
        "blocks.3.hook_z",
        "blocks.3.hook_mlp",
        "blocks.3.mlp.hook_out",
        "blocks.3.hook_resid_post ",
        "model.layers.4.mlp",
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"attn_out, mlp_out, resid_post, 'blocks\.<layer>\.attn\.hook_z'"):
        Site.parse(name)


def test_sites_sort_as_the_forward_pass_reaches_them() -> None:
    names = ["resid_pre", "attn_z", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    in_order = [Site(layer, Stream(name)) for layer in (0, 1) for name in names]
    assert sorted(random.Random(0).sample(in_order, len(in_order))) == in_order


def test_names_of_heads_are_read_as_they_are_written() -> None:
    head = HeadTarget.parse("L12H5")
    assert (head, str(head), head.site) == (HeadTarget(12, 5), "L12H5", Site(12, Stream.ATTN_Z))
    for name in ("", "L12", "l12h5", "a12.h5", "L12H5 ", "L-1H0", "L1H99999"):
        with pytest.raises(InvalidRequestError, match="'L<layer>H<head>', both counted from 0, such as L12H5"):
            HeadTarget.parse(name)
