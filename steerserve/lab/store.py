"""Mini-batches of harvested activations, for training.

The order of the rows is drawn apart from the rows themselves: it follows from the seed and the sizes of the shards, so
that a place in the stream is a count of batches, and a resumed run gets there without reading what lies before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from steerserve.errors import AssetError
from steerserve.lab.manifest import DTYPES, Manifest
from steerserve.types import Site

Pair = tuple[torch.Tensor, torch.Tensor]
"""Activations ``[n, d_in]`` of the site, and ``[n, d_out]`` of the output site at the same tokens."""


class ActivationStore:
    """Shuffled mini-batches of one site of a harvest, or of two at the same tokens, through a buffer of several shards.

    Attributes:
        out_site: the second site of a pair; ``site`` itself unless a transcoder is trained.
        held_out_rows: rows at the end of the harvest that no batch holds; see ``held_out``.
    """

    def __init__(
        self,
        directory: Path,
        site: Site,
        *,
        seed: int,
        out_site: Site | None = None,
        held_out_rows: int = 0,
        shards_in_buffer: int = 4,
    ) -> None:
        self.directory = directory
        self.site = site
        self.out_site = out_site or site
        self.held_out_rows = held_out_rows
        self.manifest = Manifest.load(directory)
        for wanted in (self.site, self.out_site):
            if str(wanted) not in self.manifest.sites:
                raise AssetError(f"{directory} holds {', '.join(self.manifest.sites)}, not {wanted}")
        self._starts = [0, *itertools.accumulate(self._sizes())]
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._shards_in_buffer = shards_in_buffer

    @property
    def num_rows(self) -> int:
        """Rows that batches are made of."""
        return max(self.manifest.num_rows - self.held_out_rows, 0)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """One epoch of ``[batch_size, d]`` fp32 batches of ``site``, in a new order at each call.

        Every row comes once, but for those that fill no batch at the end.

        Raises:
            AssetError: the harvest is smaller than one batch; a shard is damaged or holds NaN or infinity.
        """
        self._check_size(batch_size)
        for x, _ in self._epoch(batch_size, self._generator, skip=0):
            yield x

    def stream(self, batch_size: int, skip: int = 0) -> Iterator[Pair]:
        """Epoch after epoch of fp32 pairs, from the beginning whenever it is called, less the first ``skip`` batches.

        Raises:
            AssetError: as ``batches``.
        """
        self._check_size(batch_size)
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from self._epoch(batch_size, generator, skip)
            skip = max(skip - self.num_rows // batch_size, 0)

    def held_out(self) -> Pair:
        """The fp32 rows that no batch holds, in the order of the harvest."""
        numbers = [number for number, end in enumerate(self._starts[1:]) if end > self.num_rows]
        x, y = (
            torch.cat(
                [self._finite(number, site)[max(self.num_rows - self._starts[number], 0) :] for number in numbers]
            )
            for site in (self.site, self.out_site)
        )
        return x.float(), y.float()

    def shard(self, number: int) -> torch.Tensor:
        """Rows ``[n, d]`` of ``site`` in one shard, in the harvest's dtype, mapped from disk."""
        return self._read(number, self.site)

    def _check_size(self, batch_size: int) -> None:
        if self.num_rows < batch_size:
            held_out = f" beside {self.held_out_rows} held-out ones" if self.held_out_rows else ""
            raise AssetError(
                f"{self.directory} holds {self.num_rows} rows{held_out}, less than one batch ({batch_size})"
            )

    def _epoch(self, batch_size: int, generator: torch.Generator, skip: int) -> Iterator[Pair]:
        """The epoch that ``generator`` draws next, less its first ``skip`` batches.

        Rows that fill no batch of one buffer go into the next.
        """
        order = torch.randperm(len(self.manifest.shards), generator=generator).tolist()
        leftover = torch.empty(0, dtype=torch.long)
        for start in range(0, len(order), self._shards_in_buffer):
            chosen = order[start : start + self._shards_in_buffer]
            ids = torch.cat([leftover, *(self._ids(number) for number in chosen)])
            shuffled = torch.randperm(len(ids), generator=generator)
            full = len(ids) // batch_size * batch_size
            first = min(skip * batch_size, full)
            if first < full:
                x, y = self._buffer(leftover, chosen)
                for begin in range(first, full, batch_size):
                    batch = shuffled[begin : begin + batch_size]
                    rows = x[batch].float()
                    yield rows, (rows if y is x else y[batch].float())
            skip -= first // batch_size
            leftover = ids[shuffled[full:]]

    def _buffer(self, leftover: torch.Tensor, shards: list[int]) -> Pair:
        """The rows ``leftover``, then those of ``shards``."""
        pairs = [self._gather(leftover), *(self._shard_pair(number) for number in shards)]
        x = torch.cat([pair[0] for pair in pairs])
        return x, (x if self.out_site == self.site else torch.cat([pair[1] for pair in pairs]))

    def _shard_pair(self, number: int) -> Pair:
        count = len(self._ids(number))
        x = self._finite(number, self.site)[:count]
        return x, (x if self.out_site == self.site else self._finite(number, self.out_site)[:count])

    def _gather(self, ids: torch.Tensor) -> Pair:
        """Single rows, by their number in the harvest, in the order of ``ids``."""
        numbers = torch.bucketize(ids, torch.tensor(self._starts[1:]), right=True)
        pair = []
        for site in (self.site, self.out_site):
            rows = torch.empty(len(ids), self.manifest.d_model, dtype=DTYPES[self.manifest.dtype])
            for number in numbers.unique().tolist():
                here = numbers == number
                rows[here] = self._read(number, site)[ids[here] - self._starts[number]]
            pair.append(rows)
        return pair[0], pair[1]

    def _ids(self, number: int) -> torch.Tensor:
        """Numbers, counted over the whole harvest, of the rows of a shard that are not held out."""
        return torch.arange(*(min(bound, self.num_rows) for bound in self._starts[number : number + 2]))

    def _finite(self, number: int, site: Site) -> torch.Tensor:
        rows = self._read(number, site)
        broken = int((~rows.isfinite().all(1)).sum())
        if broken:
            path = self.directory / self.manifest.shards[number]
            raise AssetError(f"{path}: {broken} of {len(rows)} rows of {site} hold NaN or infinity; harvest it again")
        return rows

    def _read(self, number: int, site: Site) -> torch.Tensor:
        with self._open(number) as file:
            rows: torch.Tensor = file.get_tensor(str(site))
        return rows

    def _sizes(self) -> Iterator[int]:
        """Rows of each shard, from its header."""
        for number in range(len(self.manifest.shards)):
            with self._open(number) as file:
                yield file.get_slice(str(self.site)).get_shape()[0]

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        path = self.directory / self.manifest.shards[number]
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise AssetError(f"{path} cannot be read as a shard of activations: {error}") from error
