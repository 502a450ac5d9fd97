"""The computation graph of a decoder: who writes into the residual stream, and who reads it.

A *source* writes: the embedding (``input``), a head (``a3.h1``), an MLP (``m3``). A *receiver* reads the sum of what
the sources before it wrote: an input of a head (``a3.h1<q>``), of an MLP, of the logits. An edge joins a source to a
later receiver; its name is ``a0.h1->a3.h1<q>``, as in EAP-IG and MIB.

Under grouped-query attention several query heads share a key and a value. ``kv="grouped"`` takes the model as it is:
one key and one value receiver per group (``a3.g0<k>``), and without split inputs one receiver per group.
``kv="expanded"`` gives every query head its own copy, as if the model had as many key heads as query heads.
SmolLM2-135M has 70,651 edges split and grouped, 123,211 split and expanded, 18,091 and 44,371 when not split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Present: TypeAlias = NDArray[np.bool_]
"""A circuit: ``[receivers, sources]``, True where the edge is kept."""

KV = Literal["grouped", "expanded"]


class Part(NamedTuple):
    """A projection that a receiver feeds: ``kind`` q of a query head, k or v of a key-value head."""

    kind: Literal["q", "k", "v"]
    head: int


@dataclass(frozen=True)
class Source:
    """A node that writes into the residual stream; ``head`` is None for the embedding (layer −1) and MLPs."""

    name: str
    layer: int
    head: int | None = None


@dataclass(frozen=True)
class Receiver:
    """A node's input.

    Attributes:
        layer: the number of layers for the logits.
        num_parents: the sources ``0 … num_parents − 1`` come before it.
        feeds: the sources whose value depends on it; none for the logits.
        parts: its projections; none unless it belongs to attention.
    """

    name: str
    layer: int
    num_parents: int
    feeds: tuple[int, ...]
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Sources and receivers of one model, both in topological order.

    Attributes:
        parallel: attention and MLP of a layer read the same residual (GPT-NeoX): no head → MLP edge within a layer.
        split: heads read queries, keys and values through receivers of their own.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False
    split: bool = True
    kv: KV = "grouped"

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        sources = [Source("input", -1)]
        for layer in range(self.n_layers):
            sources += [Source(f"a{layer}.h{head}", layer, head) for head in range(self.n_heads)]
            sources.append(Source(f"m{layer}", layer))
        return tuple(sources)

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        receivers: list[Receiver] = []
        for layer in range(self.n_layers):
            receivers += self._attention_receivers(layer)
            mlp = self.mlp(layer)
            receivers.append(Receiver(f"m{layer}", layer, self.head(layer, 0) if self.parallel else mlp, (mlp,)))
        receivers.append(Receiver("logits", self.n_layers, len(self.sources), ()))
        return tuple(receivers)

    def _attention_receivers(self, layer: int) -> Iterator[Receiver]:
        """By unit (a head, or the heads of a group), and within it q, k, v."""
        size = self.n_heads // self.n_kv_heads
        grouped = self.kv == "grouped" and size > 1
        before = self.head(layer, 0)

        def receiver(unit: str, heads: range, parts: list[Part]) -> Receiver:
            return Receiver(f"a{layer}.{unit}", layer, before, tuple(self.head(layer, h) for h in heads), tuple(parts))

        for first in range(0, self.n_heads, size if grouped else 1):
            heads = range(first, first + (size if grouped else 1))
            unit, kv_head = (f"g{first // size}" if grouped else f"h{first}"), first // size
            queries = [Part("q", head) for head in heads]
            shared = [Part("k", kv_head), Part("v", kv_head)]
            if self.split:
                yield from (receiver(f"h{head}<q>", range(head, head + 1), [Part("q", head)]) for head in heads)
                yield from (receiver(f"{unit}<{part.kind}>", heads, [part]) for part in shared)
            else:
                yield receiver(unit, heads, queries + shared)

    def head(self, layer: int, head: int) -> int:
        """Index of a head among the sources."""
        return 1 + layer * (self.n_heads + 1) + head

    def mlp(self, layer: int) -> int:
        """Index of an MLP among the sources."""
        return self.head(layer, self.n_heads)

    @property
    def num_edges(self) -> int:
        return sum(receiver.num_parents for receiver in self.receivers)

    @property
    def edges(self) -> Iterator[tuple[int, int]]:
        """``(receiver, source)`` of every edge."""
        return ((i, source) for i, receiver in enumerate(self.receivers) for source in range(receiver.num_parents))

    @cached_property
    def full(self) -> Present:
        """All edges."""
        parents = np.array([receiver.num_parents for receiver in self.receivers])
        return np.arange(len(self.sources)) < parents[:, None]

    def empty(self) -> Present:
        """No edge."""
        return np.zeros_like(self.full)

    @cached_property
    def receivers_of_layer(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the attention receivers by layer."""
        return tuple(
            tuple(i for i, receiver in enumerate(self.receivers) if receiver.layer == layer and receiver.parts)
            for layer in range(self.n_layers)
        )

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """By source: indices of the receivers that its value depends on."""
        return tuple(
            tuple(i for i, receiver in enumerate(self.receivers) if source in receiver.feeds)
            for source in range(len(self.sources))
        )

    def edge_name(self, receiver: int, source: int) -> str:
        return f"{self.sources[source].name}->{self.receivers[receiver].name}"


@dataclass(frozen=True, eq=False)
class Liveness:
    """What of a circuit the logits depend on.

    Attributes:
        sources, receivers: ``[sources]`` and ``[receivers]``: there is a path of kept edges to the logits.
        everywhere, wide: ``[sources]`` and ``[receivers]``: more than its value at the last position counts, because
            it is or becomes part of a key or a value.
    """

    sources: NDArray[np.bool_]
    receivers: NDArray[np.bool_]
    everywhere: NDArray[np.bool_]
    wide: NDArray[np.bool_]

    @classmethod
    def of(cls, graph: Graph, present: Present) -> Liveness:
        """One pass from the logits backwards."""
        receivers = np.zeros(len(graph.receivers), bool)
        receivers[-1] = True
        wide = np.zeros(len(graph.receivers), bool)
        sources, everywhere = np.zeros((2, len(graph.sources)), bool)
        for index in reversed(range(len(graph.sources))):
            # A source's readers come before it, and what it writes to comes after: both are settled in this order.
            sources[index] = (present[:, index] & receivers).any()
            everywhere[index] = (present[:, index] & receivers & wide).any()
            for reader in graph.readers[index] if sources[index] else ():
                receivers[reader] = True
                is_memory = any(part.kind != "q" for part in graph.receivers[reader].parts)
                wide[reader] |= is_memory or everywhere[index]
        return cls(sources, receivers, everywhere, wide)


def descendants(graph: Graph, present: Present, receivers: Iterable[int], live: Liveness) -> NDArray[np.bool_]:
    """``[sources]``: the live sources that a change of these receivers' inputs may change."""
    changed = np.zeros(len(graph.sources), bool)
    for receiver in receivers:
        changed[list(graph.receivers[receiver].feeds)] = True
    for index, readers in enumerate(graph.readers):
        changed[index] |= bool((present[list(readers)] & changed).any())
        changed[index] &= live.sources[index]
    return changed
