"""One pass over texts: how often and how strongly every feature fires, and where.

Memory does not grow with tokens × features: of every feature the strongest firings are kept and a uniform
random sample of all of them, each with the feature's activations around it. Both are the same operation, the
k largest by a key, with the activation or a random number for the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.sparse
import torch
from rich.progress import track

from steerserve.lab.features.source import Block, Source
from steerserve.sae.model import SAE

BEFORE, AFTER = 14, 8
"""Positions of a window on either side of where a feature fires."""

NUM_TOP, NUM_SAMPLED = 24, 64
BINS_PER_OCTAVE = 4
LOWEST_BIN, NUM_BINS = -64, 160
"""Histogram bin b counts activations in [2^(b/4), 2^((b+1)/4)), from 2^-16 to 2^24; others go to an end."""

CORRELATION_POSITIONS = 100_000
ELEMENTS_AT_ONCE = 1 << 25


@dataclass(frozen=True, eq=False)
class Firings:
    """Of each feature, up to k positions where it fires, by descending key.

    Attributes:
        value: ``[F, k]`` its activation there.
        position: ``[F, k]`` index into the flattened contexts; −1 where the feature has no more.
        window: ``[F, k, BEFORE + 1 + AFTER]`` float16 activations around it, 0 beyond the ends of the context.
    """

    value: torch.Tensor
    position: torch.Tensor
    window: torch.Tensor


@dataclass(frozen=True, eq=False)
class Scan:
    """What was seen of F features.

    Attributes:
        features: ``[F]`` their ids.
        contexts: ``[C, T]`` int32 tokens.
        num_positions: ordinary positions, over which everything is counted.
        fired, total, largest: ``[F]`` how often each fires, the sum of its activations, the largest.
        histogram: ``[F, NUM_BINS]`` counts of activations.
        top, sample: the strongest firings, and a random sample of all.
        activations: ``[m, d_sae]`` sparse, at evenly spaced ordinary positions.
    """

    features: torch.Tensor
    contexts: torch.Tensor
    num_positions: int
    fired: torch.Tensor
    total: torch.Tensor
    largest: torch.Tensor
    histogram: torch.Tensor
    top: Firings
    sample: Firings
    activations: scipy.sparse.csr_array

    @property
    def density(self) -> torch.Tensor:
        """``[F]`` share of positions where each fires."""
        return self.fired / max(self.num_positions, 1)


@torch.inference_mode()
def scan(sae: SAE, source: Source, features: torch.Tensor, seed: int = 0) -> Scan:
    """Run ``sae`` over ``source``; ``features`` ``[F]`` are looked at, all of them where they are compared."""
    num_contexts, context_length = source.contexts.shape
    counts = _Counts(len(features))
    top, sample = LargestByKey(len(features), NUM_TOP), LargestByKey(len(features), NUM_SAMPLED)
    generator = torch.Generator().manual_seed(seed)
    at_once = min(max(ELEMENTS_AT_ONCE // (context_length * sae.d_sae), 1), 16)
    stride = -(-source.contexts.numel() // CORRELATION_POSITIONS)
    num_positions, compared = 0, []
    for block in track(source.blocks(at_once), "activations", total=-(-num_contexts // at_once)):
        encoded = sae.encode(block.x)
        compared.append(scipy.sparse.csr_array(encoded[-num_positions % stride :: stride].double().numpy()))
        num_positions += len(block.x)
        f = _in_place(block, encoded[:, features])
        row, feature = (f.flatten(0, 1) > 0).nonzero(as_tuple=True)
        value = f.flatten(0, 1)[row, feature]
        counts.add(feature, value)
        for kept, key in ((top, value), (sample, torch.rand(len(value), generator=generator))):
            kept.add(f, block.first_context, row, feature, key)
    return Scan(
        features=features,
        contexts=source.contexts,
        num_positions=num_positions,
        fired=counts.fired,
        total=counts.total,
        largest=counts.largest,
        histogram=counts.histogram,
        top=top.firings,
        sample=sample.firings,
        activations=scipy.sparse.vstack(compared, format="csr"),
    )


def _in_place(block: Block, encoded: torch.Tensor) -> torch.Tensor:
    """Activations ``[B, T, F]``, 0 where a position is not ordinary."""
    f = encoded.new_zeros(block.tokens.numel(), encoded.shape[1])
    f[block.rows] = encoded
    return f.view(*block.tokens.shape, -1)


class _Counts:
    def __init__(self, num_features: int) -> None:
        self.fired = torch.zeros(num_features, dtype=torch.long)
        self.total = torch.zeros(num_features, dtype=torch.float64)
        self.largest = torch.zeros(num_features)
        self.histogram = torch.zeros(num_features, NUM_BINS, dtype=torch.int32)

    def add(self, feature: torch.Tensor, value: torch.Tensor) -> None:
        """Count activations ``value`` ``[n]`` of ``feature`` ``[n]``."""
        one = torch.ones_like(feature)
        self.fired.scatter_add_(0, feature, one)
        self.total.scatter_add_(0, feature, value.double())
        self.largest.scatter_reduce_(0, feature, value.float(), "amax")
        bins = (value.log2() * BINS_PER_OCTAVE).floor().long().sub(LOWEST_BIN).clamp(0, NUM_BINS - 1)
        self.histogram.view(-1).scatter_add_(0, feature * NUM_BINS + bins, one.int())


class LargestByKey:
    """For each of F features, the k firings with the largest keys among all that are added."""

    def __init__(self, num_features: int, k: int) -> None:
        self._key = torch.full((num_features, k), -torch.inf)
        self.firings = Firings(
            torch.zeros(num_features, k),
            torch.full((num_features, k), -1),
            torch.zeros(num_features, k, BEFORE + 1 + AFTER, dtype=torch.float16),
        )

    def add(
        self, f: torch.Tensor, first_context: int, row: torch.Tensor, feature: torch.Tensor, key: torch.Tensor
    ) -> None:
        """Offer the firings of a block.

        Args:
            f: ``[B, T, F]`` activations of contexts from ``first_context`` on.
            row, feature, key: ``[n]`` of each firing: index into the block's flattened positions, which feature,
                and its key.
        """
        better = key > self._key[feature, -1]
        row, feature, key = row[better], feature[better], key[better]
        order = key.argsort(descending=True)
        order = order[feature[order].argsort(stable=True)]  # by feature, in it by key
        rank = _rank_in_group(feature[order])
        order, rank = order[rank < self._key.shape[1]], rank[rank < self._key.shape[1]]
        row, feature = row[order], feature[order]
        touched, group = feature.unique(return_inverse=True)
        new_key = torch.full((len(touched), self._key.shape[1]), -torch.inf)
        new_key[group, rank] = key[order]
        self._key[touched], chosen = torch.cat([self._key[touched], new_key], 1).topk(self._key.shape[1], dim=1)
        position = first_context * f.shape[1] + row
        columns = (f.flatten(0, 1)[row, feature].float(), position, _windows(f, row, feature))
        for old, column in zip(vars(self.firings).values(), columns, strict=True):
            new = torch.zeros_like(old[touched])
            new[group, rank] = column
            both = torch.cat([old[touched], new], 1)
            old[touched] = both.gather(1, chosen.view(*chosen.shape, *[1] * (both.dim() - 2)).expand_as(old[touched]))


def _rank_in_group(sorted_groups: torch.Tensor) -> torch.Tensor:
    """``[n]`` place of each entry in its run of equal values."""
    _, counts = sorted_groups.unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank: torch.Tensor = torch.arange(len(sorted_groups)) - first
    return rank


def _windows(f: torch.Tensor, row: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """``[n, BEFORE + 1 + AFTER]`` float16 activations around ``row``."""
    length = f.shape[1]
    position = (row % length)[:, None] + torch.arange(-BEFORE, AFTER + 1)
    inside = (position >= 0) & (position < length)
    around = f[(row // length)[:, None], position.clamp(0, length - 1), feature[:, None]]
    limit = torch.finfo(torch.float16).max
    windows: torch.Tensor = (around * inside).clamp(max=limit).half()
    return windows
