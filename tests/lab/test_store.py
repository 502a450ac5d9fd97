"""The store of harvested rows: every row once an epoch, in an order that follows from the seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from steerserve.errors import AssetError
from steerserve.lab.store import ActivationStore
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)


def numbered_shards(*sizes: int) -> list[torch.Tensor]:
    """Rows that say their own number, in digits that bfloat16 holds exactly."""
    numbers = torch.arange(sum(sizes))
    rows = torch.stack([numbers // 100, numbers % 100], 1).float()
    return list(rows.split(list(sizes)))


def numbers_of(batches: Iterator[torch.Tensor]) -> list[list[int]]:
    return [(100 * batch[:, 0] + batch[:, 1]).int().tolist() for batch in batches]


@pytest.mark.parametrize("shards_in_buffer", [1, 2, 4, 9])
@pytest.mark.parametrize(("batch_size", "left_out"), [(10, 0), (9, 5), (64, 12), (140, 0)])
def test_an_epoch_has_every_row_once(write_store, shards_in_buffer: int, batch_size: int, left_out: int) -> None:
    directory = write_store(numbered_shards(40, 3, 37, 40, 20))
    batches = numbers_of(
        ActivationStore(directory, SITE, seed=0, shards_in_buffer=shards_in_buffer).batches(batch_size)
    )
    assert {len(batch) for batch in batches} == {batch_size}
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == 140 - left_out
    assert left_out < batch_size


def test_the_order_follows_from_the_seed(write_store) -> None:
    directory = write_store(numbered_shards(40, 40, 40))

    def epochs(seed: int) -> list[list[list[int]]]:
        store = ActivationStore(directory, SITE, seed=seed, shards_in_buffer=2)
        return [numbers_of(store.batches(8)) for _ in range(2)]

    first, second = epochs(seed=5)
    assert epochs(seed=5) == [first, second]
    assert first != second
    assert epochs(seed=6) != [first, second]
    assert any(len({row // 40 for row in batch}) > 1 for batch in first)  # batches mix shards


def test_batches_are_float32(write_store) -> None:
    (batch,) = ActivationStore(write_store(numbered_shards(6)), SITE, seed=0).batches(6)
    assert batch.dtype == torch.float32


def test_stores_that_are_refused(write_store) -> None:
    directory = write_store(numbered_shards(6))
    with pytest.raises(AssetError, match=r"holds blocks\.1\.hook_resid_post, not blocks\.2\.hook_resid_post"):
        ActivationStore(directory, Site(2, Stream.RESID_POST), seed=0)
    with pytest.raises(AssetError, match=r"holds 6 rows, less than one batch \(7\)"):
        next(ActivationStore(directory, SITE, seed=0).batches(7))
