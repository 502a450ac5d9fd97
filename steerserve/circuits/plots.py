"""Pictures of results: a heat map of layers × columns, curves over layers, bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.26
"""Inches."""


def heat_map(values: Sequence[Sequence[float]], columns: Sequence[str], title: str, xlabel: str) -> Figure:
    """One row a layer, the last one on top; the colours are centred on 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + CELL * max(len(columns), 6), 1.4 + CELL * len(values)), layout="constrained")
    axes: Axes = figure.subplots()
    limit = max((abs(value) for row in values for value in row), default=0.0) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    axes.set(title=title, xlabel=xlabel, ylabel="layer")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(0, len(values), 1 + len(values) // 16))
    figure.colorbar(image, ax=axes)
    return figure


def heat_maps(panels: Mapping[str, Sequence[Sequence[float]]], xlabel: str, title: str) -> Figure:
    """Panels side by side, by name; one row a layer, the last one on top; all of them share colours from 0 to 1."""
    from matplotlib.figure import Figure

    num_layers, num_columns = len(next(iter(panels.values()))), len(next(iter(panels.values()))[0])
    size = (1.4 + (0.9 + 0.16 * num_columns) * len(panels), 1.6 + 0.16 * num_layers)
    figure = Figure(figsize=size, layout="constrained")
    row: Sequence[Axes] = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(row, panels.items(), strict=True):
        image = axes.imshow(values, cmap="magma_r", vmin=0, vmax=1, aspect="auto", origin="lower")
        axes.set_title(name, fontsize=9)
        axes.set(xlabel=xlabel)
    row[0].set(ylabel="layer")
    figure.colorbar(image, ax=list(row))
    figure.suptitle(title, fontsize=10)
    return figure


def curves(panels: Mapping[str, Mapping[str, Sequence[float]]], labels: Sequence[str], title: str) -> Figure:
    """Panels side by side, by the label of their y axis; of each, curves by name, one value a label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
    row: Sequence[Axes] = figure.subplots(1, len(panels), squeeze=False)[0]
    step = 1 + len(labels) // 10
    for axes, (ylabel, lines) in zip(row, panels.items(), strict=True):
        for name, values in lines.items():
            axes.plot(range(len(values)), values, marker=".", label=name)
        axes.set(xlabel="layer", ylabel=ylabel)
        axes.set_xticks(range(0, len(labels), step), labels[::step], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def bars(groups: Mapping[str, Sequence[float]], labels: Sequence[str], title: str) -> Figure:
    """Bars side by side, one of each group a label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 0.3 * len(labels), 3.2), layout="constrained")
    axes: Axes = figure.subplots()
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        axes.bar([place + number * width for place in range(len(labels))], values, width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(labels))], labels, rotation=90, fontsize=8)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write an image of the suffix's kind; an SVG is the same in every run."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "steerserve"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
