"""``steerserve lab train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steerserve.lab.commands.options import record
from steerserve.lab.store import ActivationStore
from steerserve.lab.training.metrics import Metrics
from steerserve.lab.training.run import RunOptions, run, run_settings
from steerserve.lab.training.settings import train_config
from steerserve.types import Site

ActivationsOption = Annotated[Path, typer.Option(help="Directory written by `lab harvest`.")]
SiteOption = Annotated[str, typer.Option(help="Which of its sites.")]
SiteOutOption = Annotated[str | None, typer.Option(help="Train a transcoder from --site to this one.")]
CheckpointOption = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
TensorBoardOption = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events beside metrics.csv.")]


def train_command(
    activations: ActivationsOption,
    site: SiteOption,
    out: Annotated[Path, typer.Option(help="Directory for the SAE; its name becomes the SAE's.")],
    site_out: SiteOutOption = None,
    architecture: Annotated[
        str, typer.Option(help="batchtopk, topk, matryoshka, jumprelu, gated, relu or tied.")
    ] = "batchtopk",
    d_sae: Annotated[int | None, typer.Option(help="Number of features; 4608.")] = None,
    k: Annotated[int | None, typer.Option(help="Active features per token; batchtopk, topk, matryoshka; 48.")] = None,
    target_l0: Annotated[float | None, typer.Option(help="The same for jumprelu; 48.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Window in which activations move jumprelu's threshold; 1.")
    ] = None,
    l1: Annotated[float | None, typer.Option(help="Weight of the sparsity penalty; relu, tied, gated; 2.")] = None,
    skip: Annotated[bool | None, typer.Option("--skip", help="A transcoder with a linear skip connection.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; 6000.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step; 2048.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="0.0006.")] = None,
    seed: int = 0,
    checkpoint_every: CheckpointOption = 500,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.csv.")] = 50,
    tensorboard: TensorBoardOption = False,
) -> None:
    """Train an SAE or a transcoder, or go on with an interrupted run in OUT, and save it in SAELens format."""
    given = {
        "d_sae": d_sae,
        "k": k,
        "target_l0": target_l0,
        "bandwidth": bandwidth,
        "l1": l1,
        "skip": skip,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    config = train_config(architecture, {**settings, "seed": seed})
    out_site = Site.parse(site_out, "site-out") if site_out else None
    store = ActivationStore(activations, Site.parse(site), seed=seed, out_site=out_site)
    with run_progress() as progress:
        task = progress.add_task("train", total=config.steps)
        run(
            store,
            config,
            out,
            RunOptions(checkpoint_every, log_every, tensorboard),
            lambda metrics: progress.update(task, completed=metrics.step, description=describe(metrics)),
        )
    record(out, "training", {**run_settings(store, config), "harvested_tokens": store.manifest.num_tokens})


def run_progress() -> Progress:
    """A bar of steps, with the time that is left."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def describe(metrics: Metrics) -> str:
    """One line of what a run is at."""
    return (
        f"FVU {metrics.fvu:.3f}  L0 {metrics.l0:.1f}  dead {metrics.dead_share:.1%}  "
        f"{metrics.rows_per_second:,.0f} rows/s"
    )
