"""ACDC against one full pass of the model per edge, on SmolLM2 and IOI prompts, in float32.

fast    ``steerserve.circuits.acdc.discover``, one complete search
naive   every node of every layer at every position, for each edge that the search tested. The receivers' inputs of a
        layer are one matrix product of the circuit with the sources' outputs, and its heads run as one batch: a full
        pass that is not made slow on purpose. ``--replay`` decisions of the search, in runs of consecutive ones spread
        over it, are taken again; the time of all is extrapolated from these.

The search skips edges into nodes without a path to the logits; the naive one is charged for the tested edges only.

    python bench/bench_acdc.py [--prompts N] [--threshold T] [--kv grouped|expanded] [--split] [--quick] [--write]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass

import torch
from measure import Report, columns
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from steerserve.circuits.ablation import Ablation, Baseline, record
from steerserve.circuits.acdc import discover
from steerserve.circuits.discovery import Decision, Discovery
from steerserve.circuits.graph import Graph, Present
from steerserve.circuits.metrics import Metric, kl
from steerserve.circuits.prompts import PromptPairs, Split
from steerserve.circuits.settings import ACDCConfig
from steerserve.circuits.sliced import Positions, SlicedModel
from steerserve.circuits.slicing import slice_model
from steerserve.circuits.tasks.registry import TASKS
from steerserve.models.loading import load_model
from steerserve.models.pull import pull

RUN_LENGTH = 50
"""Consecutive decisions that are taken again; a run needs one pass more than it has decisions."""


class NaiveModel:
    """Full passes of circuits, for models without norms behind attention and biases in it (Llama)."""

    def __init__(self, model: SlicedModel, graph: Graph, pairs: PromptPairs) -> None:
        self.model, self.graph, self.last = model, graph, pairs.last
        self.positions = Positions(torch.arange(pairs.clean.shape[1])[None], pairs.clean.shape[1])
        self.corrupted = record(model, pairs.corrupted)
        self.embedding = record(model, pairs.clean).outputs[0]
        self.attention_receivers = [
            [i for i, receiver in enumerate(graph.receivers) if receiver.layer == layer and receiver.parts]
            for layer in range(graph.n_layers)
        ]

    def logits(self, present: Present) -> Tensor:
        """``[1, N, V]``."""
        model, graph = self.model, self.graph
        mask = torch.from_numpy(present).to(model.dtype)
        deltas = self.embedding.new_empty(len(graph.sources), self.embedding.numel())
        deltas[0] = (self.embedding - self.corrupted.outputs[0]).flatten()

        def read(receivers: list[int], base: Tensor) -> Tensor:
            count = graph.receivers[receivers[0]].num_parents
            return (mask[receivers, :count] @ deltas[:count]).view(-1, *base.shape[1:]) + base

        for i, layer in enumerate(model.layers):
            x = layer.attn_norm(read(self.attention_receivers[i], self.corrupted.residuals[2 * i]))
            heads = graph.head(i, 0)
            z = self._heads(i, x) - torch.cat(self.corrupted.outputs[heads : heads + model.n_heads])
            deltas[heads : heads + model.n_heads] = torch.einsum("hnpe,hed->hnpd", z, layer.W_O).flatten(1)
            mlp = layer.mlp(read([self.attention_receivers[i][-1] + 1], self.corrupted.residuals[2 * i + 1]))
            deltas[graph.mlp(i)] = (mlp - self.corrupted.outputs[graph.mlp(i)]).flatten()
        final = read([len(graph.receivers) - 1], self.corrupted.residuals[-1])
        return model.logits(final[:, torch.arange(len(self.last)), self.last])

    def _heads(self, index: int, x: Tensor) -> Tensor:
        """``[heads, N, P, d_head]`` from the receivers' inputs after the norm."""
        layer, receivers = self.model.layers[index], self.attention_receivers[index]
        row = {(head, part): row for row, i in enumerate(receivers) for head in self.graph.receivers[i].feeds
               for part in self.graph.receivers[i].parts}  # fmt: skip
        q, k, v = ([], [], [])
        for head in range(self.model.n_heads):
            source, shared = self.graph.head(index, head), head // self.model.group_size
            q.append(row[source, ("q", head)])
            k.append(row[source, ("k", shared)])
            v.append(row[source, ("v", shared)])
        shared = torch.arange(self.model.n_heads) // self.model.group_size
        queries = torch.einsum("hnpd,hde->hnpe", x[q], layer.q.W)
        keys = torch.einsum("hnpd,hde->hnpe", x[k], layer.k.W[shared])
        values = torch.einsum("hnpd,hde->hnpe", x[v], layer.v.W[shared])
        queries, keys = (self.positions.rotate(layer.rope, each) for each in (queries, keys))
        return layer.attend(queries, keys, values, self.positions)


