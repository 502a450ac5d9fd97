"""``steerserve analyse faithfulness``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from steerserve.circuits.ablation import Baseline
from steerserve.circuits.answers import MODEL, Answers, answers_of, logits_of
from steerserve.circuits.circuit_file import CircuitFile
from steerserve.circuits.commands.options import (
    OutOption,
    SeedOption,
    SplitOption,
    TaskArgument,
    metric_of,
    prompts_of,
    require_out,
    write,
)
from steerserve.circuits.commands.progress import progress
from steerserve.circuits.faithfulness import Faithfulness, Incompleteness, completeness, curve, faithfulness
from steerserve.circuits.faithfulness_picture import draw_faithfulness
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.prompts import PromptPairs, Split
from steerserve.circuits.slicing import slice_model
from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelOption, console
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model

CIRCUIT, WITHOUT, NOTHING = "circuit", "knock_out", "nothing"
LABELS = {MODEL: "whole model", CIRCUIT: "circuit alone", WITHOUT: "without it", NOTHING: "every edge ablated"}
TOP_TOKENS = 5


def faithfulness_command(
    circuit: Annotated[Path, typer.Argument(metavar="CIRCUIT", help="Of `discover` or `analyse edges`.")],
    task: TaskArgument,
    prompts: Annotated[int, typer.Option(min=1, help="Pairs on which answers are counted; of a file, at most.")] = 200,
    checks: Annotated[
        int, typer.Option(min=1, help="The first of them, for what takes long: all that runs nearly the whole graph.")
    ] = 16,
    controls: Annotated[int, typer.Option(min=0, help="Random circuits of its size, of either kind.")] = 5,
    parts: Annotated[int, typer.Option(min=1, help="Random parts K, for completeness.")] = 5,
    show: Annotated[int, typer.Option(min=0, help="Prompts to print the likeliest next tokens of.")] = 0,
    metric: Annotated[str | None, typer.Option(help=f"{', '.join(METRICS)}. If none: the circuit's own.")] = None,
    seed: SeedOption = 0,
    split: SplitOption = Split.HELD_OUT,
    out: OutOption = Path("faithfulness.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Measure how much of a behaviour a circuit carries, and what is left of it without the circuit.

    What a removed edge carries is what it carried when the circuit was found.
    """
    require_out(out)
    metric_of(task, metric)
    loaded = load_model(resolve_model(model), torch.float32)
    sliced = slice_model(loaded)
    found = CircuitFile.read(circuit, sliced)
    if not found.present.any():
        raise InvalidRequestError("CIRCUIT", str(circuit), "a circuit with at least one edge")
    pairs = prompts_of(loaded, task, prompts, seed, split)
    few = pairs.take(range(min(checks, len(pairs))))
    name, graph, ablation = metric or found.metric, found.graph, found.ablation
    without = graph.full & ~found.present
    with progress() as report:
        many = {CIRCUIT: found.present, NOTHING: graph.empty()}
        logits = logits_of(sliced, graph, pairs, ablation, many, lambda share: report(0.4 * share, "answers"))
        logits[WITHOUT] = logits_of(sliced, graph, few, ablation, {WITHOUT: without})[WITHOUT]
        report(0.5, "controls")
        baseline = Baseline(sliced, few, ablation)
        judge = METRICS[name](few, baseline.clean_logits)
        measured = faithfulness(graph, baseline, judge, found.present, controls, seed)
        report(0.6, "completeness")
        left = completeness(graph, baseline, judge, found.present, parts, seed)
        report(0.8, "faithfulness by size")
        by_size = curve(graph, baseline, judge, found.scores)
        report(1.0, "")
    answers = {each: answers_of(few if each == WITHOUT else pairs, of) for each, of in logits.items()}
    result: dict[str, Any] = {
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "circuit": found.name,
        "circuit_sha256": found.sha256,
        "num_edges": int(found.present.sum()),
        "task": pairs.name,
        "split": split.value,
        "seed": seed,
        "ablation": ablation.value,
        "metric": name,
        "answers": {each: asdict(of) for each, of in answers.items()},
        "num_checks": len(few),
        "metrics": {**asdict(measured), "faithfulness": measured.faithfulness},
        "completeness": [{**asdict(part), "gap": part.gap} for part in left],
        "curve": asdict(by_size),
    }
    title = f"{found.name}, {result['num_edges']} edges, on {pairs.name}, {split} prompts"
    console.print(_of_answers(answers, title))
    console.print(
        _of_metrics(measured, left, f"{name} on {len(few)} prompts; CPR {by_size.cpr:.3f}, CMD {by_size.cmd:.3f}")
    )
    if show:
        console.print(_next_tokens(loaded, few, logits, min(show, len(few))))
    write(result, draw_faithfulness(measured, left, by_size, name, title), out)


def _of_answers(answers: Mapping[str, Answers], title: str) -> Table:
    columns = ("prompts", "correct above wrong", "correct above all", "logit(correct) − logit(wrong)")
    table = Table("", *columns, title=title)
    for each, label in LABELS.items():
        of = answers[each]
        margin = f"{of.margin:.2f}" + (f" ± {of.margin_error:.2f}" if of.margin_error is not None else "")
        table.add_row(label, str(of.num_prompts), f"{of.accuracy:.1%}", f"{of.first:.1%}", margin)
    return table


def _of_metrics(measured: Faithfulness, parts: list[Incompleteness], title: str) -> Table:
    table = Table("", "", title=title, show_header=False)
    rows = {
        "whole model": f"{measured.model:.4g}",
        "circuit alone": f"{measured.circuit:.4g}, faithfulness {measured.faithfulness:.2f}",
        "without it": f"{measured.knock_out:.4g}",
        "every edge ablated": f"{measured.nothing:.4g}",
        "random connected circuits": ", ".join(f"{value:.4g}" for value in measured.random_connected),
        "random edges": ", ".join(f"{value:.4g}" for value in measured.random),
        "circuit and model, both without K": "; ".join(
            f"{part.circuit:.3g} and {part.model:.3g} ({part.num_edges} edges)" for part in parts
        ),
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _next_tokens(model: LoadedModel, pairs: PromptPairs, logits: Mapping[str, Tensor], count: int) -> Table:
    """The likeliest next tokens behind each prompt, with their probabilities."""
    shown = (MODEL, CIRCUIT, WITHOUT)
    table = Table("prompt", *(LABELS[each] for each in shown), title="next token", show_lines=True)
    for row in range(count):
        cells = []
        for each in shown:
            p, ids = logits[each][row].softmax(-1).topk(TOP_TOKENS)
            words = model.tokenizer.batch_decode(ids[:, None])
            cells.append("\n".join(f"{word!r} {share:.3f}" for word, share in zip(words, p.tolist(), strict=True)))
        prompt = str(model.tokenizer.decode(pairs.clean[row, : pairs.last[row] + 1]))
        table.add_row(prompt, *cells)
    return table
