"""``steerserve discover``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.acdc import Report, sweep
from steerserve.circuits.commands.monitor_plan import PlanRequest, Thresholds
from steerserve.circuits.commands.options import TaskArgument, prompts_of
from steerserve.circuits.diagram import Diagram
from steerserve.circuits.discovery import Discovery
from steerserve.circuits.drawing import draw_heads, head_effects, save_circuit
from steerserve.circuits.faithfulness import Faithfulness, faithfulness
from steerserve.circuits.graph import Graph
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.plots import save
from steerserve.circuits.prompts import PromptPairs, Split
from steerserve.circuits.settings import ACDCConfig, ParentOrder
from steerserve.circuits.sliced import SlicedModel
from steerserve.circuits.slicing import slice_model
from steerserve.circuits.stability import measure_stability
from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelOption, console
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model
from steerserve.steering.monitor_plan import MAX_ENTRIES

BOOTSTRAPS = "bootstraps"
"""Directory of the further searches, below OUT."""
NUM_RANDOM = 5
TOP_HEADS = 12


def discover_command(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="Directory; the same command goes on with a search that was stopped.")],
    threshold: Annotated[
        list[float], typer.Option(help="τ: an edge stays if its removal adds as much to the metric; repeatable.")
    ] = [0.02],  # noqa: B006
    metric: Annotated[str, typer.Option(help=f"{', '.join(METRICS)}; larger is worse.")] = "kl",
    ablation: Annotated[Ablation, typer.Option(help="What a removed edge carries.")] = Ablation.CORRUPTED,
    split_qkv: Annotated[bool, typer.Option(help="Queries, keys and values have edges of their own.")] = False,
    expand_kv: Annotated[
        bool, typer.Option(help="Every head has its own keys and values, though a group shares them.")
    ] = False,
    order: Annotated[ParentOrder, typer.Option(help="In which edges are tested.")] = ParentOrder.LATER_FIRST,
    prompts: Annotated[int, typer.Option(min=1, help="Pairs to search on.")] = 16,
    held_out: Annotated[int, typer.Option(min=0, help="Other pairs, on which the circuit is measured; 0: none.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts, and of a random order.")] = 0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Memory for one batch of tests.")] = 2**30,
    bootstraps: Annotated[int, typer.Option(min=0, help="Further searches, each on another draw of the pairs.")] = 0,
    monitor_plan: Annotated[Path | None, typer.Option(help="Write what to watch, for `serve --monitor-plan`.")] = None,
    circuit: Annotated[
        list[Path], typer.Option(help="Plan: further circuit of the behaviour, such as of another --order; repeatable.")
    ] = [],  # noqa: B006
    control: Annotated[
        list[Path], typer.Option(help="Plan: circuit of another behaviour, for specificity; repeatable.")
    ] = [],  # noqa: B006
    watch: Annotated[int, typer.Option(min=1, max=MAX_ENTRIES, help="Plan: heads at most.")] = 9,
    min_frequency: Annotated[float, typer.Option(min=0, max=1, help="Plan: share of circuits with a head.")] = 0.5,
    min_specificity: Annotated[
        float, typer.Option(min=0, help="Plan: how much more often than circuits of --control have it.")
    ] = 0.0,
    texts: Annotated[
        list[Path], typer.Option(help="Plan: .jsonl[.gz] with 'text' and 'label', to fit a probe; repeatable.")
    ] = [],  # noqa: B006
    positive_label: Annotated[
        list[str], typer.Option(help="Plan: label of texts that show the behaviour; repeatable.")
    ] = [],  # noqa: B006
    sae: Annotated[list[Path], typer.Option(help="Plan: SAE directory, whose features count too; repeatable.")] = [],  # noqa: B006
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Find the circuit of a behaviour by ACDC, exactly: which heads and MLPs matter, through which edges."""
    configs = [ACDCConfig(each, order, seed, max_bytes=max_bytes) for each in threshold]
    if metric not in METRICS:
        raise InvalidRequestError("--metric", metric, f"one of {', '.join(METRICS)}")
    if bootstraps and ablation is not Ablation.CORRUPTED:
        raise InvalidRequestError("--bootstraps", bootstraps, "0 unless --ablation is corrupted")
    loaded = load_model(resolve_model(model), torch.float32)
    sliced = slice_model(loaded)
    graph = sliced.graph(split_qkv, "expanded" if expand_kv else "grouped")
    pairs = prompts_of(loaded, task, prompts, seed, Split.DISCOVERY)
    others = prompts_of(loaded, task, held_out, seed, Split.HELD_OUT) if held_out else None
    limits = Thresholds(watch, min_frequency, min_specificity)
    plan = monitor_plan and PlanRequest.of(loaded, monitor_plan, limits, control, texts, positive_label, sae)
    out.mkdir(parents=True, exist_ok=True)
    baseline = Baseline(sliced, pairs, ablation)
    measure = METRICS[metric](pairs, baseline.clean_logits)
    with _progress(graph) as report:
        circuits = sweep(graph, baseline, measure, configs[0], threshold, lambda tau: _file(out, tau), report)
    for found, tau in zip(circuits, sorted(threshold), strict=True):
        measured = None if others is None else _measured(sliced, graph, others, metric, ablation, found)
        _write(found, measured, _file(out, tau))
        title = f"{pairs.name}, τ = {tau:g}: {found.num_kept} of {graph.num_edges:,} edges"
        save_circuit(Diagram.of(graph, found.present, found.effects), title, _file(out, tau).with_suffix(".svg"))
        save(draw_heads(found, f"Effect of kept edges out of each head\n{title}"), out / f"heads-{tau:g}.svg")
        console.print(_table(found, measured, title, metric))
    console.print(f"circuits and pictures: {out}")
    files = [_file(out, tau) for tau in sorted(threshold)]
    if bootstraps:
        drawn = measure_stability(sliced, graph, pairs, metric, configs[:1], threshold, bootstraps, out / BOOTSTRAPS)
        files += [out / BOOTSTRAPS / f"{name}.json" for name in drawn.circuits]
    if plan:
        plan.write(loaded, pairs, metric, [*files, *circuit], bootstraps)


