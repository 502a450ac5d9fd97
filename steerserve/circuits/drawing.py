"""Pictures of a circuit: its nodes and edges by layer, and how strongly each head writes to the rest of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from steerserve.circuits.discovery import Decision, Discovery
from steerserve.circuits.graph import Graph, Liveness, Receiver, Source
from steerserve.circuits.plots import heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
ROW, COLUMN = 0.55, 0.85
"""Inches."""


def head_name(source: Source) -> str:
    """``L12H5``; MLPs and the embedding as they are called in the graph."""
    return source.name if source.head is None else f"L{source.layer}H{source.head}"


def head_effects(found: Discovery) -> list[list[float]]:
    """``[layers][heads]`` the effects of the kept edges out of each head, summed."""
    effects = np.zeros((found.graph.n_layers, found.graph.n_heads))
    for edge in found.decisions:
        source = found.graph.sources[edge.source]
        if edge.kept and source.head is not None:
            effects[source.layer, source.head] += edge.effect
    rows: list[list[float]] = effects.tolist()
    return rows


def draw_heads(found: Discovery, title: str) -> Figure:
    """Layers × heads: the effects of the kept edges out of each head, summed."""
    return heat_map(head_effects(found), [str(head) for head in range(found.graph.n_heads)], title, "head")


def draw_circuit(found: Discovery, title: str) -> Figure:
    """Live nodes by layer, the logits on top; of the edges on a path to the logits the strongest ``MAX_EDGES``."""
    from matplotlib.figure import Figure

    live = Liveness.of(found.graph, found.present)
    edges = [arrow for edge in found.decisions if edge.kept for arrow in _arrows(found.graph, edge, live)]
    drawn = sorted(edges, key=lambda arrow: -arrow.effect)[:MAX_EDGES]
    if len(drawn) < len(edges):
        title += f"\nthe {len(drawn)} strongest of {len(edges)} edges"
    places = _places(found.graph.n_layers, drawn)
    width, height = (1 + max(place[axis] for place in places.values()) for axis in (0, 1))
    figure = Figure(figsize=(2 + COLUMN * width, 1 + ROW * height), layout="constrained")
    axes: Axes = figure.subplots()
    strongest = max((arrow.effect for arrow in drawn), default=1.0)
    for arrow in reversed(drawn):
        _draw(axes, arrow, places, strongest)
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#444444", "linewidth": 0.8}
        axes.text(x, y, name, ha="center", va="center", fontsize=7, bbox=box, zorder=3)
    for kind, colour in COLOURS.items():
        if any(arrow.kind == kind for arrow in drawn):
            axes.plot([], [], color=colour, label=f"into {kind}")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set(xlim=(-0.7, width - 0.3), ylim=(-0.7, height - 0.3))
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    return figure


@dataclass(frozen=True)
class _Node:
    """A node of the picture; ``row`` is its layer, plus a half for an MLP, which stands above its layer's heads."""

    name: str
    row: float
    is_head: bool


@dataclass(frozen=True)
class _Arrow:
    """An edge, or its part into one of several heads that share a receiver."""

    start: _Node
    end: _Node
    kind: str
    effect: float


def _arrows(graph: Graph, edge: Decision, live: Liveness) -> list[_Arrow]:
    """To each node on a path to the logits that the edge's receiver feeds."""
    receiver, start = graph.receivers[edge.receiver], _node(graph.sources[edge.source])
    ends = [_node(graph.sources[source]) for source in receiver.feeds if live.sources[source]]
    if not receiver.feeds:
        ends = [_Node("logits", float(graph.n_layers), False)]
    return [_Arrow(start, end, _kind(receiver), edge.effect) for end in ends]


def _node(source: Source) -> _Node:
    return _Node(head_name(source), source.layer + 0.5 * (source.head is None), source.head is not None)


def _kind(receiver: Receiver) -> str:
    """What colour an edge into it has."""
    if not receiver.feeds:
        return "logits"
    kinds = {part.kind for part in receiver.parts}
    return "mlp" if not kinds else kinds.pop() if len(kinds) == 1 else "attention"


def _places(num_layers: int, arrows: list[_Arrow]) -> dict[str, tuple[float, float]]:
    """A row for each layer's heads and for each MLP, none left empty; all but heads in a column of their own."""
    nodes = {node for arrow in arrows for node in (arrow.start, arrow.end)} | {_Node("logits", num_layers, False)}
    rows = sorted({node.row for node in nodes})
    places = {}
    for y, row in enumerate(rows):
        names = sorted((node.name for node in nodes if node.row == row), key=lambda name: (len(name), name))
        is_head = any(node.is_head for node in nodes if node.row == row)
        # Neighbouring rows are shifted, so that fewer arrows pass behind a name.
        first = 1 + 0.4 * (y % 3) if is_head else 0.0
        places.update({name: (first + x, float(y)) for x, name in enumerate(names)})
    return places


def _draw(axes: Axes, arrow: _Arrow, places: dict[str, tuple[float, float]], strongest: float) -> None:
    """Thicker for a larger effect."""
    share = (max(arrow.effect, 0.0) / strongest) ** 0.5
    style = {
        "arrowstyle": "-|>",
        "color": COLOURS[arrow.kind],
        "linewidth": 0.4 + 2.6 * share,
        "alpha": 0.35 + 0.55 * share,
        "connectionstyle": "arc3,rad=0.15",
        "shrinkA": 8,
        "shrinkB": 8,
    }
    axes.annotate("", xy=places[arrow.end.name], xytext=places[arrow.start.name], arrowprops=style)
