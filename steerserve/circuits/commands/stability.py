"""``steerserve analyse stability``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from steerserve.circuits.commands.options import (
    OutOption,
    SeedOption,
    TaskArgument,
    prompts_of,
    require_out,
    write,
)
from steerserve.circuits.commands.progress import progress
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.plots import heat_map
from steerserve.circuits.prompts import Split
from steerserve.circuits.settings import ACDCConfig, ParentOrder
from steerserve.circuits.slicing import slice_model
from steerserve.circuits.stability import Stability, measure_stability
from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelOption, console
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model

SHOWN = 12


def stability_command(
    task: TaskArgument,
    threshold: Annotated[list[float], typer.Option(help="τ; repeatable.")] = [0.02],  # noqa: B006
    order: Annotated[list[ParentOrder], typer.Option(help="Of the tests; repeatable.")] = [ParentOrder.LATER_FIRST],  # noqa: B006
    bootstraps: Annotated[int, typer.Option(min=1, help="Draws of the pairs, with replacement.")] = 4,
    metric: Annotated[str, typer.Option(help=f"{', '.join(METRICS)}; larger is worse.")] = "kl",
    split_qkv: Annotated[bool, typer.Option(help="Queries, keys and values have edges of their own.")] = False,
    expand_kv: Annotated[
        bool, typer.Option(help="Every head has its own keys and values, though a group shares them.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Pairs to draw from.")] = 16,
    seed: SeedOption = 0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Memory for one batch of tests.")] = 2**30,
    searches: Annotated[
        Path, typer.Option(help="Directory with a file a search; the same command goes on where it was stopped.")
    ] = Path("stability"),
    out: OutOption = Path("stability.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Search again on other draws of the pairs, in other orders, at other τ: which heads and edges stay?"""
    require_out(out)
    configs = [ACDCConfig(min(threshold), each, seed, max_bytes=max_bytes) for each in dict.fromkeys(order)]
    if metric not in METRICS:
        raise InvalidRequestError("--metric", metric, f"one of {', '.join(METRICS)}")
    loaded = load_model(resolve_model(model), torch.float32)
    sliced = slice_model(loaded)
    graph = sliced.graph(split_qkv, "expanded" if expand_kv else "grouped")
    pairs = prompts_of(loaded, task, prompts, seed, Split.DISCOVERY)
    with progress() as report:
        found = measure_stability(sliced, graph, pairs, metric, configs, threshold, bootstraps, searches, report)
    title = f"{pairs.name}: share of {len(found.circuits)} circuits with each head"
    console.print(_table(found, title))
    columns = [str(head) for head in range(graph.n_heads)]
    result = {"model": loaded.name, "task": pairs.name, "num_prompts": len(pairs), "metric": metric, **found.to_json()}
    write(result, heat_map(found.heads.tolist(), columns, title, "head"), out)


def _table(found: Stability, title: str) -> Table:
    table = Table("", "", title=title, show_header=False)
    ranked = sorted(
        ((-share, layer, head) for layer, row in enumerate(found.heads.tolist()) for head, share in enumerate(row))
    )
    shown = [f"L{layer}H{head} {-share:.2f}" for share, layer, head in ranked[:SHOWN] if share]
    table.add_row("heads, most frequent first", ", ".join(shown) or "none")
    sizes = [int(present.sum()) for present in found.circuits.values()]
    table.add_row("edges of the circuits", f"{min(sizes):,} to {max(sizes):,}")
    for respect, index in found.agreement().items():
        if index is not None:
            table.add_row(f"Jaccard index over {respect}s", f"{index:.2f}")
    return table
