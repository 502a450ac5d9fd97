"""Mini-batches of harvested activations, for training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from steerserve.errors import AssetError
from steerserve.lab.manifest import Manifest
from steerserve.types import Site


class ActivationStore:
    """Shuffled mini-batches of one site of a harvest, through a buffer of several mapped shards."""

    def __init__(self, directory: Path, site: Site, *, seed: int, shards_in_buffer: int = 4) -> None:
        self.directory = directory
        self.site = site
        self.manifest = Manifest.load(directory)
        if str(site) not in self.manifest.sites:
            raise AssetError(f"{directory} holds {', '.join(self.manifest.sites)}, not {site}")
        self._generator = torch.Generator().manual_seed(seed)
        self._shards_in_buffer = shards_in_buffer

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """One epoch of ``[batch_size, d]`` fp32 batches, in a new order at each call.

        Every row comes once, but for those that fill no batch at the end.

        Raises:
            AssetError: the harvest is smaller than one batch.
        """
        if self.manifest.num_rows < batch_size:
            raise AssetError(
                f"{self.directory} holds {self.manifest.num_rows} rows, less than one batch ({batch_size})"
            )
        order = torch.randperm(len(self.manifest.shards), generator=self._generator).tolist()
        leftover: list[torch.Tensor] = []
        for start in range(0, len(order), self._shards_in_buffer):
            chosen = order[start : start + self._shards_in_buffer]
            buffer = torch.cat([*leftover, *(self.shard(number) for number in chosen)])
            shuffled = torch.randperm(len(buffer), generator=self._generator)
            full = len(buffer) // batch_size * batch_size
            for begin in range(0, full, batch_size):
                yield buffer[shuffled[begin : begin + batch_size]].float()
            leftover = [buffer[shuffled[full:]]]

    def shard(self, number: int) -> torch.Tensor:
        """Rows ``[n, d]`` bfloat16 of one shard, mapped from disk."""
        with safe_open(self.directory / self.manifest.shards[number], framework="pt") as file:
            rows: torch.Tensor = file.get_tensor(str(self.site))
        return rows
