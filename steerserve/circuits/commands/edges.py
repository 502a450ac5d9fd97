"""``steerserve analyse edges``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from steerserve.circuits.ablation import Ablation
from steerserve.circuits.agreement import auroc, overlap
from steerserve.circuits.circuit_file import CircuitFile
from steerserve.circuits.commands.options import (
    MetricOption,
    NumPromptsOption,
    OutOption,
    SeedOption,
    SplitOption,
    TaskArgument,
    metric_of,
    prompts_of,
    require_out,
    write_beside_picture,
)
from steerserve.circuits.commands.progress import progress
from steerserve.circuits.diagram import Diagram
from steerserve.circuits.drawing import save_circuit
from steerserve.circuits.edge_attribution import EdgeScores, attribute_edges
from steerserve.circuits.prompts import Split
from steerserve.circuits.slicing import slice_model
from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.lab.commands.options import ModelOption, console
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model

SHOWN = 12
DEFAULT_COUNT = 200


def edges_command(
    task: TaskArgument,
    steps: Annotated[int, typer.Option(min=1, help="1: EAP; more: EAP-IG with as many.")] = 5,
    circuit: Annotated[
        Path | None,
        typer.Option(
            help="A circuit of `discover` to compare with; its graph is taken, and its metric if there is no --metric."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help=f"Edges in the circuit. If none: as many as --circuit has, or {DEFAULT_COUNT}."),
    ] = None,
    split_qkv: Annotated[bool, typer.Option(help="Queries, keys and values have edges of their own.")] = False,
    expand_kv: Annotated[
        bool, typer.Option(help="Every head has its own keys and values, though a group shares them.")
    ] = False,
    metric: MetricOption = None,
    num_prompts: NumPromptsOption = 32,
    seed: SeedOption = 0,
    split: SplitOption = Split.DISCOVERY,
    out: OutOption = Path("edges.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Score every edge by EAP or EAP-IG: approximate, from a few passes where `discover` tests each.

    The result has the form of a circuit of `discover`: the edges with the largest |score|, as far as connected.
    """
    require_out(out)
    if circuit is not None and (split_qkv or expand_kv):
        raise InvalidRequestError("--split-qkv and --expand-kv", True, "neither beside --circuit, which has a graph")
    name = metric_of(task, metric)
    loaded = load_model(resolve_model(model), torch.float32)
    sliced = slice_model(loaded)
    exact = None if circuit is None else CircuitFile.read(circuit, sliced)
    if exact is not None and exact.ablation is not Ablation.CORRUPTED:
        raise IncompatibleError(
            "--circuit", f"{exact.ablation} ablation", "a circuit under corrupted ablation, as EAP is"
        )
    if exact is not None and metric is None:
        name = exact.metric
    graph = sliced.graph(split_qkv, "expanded" if expand_kv else "grouped") if exact is None else exact.graph
    size = count or (min(DEFAULT_COUNT, graph.num_edges) if exact is None else int(exact.present.sum()))
    if size > graph.num_edges:
        raise InvalidRequestError("--count", size, f"1 to {graph.num_edges:,}, the edges of this graph")
    pairs = prompts_of(loaded, task, num_prompts, seed, split)
    with progress() as report:
        found = attribute_edges(sliced, graph, pairs, name, steps, report=lambda share: report(share, "edges"))
    present = found.circuit(size)
    result = found.to_json(present)
    title = f"{pairs.name}, {found.cfg['method']}, approximate: {int(present.sum())} of {graph.num_edges:,} edges"
    console.print(_strongest(found, title))
    if exact is not None:
        result["agreement"] = _agreement(found, exact)
        console.print(_compared(result["agreement"]))
    save_circuit(Diagram.of(graph, present, np.abs(found.scores)), title, out.with_suffix(".svg"))
    write_beside_picture(result, out)


def _agreement(found: EdgeScores, exact: CircuitFile) -> dict[str, Any]:
    """Of signed scores and of their absolute values with the exact circuit.

    Raises:
        InvalidRequestError: the exact circuit has no edge, or all.
    """
    by_kind = {"score": found.scores, "|score|": np.abs(found.scores)}
    return {
        "circuit": exact.name,
        "circuit_sha256": exact.sha256,
        "num_edges": int(exact.present.sum()),
        "auroc": {kind: auroc(exact.graph, scores, exact.present) for kind, scores in by_kind.items()},
        "overlap": {kind: overlap(exact.graph, scores, exact.present) for kind, scores in by_kind.items()},
    }


def _strongest(found: EdgeScores, title: str) -> Table:
    graph, table = found.graph, Table("edge", "score", title=title)
    for receiver, source in sorted(graph.edges, key=lambda edge: -abs(found.scores[edge]))[:SHOWN]:
        table.add_row(graph.edge_name(receiver, source), f"{found.scores[receiver, source]:+.4g}")
    return table


def _compared(agreement: dict[str, Any]) -> Table:
    title = f"against the {agreement['num_edges']} edges of {agreement['circuit']}"
    table = Table("edges ranked by", "AUROC", "share among as many", title=title)
    for kind, value in agreement["auroc"].items():
        table.add_row(kind, f"{value:.3f}", f"{agreement['overlap'][kind]:.3f}")
    return table
