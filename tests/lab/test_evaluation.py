"""Figures of SAEs whose worth is known: one that loses nothing, one that knows only the mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, pack_contexts
from steerserve.lab.evaluation import FeatureStats, evaluate_sae, feature_stats
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
LENGTH = 16
STATS = FeatureStats(torch.tensor([0.0, 0.5, 0.0, 0.25]), torch.ones(4), 1000)


def mean_of(model: LoadedModel, texts: list[str], site: Site) -> torch.Tensor:
    """Mean activation over all positions but the first of each context."""
    tokens = torch.stack(list(pack_contexts(model, texts, LENGTH)))
    return activations_of(model, tokens, (site,))[site][:, 1:].flatten(0, 1).mean(0)


def knows_only(mean: torch.Tensor, site: Site = SITE) -> SAE:
    """No feature ever fires: the reconstruction is ``b_dec``."""
    none = torch.zeros(4, len(mean))
    return SAE("mean", site, none.T.contiguous(), torch.zeros(4), none, mean, torch.zeros(4))


def test_an_sae_that_loses_nothing(tiny: LoadedModel, lossless_sae: SAE, sentences: list[str]) -> None:
    figures = evaluate_sae(tiny, lossless_sae, sentences, STATS, LENGTH, 10_000)
    assert figures.fvu == pytest.approx(0, abs=1e-6)
    assert figures.delta_ce == pytest.approx(0, abs=1e-5)
    assert figures.ce_recovered == pytest.approx(1, abs=1e-4)
    assert figures.l0 == 32  # of each pair, one
    assert figures.ce_mean_ablated - figures.ce_clean > 0.1  # there was something to lose


def test_an_sae_that_knows_only_the_mean(tiny: LoadedModel, sentences: list[str]) -> None:
    figures = evaluate_sae(tiny, knows_only(mean_of(tiny, sentences, SITE)), sentences, STATS, LENGTH, 10_000)
    assert figures.fvu == pytest.approx(1, abs=1e-4)
    assert figures.ce_recovered == pytest.approx(0, abs=1e-3)
    assert figures.ce_spliced == pytest.approx(figures.ce_mean_ablated, abs=1e-4)
    assert figures.delta_ce == figures.ce_spliced - figures.ce_clean
    assert figures.l0 == 0


def test_fvu_and_l0_by_hand(tiny: LoadedModel, random_sae: SAE, sentences: list[str]) -> None:
    figures = evaluate_sae(tiny, random_sae, sentences, STATS, LENGTH, 10_000)
    tokens = torch.stack(list(pack_contexts(tiny, sentences, LENGTH)))
    x = activations_of(tiny, tokens, (SITE,))[SITE][:, 1:].flatten(0, 1).double()
    f = random_sae.encode(x.float())
    fvu = (x - random_sae.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    assert 0.01 < fvu < 100
    assert figures.fvu == pytest.approx(fvu.item(), rel=1e-4)
    assert figures.l0 == pytest.approx((f > 0).sum(1).double().mean().item())


def test_the_clean_cross_entropy_is_the_models_own(tiny: LoadedModel, lossless_sae: SAE, sentences: list[str]) -> None:
    figures = evaluate_sae(tiny, lossless_sae, sentences, STATS, LENGTH, 10_000)
    tokens = torch.stack(list(pack_contexts(tiny, sentences, LENGTH))).long()
    with torch.no_grad():
        assert figures.ce_clean == pytest.approx(tiny.model(tokens, labels=tokens).loss.item(), rel=1e-5)
    assert figures.held_out_tokens == tokens.numel()


def test_massive_activations_stay_and_count_in_no_figure(
    with_massive_x: LoadedModel, lossless_sae: SAE, sentences: list[str]
) -> None:
    """Outside its domain this SAE reconstructs nothing; if it were asked there, all figures would show it."""
    site = Site(0, Stream.RESID_PRE)
    texts = [text.replace("e", "X") for text in sentences]
    tokens = torch.stack(list(pack_contexts(with_massive_x, texts, LENGTH)))
    norms = activations_of(with_massive_x, tokens, (site,))[site].norm(dim=-1)
    bounded = replace(lossless_sae, site=site, max_norm=10 * norms.median().item())
    assert (norms > bounded.max_norm).sum() > 20
    figures = evaluate_sae(with_massive_x, bounded, texts, STATS, LENGTH, 10_000)
    assert figures.fvu == pytest.approx(0, abs=1e-6)
    assert figures.delta_ce == pytest.approx(0, abs=1e-5)
    assert figures.l0 == 32


def test_counts_and_the_share_of_dead_features(tiny: LoadedModel, lossless_sae: SAE, sentences: list[str]) -> None:
    figures = evaluate_sae(tiny, lossless_sae, sentences, STATS, LENGTH, 100).to_dict()
    assert figures["held_out_tokens"] == 96  # whole contexts
    assert figures["dead_share"] == 0.5
    assert figures["density_tokens"] == 1000


@pytest.mark.parametrize(("texts", "max_tokens"), [(["too short"], 10_000), (["long enough " * 20], 15)])
def test_less_than_one_context_is_refused(
    tiny: LoadedModel, lossless_sae: SAE, texts: list[str], max_tokens: int
) -> None:
    with pytest.raises(AssetError, match=f"cut at {max_tokens} tokens, fill no context of 16"):
        evaluate_sae(tiny, lossless_sae, texts, STATS, LENGTH, max_tokens)


@pytest.mark.parametrize("max_tokens", [1, 200, 300, 301, 10_000])
def test_feature_stats_against_brute_force(write_store, random_sae: SAE, max_tokens: int) -> None:
    rows = torch.randn(700, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    harvest: Path = write_store(list(rows.split([300, 250, 150])))
    never = replace(random_sae, threshold=random_sae.threshold.clone().index_fill_(0, torch.tensor([5]), 1e6))
    stats = feature_stats(never, harvest, max_tokens)
    f = never.encode(rows[:max_tokens])
    assert stats.num_tokens == len(f) == min(max_tokens, 700)
    torch.testing.assert_close(stats.density, (f > 0).float().mean(0))
    torch.testing.assert_close(stats.max_activation, f.amax(0))
    assert stats.density[5] == stats.max_activation[5] == 0
    assert stats.density.max() > 0
