"""How often the features of an SAE fire, and how strongly, over a harvest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import save_file

from steerserve.errors import AssetError
from steerserve.lab.store import ActivationStore
from steerserve.sae.model import SAE
from steerserve.types import Site

DENSITY = "feature_density.safetensors"
ROWS_AT_ONCE = 2048
BINS_PER_DECADE = 5


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Over ``num_tokens`` rows of a harvest.

    Attributes:
        density: ``[d_sae]`` share of tokens on which each feature fires; 0 makes it *dead*.
        max_activation: ``[d_sae]`` largest value of each.
    """

    density: torch.Tensor
    max_activation: torch.Tensor
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the share of dead features, and a histogram of log10 density over the others."""
        alive = np.log10(self.density[self.density > 0].numpy())
        lowest = int(np.floor(alive.min(initial=0)))
        counts, edges = np.histogram(alive, bins=max(1, -lowest * BINS_PER_DECADE), range=(lowest or -1, 0))
        return {
            "dead_share": (self.density == 0).double().mean().item(),
            "density_tokens": self.num_tokens,
            "density_histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()},
        }


@torch.inference_mode()
def feature_stats(sae: SAE, harvest: Path, max_tokens: int) -> FeatureStats:
    """Statistics of every feature over the first ``max_tokens`` rows of a harvest.

    Raises:
        AssetError: the harvest lacks the SAE's site, is empty, or has a shard with a value that is not finite.
    """
    fired = torch.zeros(sae.d_sae, dtype=torch.long)
    largest = torch.zeros(sae.d_sae)
    count = 0
    for (rows,) in harvested_rows(harvest, (sae.site,), max_tokens, "density"):
        f = sae.encode(rows)
        fired += (f > 0).sum(0)
        largest = torch.maximum(largest, f.amax(0))
        count += len(f)
    return FeatureStats(fired / count, largest, count)


def harvested_rows(
    harvest: Path, sites: tuple[Site, ...], max_tokens: int, title: str
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The first ``max_tokens`` rows of a harvest in its order, in parts, under a progress bar.

    Yields:
        ``[n, d]`` fp32 of each site at the same tokens.

    Raises:
        AssetError: the harvest lacks a site, is empty, or has a shard with a value that is not finite.
    """
    stores = [ActivationStore(harvest, site, seed=0) for site in sites]
    manifest = stores[0].manifest
    if not manifest.num_rows:
        raise AssetError(f"{harvest} holds no rows")
    left = min(max_tokens, manifest.num_rows)
    with Progress() as progress:
        task = progress.add_task(title, total=left)
        for number, name in enumerate(manifest.shards):
            shards = [store.shard(number)[:left] for store in stores]
            left -= len(shards[0])
            for parts in zip(*(shard.split(ROWS_AT_ONCE) for shard in shards), strict=True):
                if not all(part.isfinite().all() for part in parts):
                    raise AssetError(f"{harvest / name} holds activations that are not finite; harvest it again")
                yield tuple(part.float() for part in parts)
                progress.advance(task, len(parts[0]))
            if left <= 0:
                return


def save_density(stats: FeatureStats, directory: Path) -> None:
    """Record the density ``[d_sae]`` of every feature beside its SAE."""
    save_file({"density": stats.density.contiguous()}, directory / DENSITY)
