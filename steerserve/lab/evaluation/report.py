"""The pages that show what ``evaluation.json`` holds: they are made from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steerserve.lab.html import render, svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]

BASES = ("features", "activation")
SAE_COLOUR, RAW_COLOUR, OTHER_COLOUR = "#2f86d6", "#e07b39", "#8b8d98"

FIGURES: dict[str, tuple[str, str]] = {
    "l0": ("L0", "mean number of active features per token"),
    "fvu": ("FVU", "Σ|x − x̂|² / Σ|x − mean x|²: the share of variance that the SAE does not explain"),
    "ce_clean": ("CE, clean", "next-token cross-entropy of the model as it is, nats per token"),
    "ce_spliced": ("CE, spliced", "the same with x̂ in the place of x"),
    "ce_mean_ablated": ("CE, mean-ablated", "the same with the mean of x in the place of x"),
    "delta_ce": ("ΔCE", "CE spliced − CE clean: what the model loses"),
    "ce_recovered": (
        "CE recovered",
        "1 − ΔCE / (CE mean-ablated − CE clean): 1 loses nothing, 0 is no better than the mean",
    ),
    "dead_share": ("dead features", "share of features that fire on none of the density tokens"),
    "held_out_tokens": ("held-out tokens", "tokens of test texts behind L0, FVU and the cross-entropies"),
    "excluded_share": (
        "excluded",
        "share of them, mostly first positions, with massive activations: they keep x, and count "
        "in the cross-entropies alone",
    ),
    "density_tokens": ("density tokens", "harvested tokens behind density and dead features"),
}
"""Title and definition of every figure of ``evaluation.json``, in the order in which they are shown."""

OVERLAP_FIGURES: dict[str, tuple[str, str]] = {
    "matched": ("matched pairs", "as many as the smaller number of live features"),
    "shared_share": ("shared", "share of matched pairs whose decoder cosine is at least the bound"),
    "shared_by_encoder_too": ("shared by encoder too", "share whose encoder cosine is, as well"),
    "mean_decoder_cosine": ("decoder cosine, mean", "over matched pairs"),
    "median_decoder_cosine": ("decoder cosine, median", "over matched pairs"),
    "mean_nearest_cosine": (
        "nearest cosine, mean",
        "of each live feature of the first, the largest decoder cosine with any live feature of the second",
    ),
    "mean_encoder_cosine": ("encoder cosine, mean", "over matched pairs"),
    "mean_correlation_shared": ("correlation, shared", "of the activations of shared pairs, mean of Pearson's"),
    "mean_correlation_other": ("correlation, others", "of those of the other matched pairs"),
    "correlation_tokens": ("tokens", "harvested tokens behind the correlations and the count of live features"),
}
"""The same of an overlap; those of correlation only where there were activations."""

SHARES = {"ce_recovered", "dead_share", "excluded_share", "shared_share", "shared_by_encoder_too"}


def shown(name: str, value: float | None) -> str:
    """A figure as text."""
    if value is None:
        return "undefined"
    if name in SHARES:
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:#.4g}"


def interval(of: Json, digits: int = 3) -> str:
    """An estimate and its interval as text."""
    return f"{of['value']:.{digits}f} [{of['low']:.{digits}f}, {of['high']:.{digits}f}]"


def evaluation_page(record: Json) -> str:
    """The report on one SAE, from the ``evaluation`` of its ``evaluation.json``."""
    probing = record.get("probing")
    polysemanticity = record.get("polysemanticity")
    return render(
        "evaluation",
        record=record,
        figures=[(*FIGURES[name], shown(name, record[name])) for name in FIGURES],
        headline=[
            (FIGURES[name][0], shown(name, record[name]))
            for name in ("l0", "fvu", "delta_ce", "ce_recovered", "dead_share")
        ],
        l0_plot=_l0_plot(record),
        density_plot=_density_plot(record["density_histogram"]),
        probing=probing,
        probe_plot=_probe_plot(probing["tasks"]) if probing else None,
        polysemanticity=polysemanticity,
        polysemanticity_plot=_polysemanticity_plot(polysemanticity) if polysemanticity else None,
        pairs=_pairs,
        interval=interval,
    )


def overlap_page(record: Json) -> str:
    """The report on the overlap of two SAEs, from the ``overlap`` of the first one's ``evaluation.json``."""
    figure, (axes,) = _figure(1, width=7)
    edges, counts = record["cosine_histogram"]["edges"], record["cosine_histogram"]["counts"]
    lowest = min(edge for edge, count in zip(edges, counts, strict=False) if count)
    _bars(axes, edges, counts, SAE_COLOUR)
    axes.axvline(record["shared_cosine"], color=RAW_COLOUR, linewidth=1.2, label=f"shared: ≥ {record['shared_cosine']}")
    axes.set(xlabel="decoder cosine of matched features", ylabel="pairs", xlim=(min(0, lowest), 1))
    axes.legend(loc="upper left")
    rows = [(*texts, shown(name, record[name])) for name, texts in OVERLAP_FIGURES.items() if name in record]
    return render("overlap", record=record, rows=rows, plot=svg(figure))


