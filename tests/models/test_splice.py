"""Hooks that do nothing unless the running forward pass has work, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steerserve.kernels.steer_delta import OpCode
from steerserve.models.families import FAMILIES
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.splice import SiteBank, SiteWork, Splicer
from steerserve.types import Site, Stream

TOKENS = torch.tensor([[72, 101, 108, 108, 111], [1, 2, 3, 4, 5]])
NUM_ROWS = TOKENS.numel()


@pytest.fixture(params=sorted(FAMILIES))
def model(request, tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir(request.param)), torch.float32)


@pytest.fixture
def llama(tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir("llama")), torch.float32)


def add_work(d_model: int, amount: float) -> SiteWork:
    """Add ``amount`` along the first axis at every position."""
    axis = torch.eye(d_model)[:1].contiguous()
    bound = torch.full((1,), torch.inf)
    none = torch.zeros(1, dtype=torch.uint8)
    bank = SiteBank(axis, torch.zeros(1), threshold=-bound, max_norm=bound, normalization=none, W_dec=axis)
    return SiteWork(
        bank=bank,
        ptr=torch.arange(NUM_ROWS + 1, dtype=torch.int32),
        slot=torch.zeros(NUM_ROWS, dtype=torch.int32),
        op=torch.full((NUM_ROWS,), OpCode.ADD, dtype=torch.uint8),
        value=torch.full((NUM_ROWS,), amount),
        score_index=torch.full((NUM_ROWS,), -1, dtype=torch.int32),
        score_ptr=torch.zeros(NUM_ROWS + 1, dtype=torch.int32),
        score_threshold=torch.empty(0),
        score=torch.empty(0),
        activation=torch.empty(NUM_ROWS),
        edit=torch.empty(NUM_ROWS),
        x_norm=torch.full((NUM_ROWS,), -1.0),
    )


def logits(model: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(TOKENS).logits


def test_edits_last_for_the_block_and_reach_the_logits_from_every_site(model) -> None:
    before = logits(model)
    splicer = Splicer(model.model, model.adapter)
    for site in model.adapter.sites(model.model):
        work = add_work(model.d_model, 3.0)
        with splicer.applying({site: work}):
            edited = logits(model)
        assert not torch.allclose(edited, before, atol=1e-3)
        assert (work.x_norm > 0).all()
        assert (work.edit == 3.0).all()
        assert torch.equal(logits(model), before)
    splicer.remove()


def functionally_edited_logits(model: LoadedModel, site: Site, amount: float) -> torch.Tensor:
    """The same edit, made by replacing the activation instead of writing into it."""
    point = model.adapter.hook_point(model.model, site)
    shift = amount * torch.eye(model.d_model)[0]

    def on_input(_module, args):
        return (args[0] + shift, *args[1:])

    def on_output(_module, _args, output):
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    register = point.module.register_forward_pre_hook if point.side == "input" else point.module.register_forward_hook
    handle = register(on_input if point.side == "input" else on_output)
    try:
        return logits(model)
    finally:
        handle.remove()


def test_editing_in_place_touches_nothing_else(model) -> None:
    splicer = Splicer(model.model, model.adapter)
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    for site in model.adapter.sites(model.model):
        with splicer.applying({site: add_work(model.d_model, 3.0)}):
            edited = logits(model)
        torch.testing.assert_close(edited, functionally_edited_logits(model, site, 3.0), rtol=0, atol=1e-4)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())
    splicer.remove()


def test_resid_pre_reads_what_resid_post_of_the_layer_below_left(llama) -> None:
    splicer = Splicer(llama.model, llama.adapter)
    first, second = add_work(llama.d_model, 3.0), add_work(llama.d_model, 5.0)
    with splicer.applying({Site(1, Stream.RESID_PRE): second, Site(0, Stream.RESID_POST): first}):
        logits(llama)
    torch.testing.assert_close(second.activation, first.activation + 3.0)
    splicer.remove()


def test_work_is_dropped_when_the_pass_fails(llama) -> None:
    before = logits(llama)
    splicer = Splicer(llama.model, llama.adapter)
    with pytest.raises(RuntimeError, match="stop"), splicer.applying({Site(0, Stream.MLP_OUT): add_work(32, 3.0)}):
        raise RuntimeError("stop")
    assert torch.equal(logits(llama), before)
    wrong = replace(add_work(32, 3.0), value=torch.zeros(NUM_ROWS, dtype=torch.float64))
    with pytest.raises(TypeError, match="value"), splicer.applying({Site(0, Stream.MLP_OUT): wrong}):
        logits(llama)
    assert torch.equal(logits(llama), before)
    splicer.remove()


def test_removed_hooks_do_nothing(llama) -> None:
    before = logits(llama)
    splicer = Splicer(llama.model, llama.adapter)
    splicer.remove()
    with splicer.applying({Site(0, Stream.MLP_OUT): add_work(32, 3.0)}):
        assert torch.equal(logits(llama), before)
