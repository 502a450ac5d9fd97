"""Streams mean the same in every family: what is added to the residual, and the residual itself."""

from __future__ import annotations

import pytest
import torch

from steerserve.errors import IncompatibleError
from steerserve.models.families import FAMILIES, STEERABLE, adapter_for
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel, load_model
from steerserve.steering.packs import width_of
from steerserve.types import Site, Stream

TOKENS = torch.tensor([[72, 101, 108, 108, 111, 32, 119]])


NORMS_BEFORE_THE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
"""Of Gemma, of llama, Qwen and NeoX, and of GPT-2; Gemma has the second too, for another purpose."""


def read_all_sites(model: LoadedModel) -> tuple[dict[Site, torch.Tensor], object]:
    """Activation of every site and the model's own output for ``TOKENS``."""
    seen: dict[Site, torch.Tensor] = {}
    handles = []
    for site in model.adapter.sites(model.model):
        point = model.adapter.hook_point(model.model, site)
        if point.side == "input":
            hook = point.module.register_forward_pre_hook(lambda _m, args, site=site: seen.update({site: args[0]}))
        else:
            hook = point.module.register_forward_hook(
                lambda _m, _a, out, site=site: seen.update({site: out[0] if isinstance(out, tuple) else out})
            )
        handles.append(hook)
    with torch.no_grad():
        output = model.model(TOKENS, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.fixture(params=sorted(FAMILIES))
def model(request, tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir(request.param)), torch.float32)


def test_streams_add_up_to_the_residual(model) -> None:
    seen, output = read_all_sites(model)
    assert len(seen) == 5 * model.n_layers
    assert all(x.shape == (1, TOKENS.shape[1], width_of(model, site)) for site, x in seen.items())
    for layer in range(model.n_layers):
        stream = {stream: seen[Site(layer, stream)] for stream in STEERABLE}
        total = stream[Stream.RESID_PRE] + stream[Stream.ATTN_OUT] + stream[Stream.MLP_OUT]
        torch.testing.assert_close(stream[Stream.RESID_POST], total, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stream[Stream.RESID_PRE], output.hidden_states[layer], rtol=0, atol=0)
        assert stream[Stream.ATTN_OUT].abs().max() > 0.01
        assert stream[Stream.MLP_OUT].abs().max() > 0.01


def test_mlp_in_is_what_the_mlp_reads(model) -> None:
    """The MLP, given the activation alone, makes of it what the layer adds to the residual."""
    mlp_in, mlp_out = Site(1, Stream.MLP_IN), Site(1, Stream.MLP_OUT)
    seen: dict[Site, torch.Tensor] = {}
    read = {site: lambda x, site=site: seen.setdefault(site, x) for site in (mlp_in, mlp_out)}
    with torch.no_grad(), transformed(model, read):
        model.model(TOKENS)
        layer = model.adapter.layers(model.model)[1]
        out = layer.mlp(seen[mlp_in])
        if "gemma" in model.model.config.model_type:
            out = layer.post_feedforward_layernorm(out)
    assert seen[mlp_in].shape == (1, TOKENS.shape[1], model.d_model)
    torch.testing.assert_close(seen[mlp_out], out, rtol=0, atol=0)
    assert seen[mlp_out].std() > 0.01


def test_mlp_in_is_behind_the_norm_and_no_site_that_is_edited(model) -> None:
    seen, _ = read_all_sites(model)
    mlp_in = Site(1, Stream.MLP_IN)
    assert mlp_in not in seen
    with torch.no_grad(), transformed(model, {mlp_in: lambda x: seen.setdefault(mlp_in, x)}):
        model.model(TOKENS)
    layer = model.adapter.layers(model.model)[1]
    norm = next(getattr(layer, name) for name in NORMS_BEFORE_THE_MLP if hasattr(layer, name))
    residual = seen[Site(1, Stream.RESID_PRE)]
    if not getattr(model.model.config, "use_parallel_residual", False):
        residual = residual + seen[Site(1, Stream.ATTN_OUT)]
    torch.testing.assert_close(seen[mlp_in], norm(residual), rtol=1e-5, atol=1e-5)


def test_the_last_residual_is_before_the_final_norm(model) -> None:
    seen, output = read_all_sites(model)
    last = seen[Site(model.n_layers - 1, Stream.RESID_POST)]
    assert not torch.allclose(last, output.hidden_states[-1], rtol=0.1)
    logits = model.model.get_output_embeddings()(output.hidden_states[-1])
    torch.testing.assert_close(logits.argmax(-1), output.logits.argmax(-1))


def test_heads_stand_side_by_side_before_the_output_projection(model) -> None:
    """Attention adds nothing to the residual when every head is silent, but the projection's own bias."""
    config = model.model.config
    heads = config.num_attention_heads
    width = heads * getattr(config, "head_dim", config.hidden_size // heads)
    shapes = []

    def silence(_module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        shapes.append(args[0].shape)
        return (torch.zeros_like(args[0]),)

    projections = model.adapter.out_projections(model.model)
    handles = [projection.register_forward_pre_hook(silence) for projection in projections]
    seen, _ = read_all_sites(model)
    for handle in handles:
        handle.remove()
    assert shapes == [(1, TOKENS.shape[1], width)] * model.n_layers
    for layer in range(model.n_layers):
        out = seen[Site(layer, Stream.ATTN_OUT)]
        torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=0)


def test_what_heads_write_adds_up_to_what_the_projection_puts_out(model) -> None:
    """Head by head, query heads of a group included, and behind them the bias."""
    seen, _ = read_all_sites(model)
    for layer, projection in enumerate(model.adapter.out_projections(model.model)):
        z = seen[Site(layer, Stream.ATTN_Z)]
        heads = z.unflatten(-1, (model.n_heads, model.d_head)).unbind(-2)
        writes = [torch.from_numpy(model.head_writes(layer, head)) for head in range(model.n_heads)]
        with torch.no_grad():
            bias = projection(torch.zeros_like(z))
            added = sum(each @ W_O for each, W_O in zip(heads, writes, strict=True)) + bias
            torch.testing.assert_close(added, projection(z), rtol=1e-5, atol=1e-5)


def test_the_final_norm_is_what_the_unembedding_reads(model) -> None:
    seen, output = read_all_sites(model)
    norm = model.model.get_submodule(model.adapter.final_norm)
    last = seen[Site(model.n_layers - 1, Stream.RESID_POST)]
    torch.testing.assert_close(norm(last), output.hidden_states[-1], rtol=0, atol=0)


def test_unknown_families_are_refused_with_the_list() -> None:
    with pytest.raises(IncompatibleError, match=r"gemma2.*gpt_neox.*qwen3") as caught:
        adapter_for("mamba")
    assert caught.value.field == "model.model_type"
