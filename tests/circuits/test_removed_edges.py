"""A node whose outgoing edges are all removed is one that ``transformers`` runs with its output replaced.

And one whose incoming edges are all removed reads what it reads on the corrupted prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.propagation import run_circuit
from steerserve.circuits.slicing import slice_model
from steerserve.models.families import FAMILIES

OUTPUT_OF_HEADS = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}
MLP_NORM = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm"}


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@contextmanager
def replaced_input(module: nn.Module, x: torch.Tensor, columns: slice = slice(None)) -> Iterator[None]:
    """``module`` gets some columns of ``x`` in place of its own input."""

    def replace(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        own = args[0].clone()
        own[..., columns] = x[..., columns]
        return (own,)

    handle = module.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def input_on(loaded, module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    loaded.model(tokens)
    handle.remove()
    return seen[0]


def logits_without(loaded, pairs, ablation, sources=(), receivers=()) -> torch.Tensor:
    """Of the circuit without the edges from ``sources`` and into ``receivers``."""
    model = slice_model(loaded)
    graph = model.graph()
    present = graph.full.copy()
    present[:, [node.name in sources for node in graph.sources]] = False
    present[[node.name in receivers for node in graph.receivers]] = False
    return run_circuit(graph, Baseline(model, pairs, ablation), present)[1]


@torch.no_grad()
@pytest.mark.parametrize("ablation", list(Ablation))
def test_a_head_without_outgoing_edges_writes_its_ablated_value(family, ablation, load_exact, make_pairs) -> None:
    loaded, pairs = load_exact(family), make_pairs()
    out = loaded.adapter.layers(loaded.model)[0].get_submodule(OUTPUT_OF_HEADS.get(family, "self_attn.o_proj"))
    d_head = slice_model(loaded).d_head
    ablated = input_on(loaded, out, pairs.corrupted) * (ablation is Ablation.CORRUPTED)
    with replaced_input(out, ablated, slice(d_head, 2 * d_head)):
        expected = loaded.model(pairs.clean).logits[torch.arange(len(pairs.last)), pairs.last]
    actual = logits_without(loaded, pairs, ablation, sources={"a0.h1"})
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(actual, logits_without(loaded, pairs, ablation), rtol=1e-3)


@torch.no_grad()
def test_an_mlp_without_incoming_edges_reads_the_corrupted_residual(family, load_exact, make_pairs) -> None:
    loaded, pairs = load_exact(family), make_pairs()
    norm = loaded.adapter.layers(loaded.model)[1].get_submodule(MLP_NORM.get(family, "post_attention_layernorm"))
    with replaced_input(norm, input_on(loaded, norm, pairs.corrupted)):
        expected = loaded.model(pairs.clean).logits[torch.arange(len(pairs.last)), pairs.last]
    actual = logits_without(loaded, pairs, Ablation.CORRUPTED, receivers={"m1"})
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(actual, logits_without(loaded, pairs, Ablation.CORRUPTED), rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["q", "k", "v"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_queries_keys_and_values_have_inputs_of_their_own(family, kind, load_exact, make_pairs) -> None:
    loaded, pairs = load_exact(family), make_pairs()
    projection = loaded.adapter.layers(loaded.model)[1].get_submodule(f"self_attn.{kind}_proj")
    with replaced_input(projection, input_on(loaded, projection, pairs.corrupted)):
        expected = loaded.model(pairs.clean).logits[torch.arange(len(pairs.last)), pairs.last]
    receivers = {f"a1.{unit}<{kind}>" for unit in (("h0", "h1", "h2", "h3") if kind == "q" else ("g0", "g1"))}
    actual = logits_without(loaded, pairs, Ablation.CORRUPTED, receivers=receivers)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(actual, logits_without(loaded, pairs, Ablation.CORRUPTED), rtol=1e-4)
