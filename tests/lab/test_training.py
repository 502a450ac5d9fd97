"""BatchTopK training: on data whose dictionary is known, it is found, and what is exported keeps its promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.store import ActivationStore
from steerserve.lab.training import TrainConfig, TrainStats, train_batch_topk
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
D, NUM_DIRECTIONS, NUM_ACTIVE = 64, 24, 3
LONG = TrainConfig(
    d_sae=64, k=NUM_ACTIVE, steps=700, batch_size=256, learning_rate=3e-3, dead_after_rows=5000, threshold_decay=0.98
)
SHORT = replace(LONG, steps=20, warmup_steps=5)
FIELDS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def directions() -> torch.Tensor:
    return F.normalize(torch.randn(NUM_DIRECTIONS, D, generator=torch.Generator().manual_seed(1)), dim=1)


def sparse_rows(count: int, scale: float = 1.0) -> torch.Tensor:
    """``NUM_ACTIVE`` of the directions on average, each at a strength of 1 to 2, about an offset."""
    generator = torch.Generator().manual_seed(2)
    on = torch.rand(count, NUM_DIRECTIONS, generator=generator) < NUM_ACTIVE / NUM_DIRECTIONS
    strength = 1 + torch.rand(count, NUM_DIRECTIONS, generator=generator)
    offset = 0.5 * torch.randn(D, generator=generator)
    return (scale * (on * strength @ directions() + offset)).bfloat16().float()


Train = Callable[..., SAE]


@pytest.fixture
def train(write_store) -> Train:
    """Train on the rows of three shards."""

    def train(
        rows: torch.Tensor, config: TrainConfig, report: Callable[[TrainStats], None] = lambda stats: None
    ) -> SAE:
        store = ActivationStore(write_store(list(rows.tensor_split(3))), SITE, seed=config.seed)
        return train_batch_topk(store, config, "toy", report)

    return train


def test_a_known_dictionary_is_recovered(train: Train) -> None:
    rows = sparse_rows(12_000)
    progress: list[TrainStats] = []
    sae = train(rows, LONG, progress.append)
    cosine = (directions() @ F.normalize(sae.W_dec, dim=1).T).amax(1)
    assert cosine.min() > 0.99
    f = sae.encode(rows)
    fvu = (rows - sae.decode(f)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert fvu < 0.01
    l0 = (f > 0).sum(1).float()  # one threshold for all rows, yet each has the number of features it needs
    assert l0.mean().item() == pytest.approx(NUM_ACTIVE, rel=0.05)
    assert l0.std() > 1
    assert progress[0].fvu > 0.5
    assert progress[-1].fvu == pytest.approx(fvu.item(), abs=0.01)
    assert [stats.step for stats in progress] == [*range(1, 700, 50), 700]
    # 24 features explain everything: the other 40 are rightly dead, and those that never fire again are counted.
    assert progress[-1].dead_share == pytest.approx(40 / 64, abs=0.1)


def test_the_exported_sae(train: Train) -> None:
    rows = sparse_rows(3000)
    sae = train(rows, SHORT)
    assert (sae.name, sae.site, sae.d_in, sae.d_sae) == ("toy", SITE, D, 64)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert (sae.threshold == sae.threshold[0]).all()
    assert sae.threshold[0] > 0
    assert sae.max_norm == pytest.approx(8 * rows.norm(dim=1).median().item(), rel=0.1)
    assert sae.metadata == {"model_name": "tiny", "context_size": 16, "model_fingerprint": "f" * 64}
    assert not any(getattr(sae, name).requires_grad for name in FIELDS)


def test_units_are_those_of_the_activations(train: Train) -> None:
    """Training on activations 64 times as large gives the same SAE in the larger unit, bit for bit."""
    small, large = train(sparse_rows(3000), SHORT), train(sparse_rows(3000, scale=64.0), SHORT)
    for name in ("W_enc", "W_dec"):
        assert torch.equal(getattr(small, name), getattr(large, name))
    for name in ("b_enc", "b_dec", "threshold"):
        assert torch.equal(64 * getattr(small, name), getattr(large, name))
    assert large.max_norm == 64 * small.max_norm


def test_a_run_follows_from_its_seed(train: Train) -> None:
    rows = sparse_rows(3000)
    first, again, other = train(rows, SHORT), train(rows, SHORT), train(rows, replace(SHORT, seed=1))
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_dead_features_are_trained_by_what_the_live_ones_leave(train: Train) -> None:
    rows = sparse_rows(3000)
    config = replace(SHORT, k=1, dead_after_rows=0)  # after each batch, whatever did not fire in it is dead
    with_aux, without = train(rows, config), train(rows, replace(config, dead_after_rows=10**9))
    assert all(torch.isfinite(getattr(with_aux, name)).all() for name in FIELDS)
    assert not torch.equal(with_aux.W_dec, without.W_dec)


def test_more_active_features_than_features_are_refused() -> None:
    assert TrainConfig(d_sae=8, k=8).k == 8
    with pytest.raises(InvalidRequestError, match="k: got 9, expected at most d_sae, 8"):
        TrainConfig(d_sae=8, k=9)


def test_a_harvest_smaller_than_a_batch_is_refused(train: Train) -> None:
    """Rather than waiting for ever for the first full batch."""
    with pytest.raises(AssetError, match=r"holds 255 rows, less than one batch \(256\)"):
        train(sparse_rows(255), SHORT)
