"""A circuit on given prompts: which edges are kept, and what its nodes write.

What a source adds to its kept edges, its output less its ablated output, is its *delta*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import numpy as np
from torch import Tensor

from steerserve.circuits.ablation import Baseline
from steerserve.circuits.graph import Graph, Liveness, Present

Deltas: TypeAlias = Mapping[int, Tensor]
"""By source ``[rows, N, P, ·]``; P is 1 where only the last position counts. A head's is taken before ``W_O``."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """Kept edges, and the deltas of the live sources; those of others may be missing or out of date."""

    graph: Graph
    baseline: Baseline
    present: Present
    live: Liveness
    deltas: Deltas

    @classmethod
    def whole(cls, graph: Graph, baseline: Baseline) -> Circuit:
        """The model itself."""
        return cls(graph, baseline, graph.full, Liveness.of(graph, graph.full), dict(enumerate(baseline.clean)))

    def base(self, receiver: int) -> Tensor:
        """``[1, N, P, d_model]``: what a receiver reads without any edge."""
        return self.where_read(self.baseline.base(self.graph.receivers[receiver]), receiver)

    def input_of(self, receiver: int) -> Tensor:
        """``[1, N, P, d_model]``: what a live receiver reads; summed in one order, whatever led here."""
        return self.mix(receiver, self.base(receiver), self.parents(receiver), self.deltas)

    def parents(self, receiver: int) -> list[int]:
        """Sources whose edge to the receiver is kept, ascending."""
        return [int(source) for source in np.flatnonzero(self.present[receiver])]

    def where_read(self, x: Tensor, receiver: int) -> Tensor:
        """``x`` at the positions at which a receiver is read."""
        return x if self.live.wide[receiver] else self.baseline.at_last(x)

    def mix(self, receiver: int, start: Tensor, sources: Iterable[int], deltas: Deltas, num_rows: int = 1) -> Tensor:
        """``start`` ``[1, N, P, d_model]`` and what ``sources``, ascending, add to it, in ``num_rows`` rows.

        All parents of one layer's heads must be among the sources if one of them is, where there is a norm behind
        attention.
        """
        nodes, baseline = self.graph.sources, self.baseline
        x = start.repeat(num_rows, 1, 1, 1)
        for (layer, is_head), group in groupby(sources, lambda i: (nodes[i].layer, nodes[i].head is not None)):
            terms = [(self.where_read(deltas[source], receiver), nodes[source].head) for source in group]
            if not is_head:
                x += terms[0][0]
                continue
            weights = baseline.model.layers[layer]
            if weights.post_attn_norm is None:
                _add_heads(x, terms, weights.W_O)
                continue
            attention = self.where_read(baseline.attention[layer], receiver).repeat(num_rows, 1, 1, 1)
            _add_heads(attention, terms, weights.W_O)
            x += weights.to_stream(attention) - self.where_read(baseline.attention_in_stream[layer], receiver)
        return x


def _add_heads(x: Tensor, terms: Iterable[tuple[Tensor, int | None]], W_O: Tensor) -> None:
    for z, head in terms:
        assert head is not None
        if len(z) == len(x):
            x.view(-1, x.shape[-1]).addmm_(z.reshape(-1, z.shape[-1]), W_O[head])
        else:
            x += z @ W_O[head]
