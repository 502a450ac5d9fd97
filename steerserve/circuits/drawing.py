"""Pictures of a circuit: its nodes and edges by layer, and how strongly each head writes to the rest of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from steerserve.circuits.diagram import COLOURS, Arrow, Diagram
from steerserve.circuits.discovery import Discovery
from steerserve.circuits.dot import source_of
from steerserve.circuits.plots import heat_map, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, COLUMN = 0.55, 0.85
"""Inches."""


def save_circuit(diagram: Diagram, title: str, path: Path) -> None:
    """Write an SVG: laid out by Graphviz, or plainly where its program ``dot`` is missing or fails."""
    import graphviz

    try:
        path.write_bytes(source_of(diagram, title).pipe("svg"))
    except (graphviz.ExecutableNotFound, graphviz.CalledProcessError):
        save(draw_circuit(diagram, title), path)


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


def draw_circuit(diagram: Diagram, title: str) -> Figure:
    """Nodes by layer, the logits on top."""
    from matplotlib.figure import Figure

    places = _places(diagram)
    width, height = (1 + max(place[axis] for place in places.values()) for axis in (0, 1))
    figure = Figure(figsize=(2 + COLUMN * width, 1 + ROW * height), layout="constrained")
    axes: Axes = figure.subplots()
    for arrow in reversed(diagram.arrows):
        _draw(axes, arrow, places, diagram.strength(arrow))
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#444444", "linewidth": 0.8}
        axes.text(x, y, name, ha="center", va="center", fontsize=7, bbox=box, zorder=3)
    for kind in diagram.kinds:
        axes.plot([], [], color=COLOURS[kind], label=f"into {kind}")
    if diagram.kinds:
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set(xlim=(-0.7, width - 0.3), ylim=(-0.7, height - 0.3))
    axes.set_title(diagram.titled(title), fontsize=9)
    axes.axis("off")
    return figure


def _places(diagram: Diagram) -> dict[str, tuple[float, float]]:
    """All but heads in a column of their own."""
    places = {}
    for y, nodes in enumerate(diagram.rows):
        # Neighbouring rows are shifted, so that fewer arrows pass behind a name.
        first = 1 + 0.4 * (y % 3) if nodes[0].is_head else 0.0
        places.update({node.name: (first + x, float(y)) for x, node in enumerate(nodes)})
    return places


def _draw(axes: Axes, arrow: Arrow, places: dict[str, tuple[float, float]], strength: float) -> None:
    """Thicker for a larger effect."""
    style = {
        "arrowstyle": "-|>",
        "color": COLOURS[arrow.kind],
        "linewidth": 0.4 + 2.6 * strength,
        "alpha": 0.35 + 0.55 * strength,
        "connectionstyle": "arc3,rad=0.15",
        "shrinkA": 8,
        "shrinkB": 8,
    }
    axes.annotate("", xy=places[arrow.end.name], xytext=places[arrow.start.name], arrowprops=style)
