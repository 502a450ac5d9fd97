"""How much of a behaviour a circuit carries, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerserve.circuits.faithfulness import Curve, Faithfulness, Incompleteness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_faithfulness(
    measured: Faithfulness, parts: Sequence[Incompleteness], curve: Curve, metric: str, title: str
) -> Figure:
    """The circuit between its references; faithfulness by size; what is left without parts K of the circuit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 3.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3)
    _draw_references(panels[0], measured, metric)
    _draw_curve(panels[1], curve)
    _draw_completeness(panels[2], parts, metric)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_references(axes: Axes, measured: Faithfulness, metric: str) -> None:
    groups = {
        "whole model": [measured.model],
        "circuit": [measured.circuit],
        "random, connected": measured.random_connected,
        "random edges": measured.random,
        "without circuit": [measured.knock_out],
        "nothing": [measured.nothing],
    }
    for row, (name, values) in enumerate(groups.items()):
        axes.plot(values, [row] * len(values), "o", color="#c0392b" if name == "circuit" else "#444444", alpha=0.7)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=f"{metric}, larger is worse")


def _draw_curve(axes: Axes, curve: Curve) -> None:
    axes.plot(curve.shares, curve.faithfulness, marker=".")
    axes.axhline(1, color="#999999", linewidth=0.6)
    axes.set(xscale="log", xlabel="share of the edges", ylabel="faithfulness")
    axes.set_title(f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}", fontsize=9)


def _draw_completeness(axes: Axes, parts: Sequence[Incompleteness], metric: str) -> None:
    of_circuit, of_model = [part.circuit for part in parts], [part.model for part in parts]
    axes.plot(of_model, of_circuit, "o", color="#2471a3", alpha=0.7)
    ends = [min(0.0, *of_circuit, *of_model), max(0.0, *of_circuit, *of_model)]
    axes.plot(ends, ends, color="#999999", linewidth=0.6)
    axes.set(xlabel=f"{metric} of the model without K", ylabel="of the circuit without K")