def _file(out: Path, threshold: float) -> Path:
    return out / f"circuit-{threshold:g}.json"


@contextmanager
def _progress(graph: Graph) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=graph.num_edges)

        def report(found: Discovery) -> None:
            kept = sum(decision.kept for decision in found.decisions)
            what = f"τ {found.cfg['threshold']:g}  {found.counts.tested:,} edges tested, {kept:,} kept"
            progress.update(bar, description=what, completed=len(found.decisions))

        yield report


def _measured(
    model: SlicedModel, graph: Graph, pairs: PromptPairs, metric: str, ablation: Ablation, found: Discovery
) -> Faithfulness:
    """On prompts that the search has not seen."""
    baseline = Baseline(model, pairs, ablation)
    return faithfulness(graph, baseline, METRICS[metric](pairs, baseline.clean_logits), found.present, NUM_RANDOM)


def _write(found: Discovery, measured: Faithfulness | None, path: Path) -> None:
    """The circuit, with what is told about it and the command that found it."""
    content: dict[str, Any] = found.to_json()
    if measured is not None:
        content["held_out"] = {**asdict(measured), "faithfulness": measured.faithfulness}
    content["heads"] = head_effects(found)
    content["command"] = shlex.join(["steerserve", *sys.argv[1:]])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)


def _table(found: Discovery, measured: Faithfulness | None, title: str, metric: str) -> Table:
    counts, graph = found.counts, found.graph
    table = Table("", "", title=title, show_header=False)
    ranked = sorted(
        (
            (effect, f"L{layer}H{head}")
            for layer, row in enumerate(head_effects(found))
            for head, effect in enumerate(row)
        ),
        reverse=True,
    )
    untested = sum(decision.test is None for decision in found.decisions)
    rows = {
        "heads, strongest first": ", ".join(name for effect, name in ranked[:TOP_HEADS] if effect > 0) or "none",
        "edges tested": f"{counts.tested:,} of {graph.num_edges:,}; {untested:,} lead nowhere",
        "evaluations": f"{counts.sequence_layers:,.0f} sequences × layers; a pass per tested edge takes "
        f"{counts.sequence_layers_naive:,}",
        "speculation": f"{counts.void:,} of {counts.rows:,} rows void; {counts.retested:,} tests near τ taken again",
        f"{metric} of the circuit": f"{found.value:.4g}",
    }
    if measured is not None:
        rows["on held-out prompts"] = (
            f"circuit {measured.circuit:.4g}, whole model {measured.model:.4g}, nothing {measured.nothing:.4g}: "
            f"faithfulness {measured.faithfulness:.2f}"
        )
        rows["the model without it"] = f"{measured.knock_out:.4g}"
        rows[f"{NUM_RANDOM} random circuits"] = ", ".join(f"{value:.4g}" for value in measured.random)
        rows["the same, connected"] = ", ".join(f"{value:.4g}" for value in measured.random_connected)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
