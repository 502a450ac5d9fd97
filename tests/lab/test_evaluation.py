"""Figures of SAEs whose worth is known: one that loses nothing, one that knows only the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of
from steerserve.lab.evaluation.features import FeatureStats, feature_stats, save_density
from steerserve.lab.evaluation.fidelity import Fidelity, held_out_contexts, measure_fidelity
from steerserve.lab.tokens import pack_contexts
from steerserve.models.loading import LoadedModel, load_model
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
LENGTH = 16


def measured(model: LoadedModel, sae: SAE, texts: list[str]) -> Fidelity:
    return measure_fidelity(model, sae, held_out_contexts(model, texts, LENGTH, 10_000))


def mean_of(model: LoadedModel, texts: list[str], site: Site) -> torch.Tensor:
    """Mean activation over all positions but the first of each context."""
    tokens = torch.stack(list(pack_contexts(model, texts, LENGTH)))
    return activations_of(model, tokens, (site,))[site][:, 1:].flatten(0, 1).mean(0)


def knows_only(mean: torch.Tensor, site: Site = SITE) -> SAE:
    """No feature ever fires: the reconstruction is ``b_dec``."""
    none = torch.zeros(4, len(mean))
    return SAE("mean", site, none.T.contiguous(), torch.zeros(4), none, mean, torch.zeros(4))


def test_an_sae_that_loses_nothing(tiny: LoadedModel, lossless_sae: SAE, sentences: list[str]) -> None:
    figures = measured(tiny, lossless_sae, sentences)
    assert figures.fvu == pytest.approx(0, abs=1e-6)
    assert figures.delta_ce == pytest.approx(0, abs=1e-5)
    assert figures.ce_recovered == pytest.approx(1, abs=1e-4)
    assert figures.l0 == 32  # of each pair, one
    assert figures.ce_mean_ablated - figures.ce_clean > 0.1  # there was something to lose


def test_a_transcoder_that_loses_nothing(tiny: LoadedModel, lossless_sae: SAE, sentences: list[str]) -> None:
    """What leaves a layer is what enters the next one."""
    copies = replace(lossless_sae, transcodes_to=Site(2, Stream.RESID_PRE), apply_b_dec_to_input=False)
    figures = measured(tiny, copies, sentences)
    assert figures.fvu == pytest.approx(0, abs=1e-6)
    assert figures.delta_ce == pytest.approx(0, abs=1e-5)
    assert figures.l0 == 32
    assert figures.ce_mean_ablated - figures.ce_clean > 0.1


def test_a_transcoder_is_measured_where_it_writes(tiny: LoadedModel, lossless_sae: SAE, sentences: list[str]) -> None:
    """Against what the MLP gives, and not against what it reads."""
    written = Site(1, Stream.MLP_OUT)
    sae = replace(lossless_sae, site=Site(1, Stream.MLP_IN), transcodes_to=written, apply_b_dec_to_input=False)
    tokens = torch.stack(list(pack_contexts(tiny, sentences, LENGTH)))
    rows = activations_of(tiny, tokens, (sae.site, written))
    x, y = (rows[site][:, 1:].flatten(0, 1).double() for site in (sae.site, written))
    expected = (y - x).square().sum() / (y - y.mean(0)).square().sum()
    assert measured(tiny, sae, sentences).fvu == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 0.1


def test_an_sae_that_knows_only_the_mean(tiny: LoadedModel, sentences: list[str]) -> None:
    figures = measured(tiny, knows_only(mean_of(tiny, sentences, SITE)), sentences)
    assert figures.fvu == pytest.approx(1, abs=1e-4)
    assert figures.ce_recovered == pytest.approx(0, abs=1e-3)
    assert figures.ce_spliced == pytest.approx(figures.ce_mean_ablated, abs=1e-4)
    assert figures.delta_ce == figures.ce_spliced - figures.ce_clean
    assert figures.l0 == 0
    assert figures.to_dict()["l0_histogram"]["counts"] == [len(figures.num_active)]


def test_fvu_and_l0_by_hand(tiny: LoadedModel, random_sae: SAE, sentences: list[str]) -> None:
    figures = measured(tiny, random_sae, sentences)
    tokens = torch.stack(list(pack_contexts(tiny, sentences, LENGTH)))
    x = activations_of(tiny, tokens, (SITE,))[SITE][:, 1:].flatten(0, 1).double()
    f = random_sae.encode(x.float())
    fvu = (x - random_sae.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    assert 0.01 < fvu < 100
    assert figures.fvu == pytest.approx(fvu.item(), rel=1e-4)
    assert torch.equal(figures.num_active, (f > 0).sum(1))


def test_the_distribution_of_l0(tiny: LoadedModel, random_sae: SAE, sentences: list[str]) -> None:
    figures = measured(tiny, random_sae, sentences)
    written = figures.to_dict()
    assert sum(written["l0_histogram"]["counts"]) == len(figures.num_active)
    assert written["l0_quantiles"]["0.5"] == figures.num_active.double().median()
    quantiles = list(written["l0_quantiles"].values())
    assert quantiles == sorted(quantiles)
    assert quantiles[0] < quantiles[-1]


def test_the_clean_cross_entropy_is_the_models_own(tiny: LoadedModel, lossless_sae: SAE, sentences: list[str]) -> None:
    figures = measured(tiny, lossless_sae, sentences)
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
    massive = (norms > bounded.max_norm)[:, 1:].sum().item()
    assert massive > 20
    figures = measured(with_massive_x, bounded, texts)
    assert figures.fvu == pytest.approx(0, abs=1e-6)
    assert figures.delta_ce == pytest.approx(0, abs=1e-5)
    assert figures.l0 == 32
    assert figures.to_dict()["excluded_share"] == pytest.approx((massive + len(tokens)) / tokens.numel())


def test_a_model_that_does_not_need_the_site_has_nothing_to_recover(
    tiny_model_dir: Callable[[str], Path], lossless_sae: SAE, sentences: list[str]
) -> None:
    blind = load_model(str(tiny_model_dir("llama")), torch.float32)
    torch.nn.init.zeros_(blind.model.get_output_embeddings().weight)
    assert measured(blind, lossless_sae, sentences).to_dict()["ce_recovered"] is None


def test_activations_that_do_not_vary_are_refused(
    tiny_model_dir: Callable[[str], Path], lossless_sae: SAE, sentences: list[str]
) -> None:
    broken = load_model(str(tiny_model_dir("llama")), torch.float32)
    torch.nn.init.ones_(broken.model.get_input_embeddings().weight)
    with pytest.raises(AssetError, match=r"activations at blocks\.0\.hook_resid_pre that count do not vary"):
        measured(broken, replace(lossless_sae, site=Site(0, Stream.RESID_PRE)), sentences)


@pytest.mark.parametrize(("texts", "max_tokens"), [(["too short"], 10_000), (["long enough " * 20], 15), ([], 100)])
def test_less_than_one_context_is_refused(tiny: LoadedModel, texts: list[str], max_tokens: int) -> None:
    with pytest.raises(AssetError, match=f"cut at {max_tokens} tokens, fill no context of 16"):
        held_out_contexts(tiny, texts, LENGTH, max_tokens)


def test_only_whole_contexts_count(tiny: LoadedModel, sentences: list[str]) -> None:
    assert held_out_contexts(tiny, sentences, LENGTH, 100).shape == (6, LENGTH)


@pytest.mark.parametrize("max_tokens", [1, 200, 300, 301, 10_000])
def test_feature_stats_against_brute_force(
    write_store: Callable[[list[torch.Tensor]], Path], random_sae: SAE, tmp_path: Path, max_tokens: int
) -> None:
    rows = torch.randn(700, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    harvest = write_store(list(rows.split([300, 250, 150])))
    never = replace(random_sae, threshold=random_sae.threshold.clone().index_fill_(0, torch.tensor([5]), 1e6))
    stats = feature_stats(never, harvest, max_tokens)
    f = never.encode(rows[:max_tokens])
    assert stats.num_tokens == len(f) == min(max_tokens, 700)
    torch.testing.assert_close(stats.density, (f > 0).float().mean(0))
    torch.testing.assert_close(stats.max_activation, f.amax(0))
    assert stats.density[5] == stats.max_activation[5] == 0
    assert stats.density.max() > 0
    save_density(stats, tmp_path)
    assert torch.equal(load_file(tmp_path / "feature_density.safetensors")["density"], stats.density)


def test_the_density_histogram() -> None:
    """Two dead features; the others at 1, 10 %, 10 % and 0.02 % of the tokens."""
    density = torch.tensor([0, 1, 0.1, 0, 0.1, 0.0002])
    written = FeatureStats(density, torch.ones(6), 5000).to_dict()
    assert written["dead_share"] == pytest.approx(1 / 3)
    assert written["density_tokens"] == 5000
    edges, counts = written["density_histogram"].values()
    assert (edges[0], edges[-1], sum(counts)) == (-4, 0, 4)
    assert counts[-1] == 1  # 1 is in the last bin
    assert max(counts) == 2


def test_a_histogram_of_dead_features_is_empty() -> None:
    written = FeatureStats(torch.zeros(3), torch.zeros(3), 10).to_dict()
    assert written["dead_share"] == 1
    assert sum(written["density_histogram"]["counts"]) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_shard_that_is_not_finite_is_named(
    write_store: Callable[[list[torch.Tensor]], Path], random_sae: SAE, value: float
) -> None:
    broken = torch.ones(20, 32)
    broken[7, 3] = value
    harvest = write_store([torch.ones(20, 32), broken])
    with pytest.raises(AssetError, match=r"shard_00001\.safetensors"):
        feature_stats(random_sae, harvest, 1000)
    assert feature_stats(random_sae, harvest, 20).num_tokens == 20
