"""A progress bar for work whose share that is done is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from steerserve.lab.commands.options import console

Report = Callable[[float, str], None]
"""Takes the share that is done, from 0 to 1, and what is being done."""


@contextmanager
def progress() -> Iterator[Report]:
    """What is being done, the share that is done, and the time that is left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=1.0)
        yield lambda share, what: bars.update(bar, completed=share, description=what)