@dataclass
class Replay:
    """Decisions taken again by full passes."""

    seconds: list[float]
    differences: list[float]
    flipped: list[Decision]


@torch.no_grad()
def replay(naive: NaiveModel, metric: Metric, found: Discovery, num_decisions: int) -> Replay:
    tested = [i for i, decision in enumerate(found.decisions) if decision.test is not None]
    length = min(RUN_LENGTH, num_decisions)
    starts = random.Random(0).sample(range(0, max(1, len(tested) - length), length), num_decisions // length)
    result = Replay([], [], [])
    with Progress(console=Console(stderr=True)) as progress:
        for start in progress.track(sorted(starts), description="replay"):
            replay_run(naive, metric, found, tested[start : start + length], result)
    return result


def replay_run(naive: NaiveModel, metric: Metric, found: Discovery, run: list[int], result: Replay) -> None:
    present = found.graph.full.copy()
    for each in found.decisions[: run[0]]:
        present[each.receiver, each.source] = each.kept
    current = float(metric(naive.logits(present)))
    for i in range(run[0], run[-1] + 1):
        decision = found.decisions[i]
        present[decision.receiver, decision.source] = False
        if decision.test is None:
            continue
        begin = time.perf_counter()
        value = float(metric(naive.logits(present)))
        result.seconds.append(time.perf_counter() - begin)
        result.differences.append(abs(value - current - decision.effect))
        kept = value - current >= found.cfg["threshold"]
        if kept is not decision.kept:
            result.flipped.append(decision)
        present[decision.receiver, decision.source] = decision.kept
        current = value if not decision.kept else current


def search(graph: Graph, baseline: Baseline, metric: Metric, config: ACDCConfig) -> Discovery:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("fast", total=graph.num_edges)

        def report(found: Discovery) -> None:
            kept = sum(decision.kept for decision in found.decisions)
            progress.update(
                task, completed=len(found.decisions), description=f"fast: {found.counts.tested} tested, {kept} kept"
            )

        return discover(graph, baseline, metric, config, report=report)


def tables(report: Report, found: Discovery, again: Replay) -> None:
    counts = found.counts
    graph = f"{found.graph.num_edges:,} edges, {found.num_kept:,} kept, {counts.tested:,} tested, KL {found.value:.3f}"
    speed = columns(f"τ {found.cfg['threshold']}, N {found.cfg['num_prompts']}: {graph}", "", "seq × layers", "seconds")
    naive_seconds = statistics.median(again.seconds) * counts.tested
    speed.add_row("fast", f"{counts.sequence_layers:,.0f}", f"{counts.seconds:,.1f}")
    speed.add_row("fast, any touched layer in full", f"{counts.sequence_layers_touched:,}", "")
    extrapolated = f"{naive_seconds:,.0f} (extrapolated from {len(again.seconds):,} edges)"
    speed.add_row("naive", f"{counts.sequence_layers_naive:,}", extrapolated)
    speed.add_row("naive, untested edges too", f"{counts.sequence_layers_every_edge:,}", "")
    fewer = counts.sequence_layers_naive / max(counts.sequence_layers, 1e-9)
    speed.add_row("naive ÷ fast", f"{fewer:.1f}", f"{naive_seconds / counts.seconds:.1f}")
    same = columns(
        "Decisions taken again by full passes", "taken", "other outcome", "largest |Δ − Δ naive|", "re-tests"
    )
    same.add_row(
        f"{len(again.seconds):,}",
        str(len(again.flipped)),
        f"{max(again.differences):.1e} (noise {counts.noise:.1e})",
        f"{counts.retested} of {counts.tested:,}; {counts.void:,} of {counts.rows:,} rows void",
    )
    report.print(speed, same)
    for each in again.flipped:
        report.print(f"{found.graph.edge_name(each.receiver, each.source)}: effect {each.effect:.9f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.02)
    parser.add_argument("--kv", choices=["grouped", "expanded"], default="expanded")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--replay", type=int, default=1000)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="2 prompts, τ 0.5: whether it runs, no figures")
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.threshold, options.replay = 2, 0.5, 20
    loaded = load_model(str(pull(options.model)), torch.float32)
    pairs = TASKS["ioi"].generate(loaded.tokenizer, options.prompts, 0, Split.DISCOVERY)
    model = slice_model(loaded)
    graph = model.graph(options.split, options.kv)
    baseline = Baseline(model, pairs, Ablation.CORRUPTED)
    metric = kl(baseline.clean_logits)
    found = search(graph, baseline, metric, ACDCConfig(options.threshold, max_rows=options.max_rows))
    again = replay(NaiveModel(model, graph, pairs), metric, found, options.replay)
    report = Report()
    tables(report, found, again)
    if options.write:
        report.save()


if __name__ == "__main__":
    main()
