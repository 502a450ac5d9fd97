"""``card.html``: the evaluation of a pack on one page, from nothing but its ``card.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steerserve.lab.html import render, svg
from steerserve.steering.packs import ConceptPack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>"
COLOURS = ("#0b68cb", "#ca244d", "#18794e", "#8e4ec6", "#d97706", "#0e8a9b", "#8b8d98", "#a0522d")


def render_card(pack: ConceptPack) -> str:
    """The page of an evaluated pack."""
    evaluation = pack.card.evaluation
    figure = plane(evaluation)
    return render("card", card=pack.card, evaluation=evaluation, plane=svg(figure), policy=_policy(evaluation))


def plane(evaluation: dict[str, Any]) -> Figure:
    """Rate against KL on benign text, every arm with both 95 % intervals; a line joins the Pareto front."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    arms = evaluation["arms"]
    figure = Figure(figsize=(8, 4.6))
    axes = figure.subplots()
    floor = 0.5 * min([arm["steering"]["kl"]["value"] for arm in arms if arm["steering"]["kl"]["value"] > 0] or [1e-3])
    axes.set_xscale("log")
    untreated = arms[0]["steering"]["untreated_rate"]["value"]
    axes.axhline(100 * untreated, color="#8b8d98", linewidth=0.8, linestyle=":")
    axes.annotate(
        "untreated", (1, 100 * untreated), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
    )
    methods = list(dict.fromkeys(arm["method"] for arm in arms))
    for index, method in enumerate(methods):
        members = [arm["steering"] for arm in arms if arm["method"] == method]
        _method(axes, members, floor, method, MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)])
    front = {arm["name"]: arm["steering"] for arm in arms if arm["name"] in evaluation["front"]}
    points = [(max(s["kl"]["value"], floor), 100 * s["rate"]["value"]) for s in front.values()]
    if points:
        axes.plot(*zip(*sorted(points), strict=True), color="#8b8d98", linewidth=1, zorder=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda kl, _: f"{kl:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("KL on benign text, nats per token")
    axes.set_ylabel("continuations that show the concept, %")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _method(axes: Axes, members: list[dict[str, Any]], floor: float, label: str, marker: str, colour: str) -> None:
    x = [max(s["kl"]["value"], floor) for s in members]
    y = [100 * s["rate"]["value"] for s in members]
    across = [_arms(s["kl"], 1, floor) for s in members]
    along = [_arms(s["rate"], 100, 0) for s in members]
    axes.errorbar(
        x, y, xerr=list(zip(*across, strict=True)), yerr=list(zip(*along, strict=True)),
        fmt=marker, color=colour, markersize=5, elinewidth=0.9, capsize=2, label=label,
    )  # fmt: skip


def _arms(interval: dict[str, float], scale: float, floor: float) -> tuple[float, float]:
    """How far an error bar reaches below and above a value that is drawn no lower than ``floor``."""
    value = max(interval["value"], floor)
    return scale * max(value - max(interval["low"], floor), 0.0), scale * max(interval["high"] - value, 0.0)


def _policy(evaluation: dict[str, Any]) -> dict[str, Any]:
    (arm,) = [arm for arm in evaluation["arms"] if arm["name"] == "policy"]
    return dict(arm)
