"""First-order effects of SAE features, against finite differences through the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from steerserve.circuits.feature_attribution import attribute_features
from steerserve.circuits.forward import activations, all_last_logits, last_logits
from steerserve.circuits.metrics import logit_difference
from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.models.hooks import transformed
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

SITE = Site(0, Stream.RESID_POST)
STEP = 1e-5


@pytest.fixture
def sae() -> SAE:
    """24 features over width 32, in float64."""
    generator = torch.Generator().manual_seed(3)
    W_dec = torch.randn(24, 32, generator=generator, dtype=torch.float64)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    zeros = torch.zeros(24, dtype=torch.float64)
    return SAE(
        "random", SITE, W_dec.T, zeros, W_dec, torch.zeros(32, dtype=torch.float64), zeros + 0.2, sha256="a" * 64
    )


@pytest.fixture
def lossless() -> SAE:
    """x = relu(x) − relu(−x)."""
    eye = torch.eye(32, dtype=torch.float64)
    W_dec, zeros = torch.cat([eye, -eye]), torch.zeros(64, dtype=torch.float64)
    return SAE("lossless", SITE, W_dec.T, zeros, W_dec, zeros[:32], zeros)


def test_the_effects_are_slopes_of_the_metric(load_exact, make_pairs, sae) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    found = attribute_features(model, sae, pairs, "logit_difference", 24)
    metric = logit_difference(pairs)
    clean = metric(all_last_logits(model, pairs.clean, pairs.last)).item()
    f, other = (sae.encode(activations(model, tokens, [SITE])[SITE]) for tokens in (pairs.clean, pairs.corrupted))

    def slope(change: torch.Tensor, feature: int) -> float:
        edit = STEP * change[..., feature, None] * sae.W_dec[feature]
        edit[:, 0] = 0
        with torch.no_grad(), transformed(model, {SITE: lambda x: x + edit}):
            return (metric(last_logits(model, pairs.clean, pairs.last)).item() - clean) / STEP

    assert len(found.features) == 24
    for feature in found.features[:6]:
        assert feature.removed == pytest.approx(slope(-f, feature.id), rel=1e-3, abs=1e-5)
        assert feature.swapped == pytest.approx(slope(other - f, feature.id), rel=1e-3, abs=1e-5)
    assert max(abs(feature.removed) for feature in found.features) > 0.01


def test_the_largest_come_first_with_how_often_they_are_active(load_exact, make_pairs, sae) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    everything = attribute_features(model, sae, pairs, "log_odds", 24).features
    assert attribute_features(model, sae, pairs, "log_odds", 5).features == everything[:5]
    sizes = [abs(feature.removed) for feature in everything]
    assert sizes == sorted(sizes, reverse=True)
    f = sae.encode(activations(model, pairs.clean, [SITE])[SITE]) * pairs.real[..., None]
    for feature in everything:
        assert feature.active == pytest.approx((f[:, 1:, feature.id] > 0).any(1).double().mean().item())
        assert feature.active > 0 or feature.removed == 0


def test_a_lossless_sae_explains_the_whole_effect(load_exact, make_pairs, sae, lossless) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    found = attribute_features(model, lossless, pairs, "logit_difference", 3)
    assert found.by_features == pytest.approx(found.total, rel=1e-9)
    lossy = attribute_features(model, sae, pairs, "logit_difference", 3)
    assert lossy.total == pytest.approx(found.total, rel=1e-9)
    assert abs(lossy.by_features - lossy.total) > 1e-3


def test_many_prompts_are_attributed_like_few(load_exact, make_pairs, sae) -> None:
    model, pairs = load_exact("llama"), make_pairs(num=40)
    whole = {of.id: of for of in attribute_features(model, sae, pairs, "logit_difference", 24).features}
    parts = [pairs.take(part) for part in (range(10), range(10, 40))]
    halves = [{of.id: of for of in attribute_features(model, sae, p, "logit_difference", 24).features} for p in parts]
    for feature, of in whole.items():
        mean = (10 * halves[0][feature].removed + 30 * halves[1][feature].removed) / 40
        assert of.removed == pytest.approx(mean, rel=1e-6, abs=1e-9)


def test_what_has_no_slope_or_nothing_to_clamp_is_refused(load_exact, make_pairs, sae) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    with pytest.raises(InvalidRequestError, match=r"metric: got 'kl'.*logit_difference"):
        attribute_features(model, sae, pairs, "kl", 3)
    with pytest.raises(IncompatibleError, match="TopK"):
        attribute_features(model, replace(sae, k=3), pairs, "log_odds", 3)


def test_the_result_is_plain_json(load_exact, make_pairs, sae) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    content = json.loads(json.dumps(attribute_features(model, sae, pairs, "log_odds", 2).to_dict()))
    assert content["sae_sha256"] == "a" * 64
    assert content["features"][0].keys() == {"id", "removed", "swapped", "active"}
