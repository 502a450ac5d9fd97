"""What the picture of a circuit shows: nodes in rows by layer, and its strongest edges as arrows between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from steerserve.circuits.agreement import Scores
from steerserve.circuits.graph import Graph, Liveness, Present, Receiver, Source

MAX_EDGES = 100
"""The strongest ones are drawn; a picture with more cannot be read."""
COLOURS = {
    "q": "#c0392b",
    "k": "#2471a3",
    "v": "#1e8449",
    "attention": "#7d3c98",
    "mlp": "#7f8c8d",
    "logits": "#111111",
}
"""Of arrows, by what they lead into."""


@dataclass(frozen=True)
class Node:
    """A node of the picture; ``row`` is its layer, plus a half for an MLP, which stands above its layer's heads."""

    name: str
    row: float
    is_head: bool


@dataclass(frozen=True)
class Arrow:
    """An edge, or its part into one of several heads that share a receiver; ``kind`` is a key of ``COLOURS``."""

    start: Node
    end: Node
    kind: str
    effect: float


@dataclass(frozen=True)
class Diagram:
    """The part of a circuit that can be drawn.

    Attributes:
        arrows: the strongest first.
        num_arrows: of the circuit, those that are left out included.
        logits: the node on top, which is there even without an arrow.
    """

    arrows: tuple[Arrow, ...]
    num_arrows: int
    logits: Node

    @classmethod
    def of(cls, graph: Graph, present: Present, effects: Scores) -> Diagram:
        """Of the edges on a path to the logits the strongest ``MAX_EDGES``.

        Args:
            effects: ``[receivers, sources]``, how strong each edge is.
        """
        live, logits = Liveness.of(graph, present), Node("logits", float(graph.n_layers), False)
        arrows = [
            Arrow(_node(graph.sources[source]), end, _kind(graph.receivers[reader]), float(effects[reader, source]))
            for reader, source in np.argwhere(present & live.receivers[:, None]).tolist()
            for end in _ends(graph, graph.receivers[reader], live, logits)
        ]
        strongest = sorted(arrows, key=lambda arrow: -arrow.effect)[:MAX_EDGES]
        return cls(tuple(strongest), len(arrows), logits)

    @property
    def rows(self) -> list[list[Node]]:
        """From the embedding to the logits; none is empty."""
        nodes = {node for arrow in self.arrows for node in (arrow.start, arrow.end)} | {self.logits}
        by_row: dict[float, list[Node]] = {}
        for node in sorted(nodes, key=lambda node: (node.row, len(node.name), node.name)):
            by_row.setdefault(node.row, []).append(node)
        return list(by_row.values())

    @property
    def kinds(self) -> list[str]:
        """What arrows lead into, for a legend."""
        return [kind for kind in COLOURS if any(arrow.kind == kind for arrow in self.arrows)]

    def strength(self, arrow: Arrow) -> float:
        """From 0 to 1, for widths: the root of its share of the strongest one's effect."""
        strongest = max(self.arrows[0].effect, 0.0)
        return float((max(arrow.effect, 0.0) / strongest) ** 0.5) if strongest else 0.0

    def titled(self, title: str) -> str:
        """The title, with a line on what is left out."""
        shown = len(self.arrows)
        return title if shown == self.num_arrows else f"{title}\nthe {shown} strongest of {self.num_arrows} edges"


def head_name(source: Source) -> str:
    """``L12H5``; MLPs and the embedding as they are called in the graph."""
    return source.name if source.head is None else f"L{source.layer}H{source.head}"


def _node(source: Source) -> Node:
    return Node(head_name(source), source.layer + 0.5 * (source.head is None), source.head is not None)


def _ends(graph: Graph, receiver: Receiver, live: Liveness, logits: Node) -> Iterator[Node]:
    """The nodes on a path to the logits that a receiver feeds."""
    if not receiver.feeds:
        yield logits
    yield from (_node(graph.sources[fed]) for fed in receiver.feeds if live.sources[fed])


def _kind(receiver: Receiver) -> str:
    """What colour an edge into it has."""
    if not receiver.feeds:
        return "logits"
    kinds = {part.kind for part in receiver.parts}
    return "mlp" if not kinds else kinds.pop() if len(kinds) == 1 else "attention"
