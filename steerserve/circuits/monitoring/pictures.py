"""A picture of a comparison: every reading's AUROC and detection, with intervals, and each random draw as a dot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = {"auroc": "AUROC", "detection": "detected at 1 % false positives"}


def draw_trial(outcomes: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """A row of panels for each outcome's JSON, by its name; a line for each reading."""
    from matplotlib.figure import Figure

    num_lines = sum(len(outcome["readings"]) for outcome in outcomes.values())
    figure = Figure(figsize=(9.5, 1.2 + 0.9 * len(outcomes) + 0.24 * num_lines), layout="constrained")
    ratios = [len(outcome["readings"]) for outcome in outcomes.values()]
    rows = figure.subplots(len(outcomes), len(FIGURES), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for (name, outcome), panels in zip(outcomes.items(), rows, strict=True):
        for axes, (key, label) in zip(panels, FIGURES.items(), strict=True):
            _draw(axes, outcome["readings"], key)
            axes.set_title(f"{name}: {label}", fontsize=9)
        panels[1].set_yticklabels([])
    figure.suptitle(title, fontsize=10)
    return figure


def _draw(axes: Axes, readings: Mapping[str, Any], key: str) -> None:
    for place, (name, reading) in enumerate(readings.items()):
        figure = reading[key]
        colour = "#c0392b" if name == "circuit" else "#7f8c8d" if "each" in reading else "#2471a3"
        errors = [[figure["value"] - figure["low"]], [figure["high"] - figure["value"]]]
        axes.errorbar([figure["value"]], [place], xerr=errors, fmt="o", color=colour, markersize=4, capsize=2)
        each = reading.get("each", {}).get(key, [])
        axes.plot(each, [place + 0.25] * len(each), "|", color=colour, alpha=0.6)
    axes.set_yticks(range(len(readings)), list(readings), fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
