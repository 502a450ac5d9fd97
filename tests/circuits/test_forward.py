"""Reading and replacing on the way agrees with the model's own forward pass, in every family."""

from __future__ import annotations

import pytest
import torch

from steerserve.circuits.forward import (
    activations,
    all_last_logits,
    head_outputs,
    heads_transformed,
    last_logits,
    num_heads,
    unembedded,
)
from steerserve.circuits.lens import residual_sites
from steerserve.models.families import FAMILIES
from steerserve.models.loading import LoadedModel, load_model


@pytest.fixture(params=sorted(FAMILIES))
def model(request, tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir(request.param)), torch.float64)


def test_logits_are_the_models_own_whatever_the_padding(model, make_pairs) -> None:
    pairs = make_pairs(num=40)
    logits = all_last_logits(model, pairs.clean, pairs.last)
    for i in (0, 1, 39):
        alone = model.model(pairs.clean[i : i + 1, : pairs.last[i] + 1]).logits[0, -1]
        torch.testing.assert_close(logits[i], alone, rtol=1e-5, atol=1e-5)


def test_the_last_layers_output_gives_the_models_logits(model, make_pairs) -> None:
    pairs = make_pairs()
    sites = residual_sites(model)
    final = activations(model, pairs.clean, sites)[sites[-1]]
    logits = unembedded(model, final[torch.arange(3), pairs.last])
    torch.testing.assert_close(logits, all_last_logits(model, pairs.clean, pairs.last), rtol=1e-6, atol=1e-6)


def test_heads_are_read_and_replaced(model, make_pairs) -> None:
    pairs = make_pairs()
    z = head_outputs(model, pairs.clean)
    assert len(z) == model.n_layers
    assert z[0].shape[:3] == (*pairs.clean.shape, num_heads(model))
    with torch.no_grad(), heads_transformed(model, {1: lambda own: z[1].clone()}):
        same = last_logits(model, pairs.clean, pairs.last)
    with torch.no_grad(), heads_transformed(model, {1: torch.zeros_like}):
        other = last_logits(model, pairs.clean, pairs.last)
    clean = all_last_logits(model, pairs.clean, pairs.last)
    torch.testing.assert_close(same, clean, rtol=0, atol=0)
    assert (other - clean).abs().max() > 0.01
    torch.testing.assert_close(all_last_logits(model, pairs.clean, pairs.last), clean, rtol=0, atol=0)
