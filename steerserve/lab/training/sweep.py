"""A grid of runs, a directory each, and what they came to.

::

    batchtopk-k16-seed0/     a run; figures.json in it says that it is finished
    summary.csv, pareto.svg  all finished runs of the directory, also those of an earlier sweep
"""

from __future__ import annotations

import csv
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.store import ActivationStore
from steerserve.lab.training.checkpoint import require_same_settings
from steerserve.lab.training.held_out import HeldOutFigures, held_out_figures
from steerserve.lab.training.metrics import Metrics
from steerserve.lab.training.run import RunOptions, run, run_settings
from steerserve.lab.training.settings import CONFIGS, TrainConfig, train_config
from steerserve.sae.model import SAE

FIGURES = "figures.json"

Grid = Mapping[str, Sequence[str]]
"""Values by name of a setting."""


@dataclass(frozen=True)
class FinishedRun:
    """``figures.json`` of a run.

    Attributes:
        settings: as ``run_settings`` gives them.
    """

    name: str
    settings: dict[str, Any]
    figures: HeldOutFigures


def parse_grid(axes: Sequence[str]) -> dict[str, list[str]]:
    """``["k=16,32", "architecture=batchtopk"]`` as values by name.

    Raises:
        InvalidRequestError: an axis is of another form, or a name comes twice.
    """
    grid: dict[str, list[str]] = {}
    for axis in axes:
        name, _, values = axis.partition("=")
        split = [value.strip() for value in values.split(",")]
        if not name or not all(split) or len(set(split)) < len(split) or name in grid:
            raise InvalidRequestError("grid", axis, "NAME=VALUE[,VALUE]..., each name and value once")
        grid[name.replace("-", "_")] = split
    return grid


def grid_configs(grid: Grid) -> dict[str, TrainConfig]:
    """The configuration of every point of the grid, by a name that its varying settings make.

    ``k`` means ``target_l0`` to an objective that has that instead, so that architectures compare at equal L0.

    Raises:
        InvalidRequestError: as ``train_config``, or two points are the same.
    """
    configs: dict[str, TrainConfig] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        architecture = point.pop("architecture", next(iter(CONFIGS)))
        name = "-".join([architecture, *(f"{key}{value}" for key, value in point.items())])
        fields = CONFIGS[architecture].model_fields if architecture in CONFIGS else {}
        if "target_l0" in fields and "k" in point:
            point.setdefault("target_l0", point.pop("k"))
        config = train_config(architecture, point)
        if config in configs.values():
            raise InvalidRequestError("grid", name, "points that differ; another one has the same settings")
        configs[name] = config
    return configs


def sweep(
    make_store: Callable[[int], ActivationStore],
    configs: Mapping[str, TrainConfig],
    directory: Path,
    options: RunOptions,
    report: Callable[[str, Metrics | None], None] = lambda name, metrics: None,
) -> list[FinishedRun]:
    """Make the runs that are not finished, and summarise all of ``directory``.

    Args:
        make_store: the store with held-out rows, for a seed.
        report: called with each run's name as it goes on, without metrics when it is finished.

    Raises:
        AssetError: as ``run``; a finished run of the same name had other settings.
    """
    for name, config in configs.items():
        store = make_store(config.seed)
        settings = run_settings(store, config)
        if (finished := load_run(directory / name)) is None:
            sae = run(store, config, directory / name, options, partial(report, name))
            _save_run(directory / name, sae, store, settings)
        else:
            require_same_settings(directory / name / FIGURES, finished.settings, settings)
        report(name, None)
    return summarise(directory)


def summarise(directory: Path) -> list[FinishedRun]:
    """Write ``summary.csv`` and ``pareto.svg`` of all finished runs, which are returned in the order of their names."""
    runs = [run for path in sorted(directory.iterdir()) if (run := load_run(path)) is not None]
    names = sorted({name for run in runs for name in run.settings})
    with (directory / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", *HeldOutFigures.__dataclass_fields__, *names])
        writer.writeheader()
        writer.writerows({"name": run.name, **asdict(run.figures), **run.settings} for run in runs)
    _plot(runs, directory / "pareto.svg")
    return runs


def load_run(directory: Path) -> FinishedRun | None:
    """The finished run in ``directory``, or None."""
    path = directory / FIGURES
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        return FinishedRun(directory.name, record["settings"], HeldOutFigures(**record["figures"]))
    except (ValueError, TypeError, KeyError) as error:
        raise AssetError(f"{path} is damaged: {error!r}; remove it to have the run made again") from error


def _save_run(directory: Path, sae: SAE, store: ActivationStore, settings: dict[str, Any]) -> None:
    figures = held_out_figures(sae, store.held_out())
    partial = directory / (FIGURES + ".partial")
    partial.write_text(json.dumps({"figures": asdict(figures), "settings": settings}, indent=1) + "\n")
    partial.replace(directory / FIGURES)


def _plot(runs: Sequence[FinishedRun], path: Path) -> None:
    from matplotlib.figure import Figure

    by_architecture: dict[str, list[HeldOutFigures]] = defaultdict(list)
    for finished in runs:
        by_architecture[finished.settings["architecture"]].append(finished.figures)
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    for architecture, figures in by_architecture.items():
        axes.plot([f.l0 for f in figures], [f.fvu for f in figures], "o", label=architecture)
    axes.set(xlabel="L0", ylabel="fraction of variance unexplained", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
