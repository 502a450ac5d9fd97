"""Circuits at the two ends are known: the model itself, and what is left of it when every edge is ablated."""

from __future__ import annotations

import pytest
import torch

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.prompts import PairText, PromptPairs, TokenPair
from steerserve.circuits.propagation import run_circuit
from steerserve.circuits.slicing import slice_model
from steerserve.errors import IncompatibleError
from steerserve.models.families import FAMILIES
from steerserve.models.loading import load_model


def last_logits(loaded, tokens, last) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(tokens).logits[torch.arange(len(last)), last]


@pytest.fixture(params=sorted(FAMILIES))
def exact(request, load_exact):
    return load_exact(request.param)


@torch.no_grad()
@pytest.mark.parametrize("ablation", list(Ablation))
@pytest.mark.parametrize(
    ("split", "kv"), [(True, "grouped"), (True, "expanded"), (False, "grouped"), (False, "expanded")]
)
def test_all_edges_are_the_model(exact, make_pairs, ablation, split, kv) -> None:
    model, pairs = slice_model(exact), make_pairs()
    baseline = Baseline(model, pairs, ablation)
    expected = last_logits(exact, pairs.clean, pairs.last)
    torch.testing.assert_close(baseline.clean_logits, expected, rtol=1e-8, atol=1e-8)
    graph = model.graph(split, kv)
    _, logits = run_circuit(graph, baseline, graph.full)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_no_edges_are_the_corrupted_prompt(exact, make_pairs) -> None:
    model, pairs = slice_model(exact), make_pairs()
    graph = model.graph()
    _, logits = run_circuit(graph, Baseline(model, pairs, Ablation.CORRUPTED), graph.empty())
    torch.testing.assert_close(logits, last_logits(exact, pairs.corrupted, pairs.last), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_no_edges_under_zero_ablation_are_the_biases_of_attention(exact, make_pairs) -> None:
    """Every node's output is zero; what attention adds for no head at all remains."""
    model, pairs = slice_model(exact), make_pairs()
    stream = torch.zeros(len(pairs.last), model.d_model, dtype=torch.float64)
    for layer in exact.adapter.layers(exact.model):
        attention = layer.get_submodule(exact.adapter.attention)
        out = next(getattr(attention, name) for name in ("o_proj", "c_proj", "dense") if hasattr(attention, name))
        stream += 0 if out.bias is None else out.bias
    norm = next(
        m for name, m in exact.model.base_model.named_children() if name in {"norm", "ln_f", "final_layer_norm"}
    )
    expected = exact.model.get_output_embeddings()(norm(stream))
    graph = model.graph()
    _, logits = run_circuit(graph, Baseline(model, pairs, Ablation.ZERO), graph.empty())
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_both_ends_on_a_real_model(smollm2_dir) -> None:
    """In float32, relative to the largest logit."""
    loaded = load_model(str(smollm2_dir), torch.float32)
    texts = [
        PairText("Mary and John ate. John thanked", "Anna and Paul ate. Mark thanked", (" Mary",), (" John",)),
        PairText("Tom and Kate met. Kate greeted", "Jack and Anna met. Paul greeted", (" Tom",), (" Kate",)),
    ]
    pairs = PromptPairs.of("ioi", [TokenPair.of(loaded.tokenizer, text) for text in texts])
    model = slice_model(loaded)
    baseline, graph = Baseline(model, pairs, Ablation.CORRUPTED), model.graph(split=False)
    for present, tokens in ((graph.full, pairs.clean), (graph.empty(), pairs.corrupted)):
        _, logits = run_circuit(graph, baseline, present)
        expected = last_logits(loaded, tokens, pairs.last)
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_half_precision_is_refused(tiny_model_dir) -> None:
    with pytest.raises(IncompatibleError, match="float32"):
        slice_model(load_model(str(tiny_model_dir("llama")), torch.bfloat16))
