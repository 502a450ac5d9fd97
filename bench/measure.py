"""How the benches measure on a machine that does other things too, and how they report it.

What is compared takes turns, in an order drawn anew each round, so that whatever else the machine does falls on all
alike. A ratio is taken within a round, between neighbours in time; reported are the median over rounds and its 95 %
bootstrap interval.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from steerserve.kernels.native import C
from steerserve.lab.bootstrap import Interval, bootstrap

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"


def take_turns(name: str, arms: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """What each arm returned in each round, called with its number; round 0, which warms up, does not count."""
    values: dict[str, list[T]] = {arm: [] for arm in arms}
    order = random.Random(0)
    for number in track(range(rounds + 1), name, console=Console(stderr=True)):
        for arm in order.sample(list(arms), len(arms)):
            value = arms[arm](number)
            if number > 0:
                values[arm].append(value)
    return values


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median over rounds of one arm's value over another's."""
    ratios = np.array(numerator) / np.array(denominator)
    return bootstrap(np.arange(len(ratios)), lambda chosen: float(np.median(ratios[chosen])))


def interval(estimate: Interval) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f} – {estimate.high:.3f}]"


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} [{min(values):{form}} – {max(values):{form}}]"


def percentiles(seconds: Iterable[float]) -> str:
    """Median and 99th percentile, in milliseconds."""
    p50, p99 = 1e3 * np.percentile(list(seconds), (50, 99))
    return f"{p50:.0f} / {p99:.0f}"


def columns(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [text for text in cpuinfo.read_text().splitlines() if text.startswith("model name")] if cpuinfo.exists() else []
    )
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{cpu}, {C.simd_level()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class Report:
    """Prints as results come in; ``save`` keeps what was printed beside the other benches' results."""

    def __init__(self, width: int = 130) -> None:
        self._console = Console(width=width, record=True)
        self.print(machine())

    def print(self, *items: str | Table) -> None:
        self._console.print(*items, highlight=False)

    def save(self) -> None:
        script = Path(sys.argv[0])
        arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
        command = " ".join(["python", os.path.relpath(script), *arguments])
        RESULTS.joinpath(script.stem).with_suffix(".txt").write_text(f"{command}\n\n{self._console.export_text()}")
