"""The picture of a circuit in the language of Graphviz."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from steerserve.circuits.diagram import COLOURS, Diagram

if TYPE_CHECKING:
    from graphviz import Digraph

FONT = {"fontname": "Helvetica", "fontsize": "10"}


def source_of(diagram: Diagram, title: str) -> Digraph:
    """A row a layer's heads and a row an MLP, from the embedding upwards; arrows are thicker for a larger effect."""
    from graphviz import Digraph

    dot = Digraph(
        "circuit", node_attr={**FONT, "shape": "box", "style": "rounded", "height": "0.25", "margin": "0.06,0.02"}
    )
    dot.attr(rankdir="BT", ranksep="0.35", nodesep="0.12", labelloc="t", label=_label(diagram, title), **FONT)
    rows = diagram.rows
    for nodes in rows:
        with dot.subgraph() as row:
            row.attr(rank="same")
            for node in nodes:
                row.node(node.name)
    # Rows that no arrow joins would stand side by side.
    for below, above in pairwise(rows):
        dot.edge(below[0].name, above[0].name, style="invis")
    for arrow in diagram.arrows:
        strength = diagram.strength(arrow)
        dot.edge(
            arrow.start.name,
            arrow.end.name,
            color=f"{COLOURS[arrow.kind]}{round(255 * (0.35 + 0.55 * strength)):02x}",
            penwidth=f"{0.4 + 2.6 * strength:.2f}",
            arrowsize="0.5",
            tooltip=f"{arrow.start.name} → {arrow.end.name}: {arrow.effect:.4g}",
        )
    return dot


def _label(diagram: Diagram, title: str) -> str:
    """Title and legend."""
    lines = "<BR/>".join(escape(line) for line in diagram.titled(title).splitlines())
    legend = ", ".join(f'<FONT COLOR="{COLOURS[kind]}">into {kind}</FONT>' for kind in diagram.kinds)
    return f"<{lines}<BR/>{legend}>"
