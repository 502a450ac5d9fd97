"""``steerserve lab train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steerserve.errors import AssetError
from steerserve.lab.commands.options import console, read_record, record
from steerserve.lab.store import ActivationStore
from steerserve.lab.training.checkpoint import CHECKPOINT, require_same_settings
from steerserve.lab.training.metrics import Metrics
from steerserve.lab.training.run import RunOptions, run, run_settings
from steerserve.lab.training.settings import train_config
from steerserve.sae.formats.saelens import WEIGHTS
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
    """Train an SAE or a transcoder, or go on with an interrupted run in OUT, and save it in SAELens format.

    A run that is finished already is left as it is.
    """
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
    recorded = {**run_settings(store, config), "harvested_tokens": store.manifest.num_tokens}
    if _is_finished(out, recorded):
        console.print(f"{out} holds this SAE already, trained with the same settings: nothing to do")
        return
    with run_progress() as progress:
        task = progress.add_task("train", total=config.steps)
        run(
            store,
            config,
            out,
            RunOptions(checkpoint_every, log_every, tensorboard),
            lambda metrics: progress.update(task, completed=metrics.step, description=describe(metrics)),
        )
    record(out, "training", recorded)


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds the SAE of ``settings``; what was measured of it would not be true of another one.

    Raises:
        AssetError: it holds another SAE, or one that does not say how it was trained.
    """
    found = read_record(out)
    if not (out / WEIGHTS).exists() or (out / CHECKPOINT).exists():
        return False
    if "training" not in found:
        raise AssetError(f"{out} holds an SAE without a record of its training; choose another directory")
    require_same_settings(out, found["training"], settings)
    return True


def run_progress() -> Progress:
    """A bar of steps, with the time that is left."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def describe(metrics: Metrics) -> str:
    """One line of what a run is at."""
    return (
        f"FVU {metrics.fvu:.3f}  L0 {metrics.l0:.1f}  dead {metrics.dead_share:.1%}  "
        f"{metrics.rows_per_second:,.0f} rows/s"
    )
