"""The store of harvested rows: every row once an epoch, in an order that follows from the seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import AssetError
from steerserve.lab.manifest import DTYPES, Manifest
from steerserve.lab.store import ActivationStore
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)


def numbered_shards(*sizes: int) -> list[torch.Tensor]:
    """Rows that say their own number, in digits that bfloat16 holds exactly."""
    numbers = torch.arange(sum(sizes))
    rows = torch.stack([numbers // 100, numbers % 100], 1).float()
    return list(rows.split(list(sizes)))


def store_in(directory: Path, dtype: str) -> None:
    """Turn a harvest into one in ``dtype``."""
    for path in directory.glob("shard*"):
        save_file({name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(path).items()}, path)
    manifest = Manifest.load(directory)
    manifest.dtype = dtype
    manifest.save(directory)


def numbers_of(batches: Iterator[torch.Tensor]) -> list[list[int]]:
    return [(100 * batch[:, 0] + batch[:, 1]).int().tolist() for batch in batches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards_in_buffer", [1, 2, 4, 9])
@pytest.mark.parametrize(("batch_size", "left_out"), [(10, 0), (9, 5), (64, 12), (140, 0)])
def test_an_epoch_has_every_row_once(
    write_store, shards_in_buffer: int, batch_size: int, left_out: int, dtype: str
) -> None:
    directory = write_store(numbered_shards(40, 3, 37, 40, 20))
    store_in(directory, dtype)
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


@pytest.mark.parametrize("skip", range(16))
def test_a_stream_goes_on_from_any_place(write_store, skip: int) -> None:
    """Through the ends of buffers and of epochs, with the rows that were left over before the place."""
    directory = write_store(numbered_shards(40, 3, 37, 40))

    def numbers(skip: int, count: int) -> list[list[int]]:
        stream = ActivationStore(directory, SITE, seed=1, shards_in_buffer=2).stream(17, skip)
        return numbers_of(x for x, _ in itertools.islice(stream, count))

    assert numbers(skip, 18 - skip) == numbers(0, 18)[skip:]


def test_a_stream_is_epoch_after_epoch(write_store) -> None:
    directory = write_store(numbered_shards(40, 3, 37, 40))
    store = ActivationStore(directory, SITE, seed=1, shards_in_buffer=2)
    epochs = numbers_of(store.batches(30)) + numbers_of(store.batches(30))
    assert numbers_of(x for x, _ in itertools.islice(store.stream(30), 8)) == epochs


def test_pairs_are_of_the_same_token(write_store) -> None:
    directory = write_store(numbered_shards(20, 30))
    other = Site(2, Stream.MLP_OUT)
    for path in directory.glob("shard*"):
        tensors = load_file(path)
        save_file(tensors | {str(other): tensors[str(SITE)].flip(1).contiguous()}, path)
    manifest = Manifest.load(directory)
    manifest.sites.append(str(other))
    manifest.save(directory)
    store = ActivationStore(directory, SITE, seed=0, out_site=other, shards_in_buffer=1, held_out_rows=9)
    for skip in range(4):
        for x, y in itertools.islice(store.stream(8, skip), 8):
            assert torch.equal(y, x.flip(1))
    x, y = store.held_out()
    assert torch.equal(y, x.flip(1))
    assert len(x) == 9


@pytest.mark.parametrize("count", [1, 7, 8, 30, 47])
def test_held_out_rows_are_the_last_and_in_no_batch(write_store, count: int) -> None:
    store = ActivationStore(write_store(numbered_shards(20, 20, 8)), SITE, seed=0, held_out_rows=count)
    x, _ = store.held_out()
    assert numbers_of(iter([x])) == [list(range(48 - count, 48))]
    rows = [row for batch in numbers_of(store.batches(1)) for row in batch]
    assert sorted(rows) == list(range(48 - count))


def test_shards_that_are_refused(write_store) -> None:
    shards = numbered_shards(6, 6)
    shards[1][2, 0] = float("nan")
    shards[1][4] = float("inf")
    directory = write_store(shards)
    store = ActivationStore(directory, SITE, seed=0)
    match = r"shard_00001\.safetensors: 2 of 6 rows of blocks\.1\.hook_resid_post hold NaN or infinity"
    with pytest.raises(AssetError, match=match):
        next(store.stream(4))
    with pytest.raises(AssetError, match=match):
        ActivationStore(directory, SITE, seed=0, held_out_rows=3).held_out()
    (directory / "shard_00001.safetensors").write_bytes(b"damaged")
    with pytest.raises(AssetError, match=r"shard_00001\.safetensors cannot be read as a shard of activations"):
        ActivationStore(directory, SITE, seed=0)
    (directory / "shard_00001.safetensors").unlink()
    with pytest.raises(AssetError, match=r"shard_00001\.safetensors cannot be read"):
        ActivationStore(directory, SITE, seed=0)
    with pytest.raises(AssetError, match=r"holds 2 rows beside 10 held-out ones, less than one batch \(4\)"):
        next(ActivationStore(write_store(numbered_shards(12)), SITE, seed=0, held_out_rows=10).stream(4))
