"""The two measures by hand, on planted units, and on the neurons of every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import e
from pathlib import Path

import pytest
import torch

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of
from steerserve.lab.evaluation.fidelity import held_out_contexts
from steerserve.lab.evaluation.polysemanticity import (
    FEATURES,
    NEURONS,
    effective_number,
    mean_pairwise_cosine,
    measure_polysemanticity,
    mlp_neurons,
    stronger_sign,
    windows,
)
from steerserve.models.loading import LoadedModel, load_model
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

from .conftest import TokenId


def test_the_effective_number_of_tokens_by_hand() -> None:
    tokens = torch.tensor([[7, 7, 7, 7], [1, 2, 3, 4], [5, 5, 9, 9], [5, 5, 5, 9]])
    expected = [1, 4, 2, e ** -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()).item()]
    assert effective_number(tokens).tolist() == pytest.approx(expected)


def test_the_mean_cosine_of_pairs_by_brute_force() -> None:
    vectors = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    for unit, found in zip(vectors, mean_pairwise_cosine(vectors), strict=True):
        pairs = [torch.cosine_similarity(unit[i], unit[j], dim=0) for i in range(6) for j in range(i)]
        assert found == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
    same = torch.ones(1, 4, 5) * torch.arange(1, 5)[:, None]
    assert mean_pairwise_cosine(same).item() == pytest.approx(1)


def test_windows_by_brute_force() -> None:
    """The last 8 positions, those with massive activations left out."""
    generator = torch.Generator().manual_seed(0)
    residual, rows = torch.randn(2, 20, 3, generator=generator), torch.rand(2, 20, generator=generator) > 0.4
    found = windows(residual, rows)
    for context in range(2):
        for position in range(20):
            kept = [p for p in range(max(0, position - 7), position + 1) if rows[context, p]]
            expected = residual[context, kept].mean(0) if kept else torch.zeros(3)
            torch.testing.assert_close(found[context, position], expected)


def test_a_neuron_counts_by_its_stronger_sign() -> None:
    value = torch.tensor([[1.0, 2.0, 0.5, 3.0], [4.0, 1.0, 0.2, 0.1]])  # two neurons, then their negatives
    position = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    strong, where = stronger_sign(value, position)
    assert strong.tolist() == [[1.0, 3.0], [4.0, pytest.approx(0.1)]]
    assert where.tolist() == [[0, 3], [4, 7]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_neurons_are_what_the_mlp_writes_from(tiny_model_dir: Callable[[str], Path], family: str) -> None:
    model = load_model(str(tiny_model_dir(family)), torch.float32)
    mlp = model.adapter.layers(model.model)[1].get_submodule(model.adapter.mlp)
    down = dict(mlp.named_children())[{"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}.get(family, "down_proj")]
    tokens, written = torch.arange(24).reshape(2, 12), []
    handle = mlp.register_forward_hook(lambda _module, _args, output: written.append(output))
    with mlp_neurons(model, 1) as neurons:
        activations_of(model, tokens, (Site(1, Stream.MLP_OUT),))
    handle.remove()
    activations_of(model, tokens, (Site(1, Stream.MLP_OUT),))
    (hidden,) = neurons  # the second pass came after the block
    assert hidden.shape[:2] == (2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(down(hidden), written[0])


@pytest.fixture
def token_sae(tiny: LoadedModel, token_id: TokenId) -> SAE:
    """Each feature fires on one letter and on nothing else."""
    embeddings = tiny.model.get_input_embeddings().weight.detach()
    letters = [token_id(letter) for letter in "aeinorst"]
    rows = embeddings[letters] / embeddings[letters].norm(dim=1, keepdim=True)
    threshold = (rows @ embeddings.T).sort(dim=1, descending=True).values[:, :2].mean(1)
    zeros = torch.zeros(8)
    return SAE("letters", Site(0, Stream.RESID_PRE), rows.T, zeros, rows, torch.zeros(32), threshold)


def test_features_of_one_token_show_one_token(tiny: LoadedModel, token_sae: SAE, sentences: list[str]) -> None:
    contexts = held_out_contexts(tiny, sentences, 32, 10_000)
    found = measure_polysemanticity(tiny, token_sae, contexts, 40)
    populations = {population.name: population for population in found.populations}
    features, neurons = populations[FEATURES], populations[NEURONS]
    assert (features.sampled, features.measured) == (8, 8)
    assert (neurons.sampled, neurons.measured) == (40, 40)
    assert features.distinct_tokens.mean.value == features.distinct_tokens.mean.high == pytest.approx(1)
    chance = populations["random positions"]
    assert 1.2 < neurons.distinct_tokens.mean.value < chance.distinct_tokens.mean.value <= 10
    assert abs(chance.coherence.mean.value) < 0.05 < neurons.coherence.mean.value
    difference = found.features_minus_neurons["distinct_tokens"]
    assert difference.value == pytest.approx(1 - neurons.distinct_tokens.mean.value)
    assert difference.low <= difference.value <= difference.high < 0
    assert found == measure_polysemanticity(tiny, token_sae, contexts, 40)  # nothing is left to chance


def test_rare_features_are_not_measured(tiny: LoadedModel, token_sae: SAE, sentences: list[str]) -> None:
    contexts = held_out_contexts(tiny, sentences, 32, 10_000)
    threshold = token_sae.threshold.clone()
    threshold[:6] = 1e6
    populations = measure_polysemanticity(tiny, replace(token_sae, threshold=threshold), contexts, 40).populations
    assert (populations[0].sampled, populations[0].measured) == (8, 2)
    threshold[6] = 1e6
    with pytest.raises(AssetError, match="of 8 sampled SAE features, 1 are active in 10 of the"):
        measure_polysemanticity(tiny, replace(token_sae, threshold=threshold), contexts, 40)


def test_too_few_contexts_are_refused(tiny: LoadedModel, token_sae: SAE, sentences: list[str]) -> None:
    with pytest.raises(AssetError, match="needs 10 held-out contexts, and there are 9"):
        measure_polysemanticity(tiny, token_sae, held_out_contexts(tiny, sentences, 32, 9 * 32), 40)
