"""A receiver's input as its edges are removed one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from steerserve.circuits.circuit import Circuit


class Removal:
    """The input of one receiver, in float64 so that hundreds of subtractions leave no trace.

    Attributes:
        kept: ``[sources]`` edges that are there.
    """

    def __init__(self, circuit: Circuit, receiver: int) -> None:
        self.kept = circuit.present[receiver].copy()
        self._circuit = circuit
        self._receiver = receiver
        # What all kept edges add is taken from their removals: with every edge removed, nearly nothing else is left.
        self._x = circuit.base(receiver).double()
        for change in self._changes(circuit.parents(receiver)):
            self._x = self._x - change

    def inputs(self, sources: Sequence[int]) -> Tensor:
        """``[len(sources), N, P, d_model]``: row j is without the first j + 1 of ``sources``."""
        return self._inputs(sources).to(self._circuit.baseline.model.dtype)

    def remove(self, sources: Sequence[int]) -> None:
        """Take these edges away for good."""
        if sources:
            self._x = self._inputs(sources)[-1:]
            self.kept[list(sources)] = False

    def canonical(self, without: Collection[int] = ()) -> Tensor:
        """``[1, N, P, d_model]``: the input, less some more edges, summed as ``Circuit.input_of`` would."""
        sources = [int(source) for source in np.flatnonzero(self.kept) if source not in without]
        circuit, receiver = self._circuit, self._receiver
        return circuit.mix(receiver, circuit.base(receiver), sources, circuit.deltas)

    def _inputs(self, sources: Sequence[int]) -> Tensor:
        return self._x + torch.cat(list(self._changes(sources))).double().cumsum(0)

    def _changes(self, sources: Iterable[int]) -> Iterator[Tensor]:
        """``[1, N, P, d_model]`` for each: what its removal adds, after those before it."""
        circuit = self._circuit
        layers, attention = circuit.baseline.model.layers, dict[int, Tensor]()
        for source in sources:
            node = circuit.graph.sources[source]
            delta = circuit.where_read(circuit.deltas[source], self._receiver)
            if node.head is None:
                yield -delta
                continue
            layer = layers[node.layer]
            delta = delta @ layer.W_O[node.head]
            if layer.post_attn_norm is None:
                yield -delta
                continue
            before = attention[node.layer] if node.layer in attention else self._attention(node.layer)
            attention[node.layer] = before - delta
            yield layer.to_stream(attention[node.layer]) - layer.to_stream(before)

    def _attention(self, layer: int) -> Tensor:
        """The sum of a layer's heads whose edges are there, before the norm."""
        circuit, graph = self._circuit, self._circuit.graph
        total = circuit.where_read(circuit.baseline.attention[layer], self._receiver)
        for head, W_O in enumerate(circuit.baseline.model.layers[layer].W_O):
            source = graph.head(layer, head)
            if self.kept[source]:
                total = total + circuit.where_read(circuit.deltas[source], self._receiver) @ W_O
        return total
