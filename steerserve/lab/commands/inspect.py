"""``steerserve lab inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from steerserve.lab.commands.options import ModelOption, console, require_writable, sae_for
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model

if TYPE_CHECKING:
    from steerserve.lab.inspection import Inspection, Replacement, SAEReading


def inspect_command(
    prompt: Annotated[str, typer.Argument(help="Text to look at.")],
    sae: Annotated[list[Path], typer.Option(help="SAE directory; repeatable.")],
    replace: Annotated[bool, typer.Option("--replace", help="Also run with the SAE's output for the layer's.")] = False,
    features: Annotated[
        list[Path] | None, typer.Option(help="features.json of `lab features`, for largest activations; repeatable.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Features shown for each token.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Show which features fire on each token of PROMPT, and what replacing x by its reconstruction does."""
    from steerserve.lab.html import render
    from steerserve.lab.inspection import inspect_prompt, read_features

    if html is not None:
        require_writable("--html", html)
    known = read_features(features or [])
    loaded = load_model(resolve_model(model), torch.float32)
    saes = [sae_for(loaded, directory) for directory in sae]
    inspection = inspect_prompt(loaded, saes, prompt, replace=replace, num_features=top, known=known)
    if html is not None:
        html.write_text(render("inspect", inspection=inspection), encoding="utf-8")
    if as_json:
        console.print_json(data=inspection.to_dict())
        return
    for reading in inspection.readings:
        console.print(reading_table(inspection, reading))
    console.print(_prediction_table(inspection))


def reading_table(inspection: Inspection, reading: SAEReading) -> Table:
    """A row for each token."""
    table = Table(
        "token", "active", "error", "strongest features", title=f"{reading.sae} at {reading.site}", box=box.SIMPLE
    )
    for token, at in zip(inspection.tokens, reading.tokens, strict=True):
        words = Text("  ").join(
            Text.assemble((str(each.id), "bold"), f" {each.activation:.1f} ", (each.label, "cyan"))
            for each in at.features
        )
        error, none = ("–", "outside the SAE") if at.error is None else (f"{at.error:.2f}", "none")
        table.add_row(Text(repr(token)[1:-1]), str(at.num_active), error, words if at.features else Text(none, "dim"))
    return table


def _prediction_table(inspection: Inspection) -> Table:
    table = Table("token", "next token, clean", title="predictions", box=box.SIMPLE)
    for run in inspection.runs[1:]:
        table.add_column(f"with {' + '.join(run.saes)}")
        table.add_column("KL", justify="right")
    for at, token in enumerate(inspection.tokens):
        cells = [_likely(inspection.runs[0], at)]
        for run in inspection.runs[1:]:
            cells += [_likely(run, at), Text(f"{run.predictions[at].kl:.3f}")]
        table.add_row(Text(repr(token)[1:-1]), *cells)
    return table


def _likely(run: Replacement, at: int) -> Text:
    return Text(", ".join(f"{text!r} {probability:.2f}" for text, probability in run.predictions[at].top[:3]))
