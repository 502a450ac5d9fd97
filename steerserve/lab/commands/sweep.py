"""``steerserve lab sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import console
from steerserve.lab.commands.train import (
    ActivationsOption,
    CheckpointOption,
    SiteOption,
    SiteOutOption,
    TensorBoardOption,
    describe,
    run_progress,
)
from steerserve.lab.store import ActivationStore
from steerserve.lab.training.metrics import Metrics
from steerserve.lab.training.run import RunOptions
from steerserve.lab.training.sweep import FinishedRun, grid_configs, parse_grid, sweep
from steerserve.types import Site


def sweep_command(
    activations: ActivationsOption,
    site: SiteOption,
    grid: Annotated[
        list[str], typer.Option(help="NAME=VALUE\\[,VALUE]... of a training setting, e.g. k=16,32; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the runs, one in each directory below it.")],
    site_out: SiteOutOption = None,
    seeds: Annotated[str, typer.Option(help="Seeds, as in 0,1,2; each point of the grid is trained with each.")] = "0",
    held_out_rows: Annotated[
        int, typer.Option(min=2, help="Rows at the end of the harvest that are only measured on.")
    ] = 50_000,
    checkpoint_every: CheckpointOption = 500,
    tensorboard: TensorBoardOption = False,
) -> None:
    """Train every point of a grid of settings and compare L0 and FVU; finished runs are not made again."""
    for axis in grid:
        if axis.partition("=")[0].strip() == "seed":
            raise InvalidRequestError("--grid", axis, "another setting: use --seeds")
    sites = Site.parse(site), Site.parse(site_out, "site-out") if site_out else None
    configs = grid_configs(parse_grid([*grid, f"seed={seeds}"]))

    def make_store(seed: int) -> ActivationStore:
        return ActivationStore(activations, sites[0], seed=seed, out_site=sites[1], held_out_rows=held_out_rows)

    with run_progress() as progress:
        tasks = {name: progress.add_task(name, total=config.steps) for name, config in configs.items()}

        def report(name: str, metrics: Metrics | None) -> None:
            done = configs[name].steps if metrics is None else metrics.step
            text = name if metrics is None else f"{name}  {describe(metrics)}"
            progress.update(tasks[name], completed=done, description=text)

        runs = sweep(make_store, configs, out, RunOptions(checkpoint_every, tensorboard=tensorboard), report)
    console.print(_table(runs))


def _table(runs: list[FinishedRun]) -> Table:
    table = Table("run")
    for heading in ("L0", "FVU", "dead", "rows"):
        table.add_column(heading, justify="right")
    for run in runs:
        figures = run.figures
        table.add_row(
            run.name, f"{figures.l0:.1f}", f"{figures.fvu:.4f}", f"{figures.dead_share:.1%}", f"{figures.num_rows:,}"
        )
    return table
