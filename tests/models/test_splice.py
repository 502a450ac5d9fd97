"""Hooks that do nothing unless their site is active, read fixed buffers, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from steerserve.kernels.steer_delta import OpCode
from steerserve.models.families import FAMILIES
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.splice import STAGES, SiteBank, SiteBuffers, Splicer
from steerserve.steering.packs import width_of
from steerserve.types import Site, Stream

TOKENS = torch.tensor([[72, 101, 108, 108, 111, 1, 2, 3, 4, 5]])
NUM_TOKENS = TOKENS.numel()
ROOM = NUM_TOKENS + 6
AMOUNT = 3.0


@pytest.fixture(params=sorted(FAMILIES))
def model(request, tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir(request.param)), torch.float32)


@pytest.fixture
def llama(tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir("llama")), torch.float32)


@pytest.fixture
def splice() -> Iterator:
    """Splicers with hooks at every site, or at the given ones, of a model."""
    splicers = []

    def make(model: LoadedModel, *sites: Site) -> Splicer:
        chosen = sites or model.adapter.sites(model.model)
        splicers.append(
            Splicer(model.model, model.adapter, chosen, max_tokens=ROOM, max_entries=2 * ROOM, max_scores=ROOM)
        )
        return splicers[-1]

    yield make
    for splicer in splicers:
        splicer.remove()


def axis_bank(width: int) -> SiteBank:
    """One feature, which reads and writes the first axis."""
    axis = torch.eye(width)[:1].contiguous()
    bound = torch.full((1,), torch.inf)
    none = torch.zeros(1, dtype=torch.uint8)
    return SiteBank(axis, torch.zeros(1), threshold=-bound, max_norm=bound, normalization=none, W_dec=axis)


def one_entry_each(
    buffers: SiteBuffers, width: int, op: OpCode = OpCode.ADD, value: float = AMOUNT, scored: bool = False
) -> None:
    """An entry of the axis feature for every token, in stage REQUEST; ``scored`` ones name score t of token t."""
    buffers.bank = buffers.bank or axis_bank(width)
    buffers.ptr.copy_((torch.arange(len(buffers.ptr)) + 1) // STAGES)
    buffers.slot.zero_()
    buffers.op.fill_(op)
    buffers.value.fill_(value)
    buffers.score_index.copy_(torch.arange(len(buffers.score_index)) if scored else torch.tensor(-1))
    buffers.activation.fill_(torch.nan)
    buffers.edit.fill_(torch.nan)
    buffers.x_norm.fill_(-1.0)
    buffers.active = True


def logits(model: LoadedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(tokens).logits


def functionally_edited_logits(model: LoadedModel, site: Site, amount: float) -> torch.Tensor:
    """The same edit, made by replacing the activation instead of writing into it."""
    point = model.adapter.hook_point(model.model, site)
    shift = amount * torch.eye(width_of(model, site))[0]

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


def test_edits_last_while_active_and_reach_the_logits_from_every_site(model, splice) -> None:
    before = logits(model)
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    expected = {site: functionally_edited_logits(model, site, AMOUNT) for site in model.adapter.sites(model.model)}
    splicer = splice(model)
    assert list(splicer.buffers) == list(expected)
    for site, buffers in splicer.buffers.items():
        one_entry_each(buffers, width_of(model, site))
        edited = logits(model)
        assert not torch.allclose(edited, before, atol=1e-3)
        torch.testing.assert_close(edited, expected[site], rtol=0, atol=1e-4)
        assert (buffers.x_norm[: STAGES * NUM_TOKENS : STAGES] > 0).all()
        assert (buffers.edit[:NUM_TOKENS] == AMOUNT).all()
        buffers.active = False
        assert torch.equal(logits(model), before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())


def test_a_monitor_reads_and_leaves_every_bit(llama, splice) -> None:
    before = logits(llama)
    splicer = splice(llama)
    for buffers in splicer.buffers.values():
        one_entry_each(buffers, llama.d_model, OpCode.MONITOR)
    assert torch.equal(logits(llama), before)
    assert all(buffers.activation[:NUM_TOKENS].isfinite().all() for buffers in splicer.buffers.values())


def test_a_pass_touches_only_its_own_tokens(llama, splice) -> None:
    buffers = splice(llama).buffers[Site(1, Stream.RESID_POST)]
    one_entry_each(buffers, llama.d_model)
    for num_tokens in (NUM_TOKENS, 1, 4):
        buffers.edit.fill_(torch.nan)
        logits(llama, TOKENS[:, :num_tokens])
        assert (buffers.edit[:num_tokens] == AMOUNT).all()
        assert buffers.edit[num_tokens:].isnan().all()


def test_resid_pre_reads_what_resid_post_of_the_layer_below_left(llama, splice) -> None:
    below, above = Site(0, Stream.RESID_POST), Site(1, Stream.RESID_PRE)
    buffers = splice(llama, below, above).buffers
    one_entry_each(buffers[below], llama.d_model)
    one_entry_each(buffers[above], llama.d_model)
    logits(llama)
    first, second = (buffers[site].activation[:NUM_TOKENS] for site in (below, above))
    torch.testing.assert_close(second, first + AMOUNT)


def test_a_score_of_one_site_gates_an_edit_of_a_later_one(llama, splice) -> None:
    reader, editor = Site(0, Stream.MLP_OUT), Site(2, Stream.ATTN_OUT)
    splicer = splice(llama, reader, editor)
    one_entry_each(splicer.buffers[reader], llama.d_model, OpCode.MONITOR, value=1.0, scored=True)
    one_entry_each(splicer.buffers[editor], llama.d_model, scored=True)
    scores = splicer.scores
    scores.ptr.copy_(torch.arange(len(scores.ptr)))
    scores.score.zero_()
    logits(llama)
    read = splicer.buffers[reader].activation[:NUM_TOKENS].clone()
    torch.testing.assert_close(scores.score[:NUM_TOKENS], read)
    scores.threshold.fill_(read.median().item())
    scores.score.zero_()
    logits(llama)
    is_open = read > read.median()
    assert 0 < is_open.sum() < NUM_TOKENS
    assert torch.equal(splicer.buffers[editor].edit[:NUM_TOKENS] == AMOUNT, is_open)
    assert torch.equal(splicer.buffers[editor].edit[:NUM_TOKENS] == 0.0, ~is_open)


def test_the_operator_finds_the_buffers_by_their_handle(llama, splice) -> None:
    """What compiled code calls; it must say that it writes its argument."""
    first, second = splice(llama, Site(0, Stream.RESID_POST), Site(1, Stream.RESID_POST)).buffers.values()
    one_entry_each(second, llama.d_model)
    x = torch.randn(1, NUM_TOKENS, llama.d_model)
    before, shift = x.clone(), AMOUNT * torch.eye(llama.d_model)[0]
    torch.ops.steerserve.steer_site_(x, first.handle)
    assert torch.equal(x, before)
    torch.ops.steerserve.steer_site_(x, second.handle)
    torch.testing.assert_close(x, before + shift)
    torch.library.opcheck(torch.ops.steerserve.steer_site_, (x, second.handle))


def test_handles_are_given_back(llama, splice) -> None:
    """Compiled code is cached by the handles in it, so a second engine must get those of the first."""
    first = splice(llama)
    handles = [buffers.handle for buffers in first.buffers.values()]
    first.remove()
    second = splice(llama)
    first.remove()
    assert [buffers.handle for buffers in second.buffers.values()] == handles
    torch.ops.steerserve.steer_site_(torch.zeros(1, 1, llama.d_model), handles[0])


def test_a_refused_argument_is_an_error_not_a_pass_without_edits(llama, splice) -> None:
    buffers = splice(llama, Site(0, Stream.MLP_OUT)).buffers[Site(0, Stream.MLP_OUT)]
    one_entry_each(buffers, llama.d_model)
    buffers.slot.fill_(1)
    with pytest.raises(ValueError, match="slot"):
        logits(llama)


def test_removed_hooks_do_nothing(llama, splice) -> None:
    before = logits(llama)
    splicer = splice(llama)
    for buffers in splicer.buffers.values():
        one_entry_each(buffers, llama.d_model)
    splicer.remove()
    assert torch.equal(logits(llama), before)
