"""``steerserve analyse features``."""

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
from steerserve.circuits.feature_attribution import attribute_features
from steerserve.circuits.plots import bars
from steerserve.circuits.prompts import Split
from steerserve.lab.commands.options import ModelOption, sae_for
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model


def features_command(
    task: TaskArgument,
    sae: Annotated[Path, typer.Option(help="SAE directory.")],
    count: Annotated[int, typer.Option(min=1, help="Features in the list.")] = 50,
    metric: MetricOption = None,
    num_prompts: NumPromptsOption = 200,
    seed: SeedOption = 0,
    split: SplitOption = Split.DISCOVERY,
    out: OutOption = Path("features.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """List the SAE features that a behaviour rests on, to first order: candidates for clamping."""
    require_out(out)
    name = metric_of(task, metric)
    loaded = load_model(resolve_model(model), torch.float32)
    trained = sae_for(loaded, sae)
    found = attribute_features(loaded, trained, prompts_of(loaded, task, num_prompts, seed, split), name, count)
    shown = found.features[:25]
    effects = {"removed": [each.removed for each in shown], "swapped": [each.swapped for each in shown]}
    title = f"rise of {name} by feature: {found.pairs}, {found.sae}"
    write(found.to_dict(), bars(effects, [str(each.id) for each in shown], title), out)
