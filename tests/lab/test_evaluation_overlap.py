"""Matching the features of two SAEs: what was planted is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerserve.errors import AssetError, IncompatibleError
from steerserve.lab.evaluation.overlap import live_features, match_features, pair_correlations
from steerserve.sae.model import SAE

ALL = torch.ones(48, dtype=torch.bool)


@pytest.fixture
def order() -> torch.Tensor:
    return torch.randperm(48, generator=torch.Generator().manual_seed(4))


def permuted(sae: SAE, order: torch.Tensor) -> SAE:
    """Feature ``order[i]`` of ``sae`` is its feature i; decoder rows are of other lengths."""
    tensors = {name: getattr(sae, name)[order] for name in ("b_enc", "threshold")}
    return replace(sae, name="other", W_enc=sae.W_enc[:, order], W_dec=3 * sae.W_dec[order], **tensors)


def test_a_planted_permutation_is_found(
    random_sae: SAE, order: torch.Tensor, write_store: Callable[[list[torch.Tensor]], Path]
) -> None:
    other = permuted(random_sae, order)
    found = match_features(random_sae, other, (ALL, ALL))
    assert torch.equal(order[found.pairs[:, 1]], found.pairs[:, 0])
    assert found.pairs[:, 0].unique().numel() == 48
    torch.testing.assert_close(found.decoder_cosine, torch.ones(48))
    torch.testing.assert_close(found.nearest, torch.ones(48))
    rows = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    correlation, count = pair_correlations(random_sae, other, found.pairs, write_store([rows]), 200)
    assert count == 200
    torch.testing.assert_close(correlation, torch.ones(48).double())
    figures = replace(found, correlation=correlation, num_tokens=count).to_dict()
    assert figures["shared_share"] == figures["shared_by_encoder_too"] == 1
    assert figures["mean_correlation_shared"] == pytest.approx(1)
    assert figures["mean_correlation_other"] is None  # there are none
    assert figures["cosine_histogram"]["counts"][-1] == 48


def test_half_the_features_are_shared(random_sae: SAE, order: torch.Tensor) -> None:
    other = permuted(random_sae, order)
    other.W_dec[:24] = torch.randn(24, 32, generator=torch.Generator().manual_seed(6))
    figures = match_features(random_sae, other, (ALL, ALL)).to_dict()
    assert figures["shared_share"] == 0.5
    assert figures["mean_decoder_cosine"] < figures["mean_nearest_cosine"] < 1


def test_the_matching_is_the_best_and_not_the_greedy_one(random_sae: SAE) -> None:
    """Both first features are nearest to the same one; 0.75 + 0 is less than 0.65 + 0.7."""
    pair = replace(random_sae, W_enc=random_sae.W_enc[:, :2], b_enc=random_sae.b_enc[:2])
    first, second = torch.eye(2, 32), torch.zeros(2, 32)
    second[0, :3] = torch.tensor([0.75, 0.65, (1 - 0.75**2 - 0.65**2) ** 0.5])
    second[1, :3] = torch.tensor([0.7, 0.0, (1 - 0.7**2) ** 0.5])
    alive = torch.ones(2, dtype=torch.bool)
    found = match_features(replace(pair, W_dec=first), replace(pair, W_dec=second), (alive, alive))
    assert found.pairs.tolist() == [[0, 1], [1, 0]]


def test_dead_features_take_no_part(random_sae: SAE, order: torch.Tensor) -> None:
    live = torch.arange(48) < 10
    found = match_features(random_sae, permuted(random_sae, order), (live, ALL))
    assert found.live == (10, 48)
    assert found.pairs[:, 0].tolist() == list(range(10))
    torch.testing.assert_close(found.decoder_cosine, torch.ones(10))


def test_correlations_against_numpy(random_sae: SAE, write_store: Callable[[list[torch.Tensor]], Path]) -> None:
    never = replace(random_sae, threshold=random_sae.threshold.clone().index_fill_(0, torch.tensor([5]), 1e6))
    rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    pairs = torch.tensor([[0, 1], [3, 3], [9, 40], [2, 5]])
    correlation, _ = pair_correlations(random_sae, never, pairs, write_store(list(rows.split(150))), 10_000)
    a, b = random_sae.encode(rows).double().numpy(), never.encode(rows).double().numpy()
    expected = [np.corrcoef(a[:, i], b[:, j])[0, 1] for i, j in pairs[:3].tolist()]
    np.testing.assert_allclose(correlation[:3], expected, rtol=1e-6)
    assert correlation[3].isnan()


def test_what_counts_as_alive(random_sae: SAE, write_store: Callable[[list[torch.Tensor]], Path]) -> None:
    assert live_features(random_sae, None, 100).all()
    recorded = replace(random_sae, max_activation=torch.arange(48) % 2.0)
    assert live_features(recorded, None, 100).sum() == 24
    never = replace(recorded, threshold=random_sae.threshold.clone().index_fill_(0, torch.tensor([5]), 1e6))
    fires = live_features(never, write_store([torch.randn(900, 32, generator=torch.Generator().manual_seed(0))]), 900)
    assert fires.sum() == 47
    assert not fires[5]


def test_what_cannot_be_compared_is_refused(random_sae: SAE) -> None:
    narrow = replace(random_sae, name="narrow", W_enc=torch.ones(8, 48), W_dec=torch.ones(48, 8), b_dec=torch.ones(8))
    with pytest.raises(IncompatibleError, match=r"narrow: d_in, d_out: got \(8, 8\), expected .* random, 32 and 32"):
        match_features(random_sae, narrow, (ALL, ALL))
    one, other = (replace(random_sae, metadata={"model_fingerprint": letter * 64}) for letter in "ab")
    with pytest.raises(IncompatibleError, match="model_fingerprint: got 'bbb"):
        match_features(one, other, (ALL, ALL))
    with pytest.raises(AssetError, match="random has no live feature"):
        match_features(random_sae, random_sae, (ALL, ~ALL))