def _figure(panels: int, width: float, height: float = 2.7) -> tuple[Figure, Sequence[Axes]]:
    """One row of bare axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    row: Sequence[Axes] = figure.subplots(1, panels, squeeze=False)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def _bars(axes: Axes, edges: Sequence[float], counts: Sequence[int], colour: str) -> None:
    axes.stairs(counts, edges, fill=True, color=colour, alpha=0.75)


def _l0_plot(record: Json) -> Markup:
    figure, (axes,) = _figure(1, width=5)
    _bars(axes, record["l0_histogram"]["edges"], record["l0_histogram"]["counts"], SAE_COLOUR)
    axes.axvline(record["l0"], color=RAW_COLOUR, linewidth=1.2, label=f"mean {record['l0']:.1f}")
    axes.axvline(
        record["l0_quantiles"]["0.5"],
        color=OTHER_COLOUR,
        linewidth=1.2,
        linestyle="--",
        label=f"median {record['l0_quantiles']['0.5']:.0f}",
    )
    axes.set(xlabel="active features per token", ylabel="tokens", xlim=(0, None))
    axes.legend()
    return svg(figure)


def _density_plot(histogram: Json) -> Markup:
    figure, (axes,) = _figure(1, width=5)
    _bars(axes, histogram["log10_edges"], histogram["counts"], SAE_COLOUR)
    axes.set(xlabel="log10 of the share of tokens on which a feature fires", ylabel="features")
    return svg(figure)


def _pairs(task: Json) -> list[tuple[Json, Json]]:
    """The probe on features and the one on the raw activation, for each k."""
    features, activation = ([probe for probe in task["probes"] if probe["basis"] == basis] for basis in BASES)
    return list(zip(features, activation, strict=True))


def _probe_plot(tasks: list[Json]) -> Markup:
    figure, row = _figure(len(tasks), width=3.2 * len(tasks) + 1.5)
    lowest = min(probe["auroc"]["low"] for task in tasks for probe in task["probes"])
    for axes, task in zip(row, tasks, strict=True):
        pairs = _pairs(task)
        for probes, name, colour, shift in zip(
            zip(*pairs, strict=True),
            ("SAE features", "raw activation"),
            (SAE_COLOUR, RAW_COLOUR),
            (-0.08, 0.08),
            strict=True,
        ):
            value, low, high = ([probe["auroc"][part] for probe in probes] for part in ("value", "low", "high"))
            places = [place + shift for place in range(len(value))]
            axes.plot(places, value, "o", color=colour, label=name)
            axes.vlines(places, low, high, color=colour)
        axes.axhline(0.5, color=OTHER_COLOUR, linewidth=0.8, linestyle=":")
        axes.set(title=task["label"], xlabel="coordinates the probe sees (k)", ylim=(min(lowest, 0.5) - 0.02, 1.01))
        axes.set_xticks(range(len(pairs)), [str(features["k"] or "all") for features, _ in pairs])
    row[0].set_ylabel("AUROC on test texts")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return svg(figure)


def _polysemanticity_plot(measured: Json) -> Markup:
    figure, row = _figure(2, width=10, height=2.4)
    titles = {"distinct_tokens": "effective number of distinct tokens", "coherence": "coherence of contexts"}
    colours = [SAE_COLOUR, RAW_COLOUR, OTHER_COLOUR, OTHER_COLOUR]
    populations = measured["populations"]
    for axes, (measure, title) in zip(row, titles.items(), strict=True):
        boxes = []
        for population in populations:
            low, first, median, third, high = population[measure]["quantiles"].values()
            boxes.append(
                {
                    "label": population["name"],
                    "whislo": low,
                    "q1": first,
                    "med": median,
                    "q3": third,
                    "whishi": high,
                    "mean": population[measure]["mean"]["value"],
                }
            )
        drawn = axes.bxp(
            boxes,
            orientation="horizontal",
            showfliers=False,
            showmeans=True,
            patch_artist=True,
            widths=0.55,
            medianprops={"color": "black"},
            meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "black", "markeredgecolor": "black"},
        )
        for box, colour in zip(drawn["boxes"], colours, strict=True):
            box.set(facecolor=colour, alpha=0.6)
        axes.invert_yaxis()
        axes.set_xlabel(title)
    row[1].set_yticklabels([])
    return svg(figure)
