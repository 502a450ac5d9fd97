"""``steerserve analyse patch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from steerserve.circuits.commands.options import (
    MetricOption,
    NumPromptsOption,
    OutOption,
    SeedOption,
    SplitOption,
    TaskArgument,
    metric_of,
    prompts_of,
    require_out,
    write,
)
from steerserve.circuits.forward import all_last_logits
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.patching import Direction, Part, patch
from steerserve.circuits.plots import heat_map
from steerserve.circuits.prompts import Split
from steerserve.lab.commands.options import ModelOption
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model

EFFECT = {Direction.DENOISING: "recovery", Direction.NOISING: "damage"}


def patch_command(
    task: TaskArgument,
    part: Annotated[Part, typer.Option(help="What is patched in each layer.")] = Part.HEADS,
    direction: Annotated[
        Direction, typer.Option(help="Clean activations into the corrupted run, or the reverse.")
    ] = Direction.DENOISING,
    metric: MetricOption = None,
    num_prompts: NumPromptsOption = 32,
    seed: SeedOption = 0,
    split: SplitOption = Split.DISCOVERY,
    out: OutOption = Path("patching.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Patch one activation at a time from the other prompt of a pair, and see how much of the behaviour follows."""
    require_out(out)
    name = metric_of(task, metric)
    loaded = load_model(resolve_model(model), torch.float32)
    pairs = prompts_of(loaded, task, num_prompts, seed, split)
    measure = METRICS[name](pairs, all_last_logits(loaded, pairs.clean, pairs.last))
    result = patch(loaded, pairs, measure, part, direction)
    title = f"{EFFECT[direction]} of {name}\n{pairs.name}, {part}, {direction}"
    xlabel = "head" if part is Part.HEADS else "positions"
    write(result.to_dict(), heat_map(result.effect, result.columns, title, xlabel), out)
