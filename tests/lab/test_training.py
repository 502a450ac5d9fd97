"""BatchTopK training: on data whose dictionary is known, it is found, and what is exported keeps its promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.activations import ActivationStore
from steerserve.lab.training import TrainConfig, TrainStats, train_batch_topk
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
D, NUM_DIRECTIONS, ACTIVE = 32, 40, 3
QUICK = TrainConfig(d_sae=48, k=3, steps=20, batch_size=256, warmup_steps=5)


def directions() -> torch.Tensor:
    return F.normalize(torch.randn(NUM_DIRECTIONS, D, generator=torch.Generator().manual_seed(1)), dim=1)


def sparse_rows(count: int, scale: float = 1.0) -> torch.Tensor:
    """``ACTIVE`` of the directions on average, each at a strength of 1 to 2, about an offset."""
    generator = torch.Generator().manual_seed(2)
    on = torch.rand(count, NUM_DIRECTIONS, generator=generator) < ACTIVE / NUM_DIRECTIONS
    strength = 1 + torch.rand(count, NUM_DIRECTIONS, generator=generator)
    offset = 0.5 * torch.randn(D, generator=generator)
    return (scale * (on * strength @ directions() + offset)).bfloat16().float()


def train(store: ActivationStore, config: TrainConfig) -> SAE:
    return train_batch_topk(store, config, "toy", lambda stats: None)


@pytest.fixture
def quick_store(write_store):
    """A function from rows to the store that holds them, opened afresh."""
    directories = {}

    def open_store(scale: float = 1.0, seed: int = 0) -> ActivationStore:
        if scale not in directories:
            directories[scale] = write_store(list(sparse_rows(2048, scale).split(700)))
        return ActivationStore(directories[scale], SITE, seed=seed)

    return open_store


def test_a_known_dictionary_is_recovered(write_store) -> None:
    rows = sparse_rows(16_384)
    store = ActivationStore(write_store(list(rows.split(4096))), SITE, seed=0)
    config = TrainConfig(d_sae=48, k=ACTIVE, steps=700, batch_size=512, learning_rate=3e-3, dead_after_rows=20_000, threshold_decay=0.98)
    seen: list[TrainStats] = []
    sae = train_batch_topk(store, config, "toy", seen.append)
    cosine = (directions() @ F.normalize(sae.W_dec, dim=1).T).amax(1)
    f = sae.encode(rows)
    fvu = (rows - sae.decode(f)).square().sum() / (rows - rows.mean(0)).square().sum()
    print(cosine.sort().values[:10], fvu, (f>0).float().sum(1).mean(), seen[-1], sae.threshold[0])
    assert cosine.quantile(0.1) > 0.9


