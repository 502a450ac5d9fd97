"""What a run measures on its way: ``metrics.csv``, TensorBoard events, and a picture of both in the end."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from steerserve.lab.training.trainer import TrainStats

if TYPE_CHECKING:
    from types import TracebackType

METRICS = "metrics.csv"
CURVES = "training.svg"


@dataclass(frozen=True)
class Metrics(TrainStats):
    """A line of ``metrics.csv``.

    Attributes:
        rows_per_second: since the line before, waiting for the disk included.
    """

    rows_per_second: float


class MetricsLog:
    """Open files of a run; lines beyond ``num_steps``, which a resumed run will measure again, are taken out.

    Args:
        directory: of the run.
        tensorboard: whether events are written into it too.
    """

    def __init__(self, directory: Path, num_steps: int, tensorboard: bool) -> None:
        kept = [line for line in read_metrics(directory) if line.step <= num_steps]
        self._stack = ExitStack()
        self._file = self._stack.enter_context((directory / METRICS).open("w", newline=""))
        self._writer = csv.DictWriter(self._file, [field.name for field in fields(Metrics)])
        self._writer.writeheader()
        self._writer.writerows(asdict(line) for line in kept)
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory), purge_step=num_steps + 1)
            self._stack.callback(self._events.close)

    def write(self, metrics: Metrics) -> None:
        """Add a line; it is on disk when this returns."""
        line = asdict(metrics)
        self._writer.writerow(line)
        self._file.flush()
        if self._events is not None:
            step = line.pop("step")
            for name, value in line.items():
                self._events.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def read_metrics(directory: Path) -> list[Metrics]:
    """The lines of ``metrics.csv``; none if there is no such file."""
    path = directory / METRICS
    if not path.exists():
        return []
    with path.open(newline="") as file:
        whole = (line for line in file if line.endswith("\n"))  # the last one of a killed run may be cut off
        return [
            Metrics(step=int(line.pop("step")), **{name: float(value) for name, value in line.items()})
            for line in csv.DictReader(whole)
        ]


def plot_metrics(directory: Path) -> None:
    """Draw ``metrics.csv`` as ``training.svg``."""
    from matplotlib.figure import Figure

    metrics = read_metrics(directory)
    steps = [line.step for line in metrics]
    figure = Figure(figsize=(11, 6))
    names = ("loss", "fvu", "l0", "dead_share", "threshold", "learning_rate")
    for axes, name in zip(figure.subplots(2, 3, gridspec_kw={"hspace": 0.35}).flat, names, strict=True):
        axes.plot(steps, [getattr(line, name) for line in metrics])
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.supxlabel("step")
    figure.savefig(directory / CURVES, metadata={"Date": None})
