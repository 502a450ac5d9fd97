"""``steerserve analyse lens``."""

from __future__ import annotations

from pathlib import Path

import torch

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
from steerserve.circuits.lens import layer_labels, read_layers
from steerserve.circuits.plots import curves
from steerserve.circuits.prompts import Split
from steerserve.lab.commands.options import ModelOption
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model


def lens_command(
    task: TaskArgument,
    metric: MetricOption = None,
    num_prompts: NumPromptsOption = 200,
    seed: SeedOption = 0,
    split: SplitOption = Split.DISCOVERY,
    out: OutOption = Path("lens.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Read the answer off the residual stream after each layer, through the model's own unembedding."""
    require_out(out)
    name = metric_of(task, metric)
    loaded = load_model(resolve_model(model), torch.float32)
    lens = read_layers(loaded, prompts_of(loaded, task, num_prompts, seed, split), name)
    readings = lens.readings
    panels = {
        "probability": {
            "correct answers": [each.p_correct for each in readings],
            "wrong answers": [each.p_wrong for each in readings],
        },
        f"{name} (larger is worse)": {name: [each.value for each in readings]},
        "KL(model ‖ lens), nats": {"kl": [each.kl for each in readings]},
    }
    write(lens.to_dict(), curves(panels, layer_labels(loaded), f"logit lens: {lens.pairs}"), out)
