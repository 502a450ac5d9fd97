"""What several commands share: options, the prompts they name, and writing a result."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerserve.circuits.metrics import METRICS
from steerserve.circuits.prompts import PromptPairs, Split, read_pairs
from steerserve.circuits.tasks.registry import TASKS
from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.lab.commands.options import console, require_writable
from steerserve.models.loading import LoadedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC_OF_FILES = "log_odds"

TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help=f"{', '.join(TASKS)}, or a .jsonl file of prompt pairs.")
]
OptionalTaskArgument = Annotated[
    str | None, typer.Argument(metavar="[TASK]", help=f"{', '.join(TASKS)}, or a .jsonl file of prompt pairs.")
]
NumPromptsOption = Annotated[int, typer.Option(min=1, help="Prompt pairs; of a file, at most.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the prompts of a built-in task.")]
SplitOption = Annotated[Split, typer.Option(help="Part of the task's prompts, or of the file's.")]
MetricOption = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(METRICS)}. If none: the task's own, of a file {METRIC_OF_FILES}."),
]
OutOption = Annotated[Path, typer.Option(help="The result, as JSON; a picture goes into a .svg beside it.")]


def prompts_of(model: LoadedModel, task: str, num_prompts: int, seed: int, split: Split) -> PromptPairs:
    """The pairs of a built-in task, or of a file.

    Raises:
        InvalidRequestError: neither, or what the file holds is no pair.
        IncompatibleError: the prompts are longer than the model's context.
    """
    if task in TASKS:
        pairs = TASKS[task].generate(model.tokenizer, num_prompts, seed, split)
    elif task.endswith(".jsonl"):
        pairs = read_pairs(Path(task), model.tokenizer, split)
        pairs = pairs.take(range(min(num_prompts, len(pairs))))
    else:
        raise InvalidRequestError("TASK", task, f"one of {', '.join(TASKS)}, or a .jsonl file")
    if pairs.clean.shape[1] > model.max_context:
        expected = f"prompts of at most {model.max_context} tokens, the context of {model.name}"
        raise IncompatibleError(f"TASK {task}", f"{pairs.clean.shape[1]} tokens", expected)
    return pairs


def metric_of(task: str, metric: str | None) -> str:
    """A key of ``METRICS``: the one asked for, or the one by which the task is usually measured.

    Raises:
        InvalidRequestError: there is no such metric.
    """
    name = metric or (TASKS[task].metric if task in TASKS else METRIC_OF_FILES)
    if name not in METRICS:
        raise InvalidRequestError("--metric", name, f"one of {', '.join(METRICS)}")
    return name


def require_out(out: Path) -> None:
    """Raise InvalidRequestError, before the work, if result or picture could not be written."""
    if out.suffix != ".json":
        raise InvalidRequestError("--out", str(out), "a name that ends in .json")
    for path in (out, out.with_suffix(".svg")):
        require_writable("--out", path)


def write(result: dict[str, Any], figure: Figure, out: Path) -> None:
    """The result with the command that made it, and its picture."""
    from steerserve.circuits.plots import save

    save(figure, out.with_suffix(".svg"))
    write_beside_picture(result, out)


def write_beside_picture(result: dict[str, Any], out: Path) -> None:
    """The result with the command that made it, where its picture has been saved."""
    content = {**result, "command": shlex.join(["steerserve", *sys.argv[1:]])}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"{out}, {out.with_suffix('.svg')}")
