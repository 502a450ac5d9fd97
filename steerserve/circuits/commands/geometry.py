"""``steerserve analyse geometry``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from steerserve.circuits.commands.options import (
    NumPromptsOption,
    OptionalTaskArgument,
    OutOption,
    SeedOption,
    SplitOption,
    prompts_of,
    require_out,
    write,
)
from steerserve.circuits.geometry import LayerGeometry, describe_layers
from steerserve.circuits.lens import layer_labels
from steerserve.circuits.plots import curves
from steerserve.circuits.prompts import Split
from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelOption
from steerserve.lab.corpus import Split as TextSplit
from steerserve.lab.corpus import read_documents
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model


def geometry_command(
    task: OptionalTaskArgument = None,
    texts: Annotated[
        Path | None, typer.Option(help="Instead of a task: .jsonl[.gz] with a 'text' field, or .txt.")
    ] = None,
    num_texts: Annotated[int, typer.Option(min=1, help="Most texts.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each text.")] = 64,
    num_prompts: NumPromptsOption = 200,
    seed: SeedOption = 0,
    split: SplitOption = Split.DISCOVERY,
    out: OutOption = Path("geometry.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Norms, angles and effective dimensions of the residual stream, by layer."""
    if (task is None) == (texts is None):
        raise InvalidRequestError("TASK", task, "either a task or --texts")
    require_out(out)
    loaded = load_model(resolve_model(model), torch.float32)
    if task is not None:
        pairs = prompts_of(loaded, task, num_prompts, seed, split)
        name, tokens, real = pairs.name, pairs.clean, pairs.real
    elif texts is not None:
        documents = read_documents([texts], TextSplit.TRAIN)[:num_texts]
        batch = tokenize(loaded, [each.text for each in documents], min(max_tokens, loaded.max_context - 1))
        name, tokens, real = texts.stem, batch.tokens, batch.real
    geometry = describe_layers(loaded, name, tokens, real)
    write(geometry.to_dict(), curves(_panels(geometry.layers), layer_labels(loaded), f"geometry: {name}"), out)


def _panels(layers: tuple[LayerGeometry, ...]) -> dict[str, dict[str, list[float]]]:
    first, *others = layers
    along = [1.0 if first.cosine_to_previous is None else first.cosine_to_previous]
    along += [each.cosine_to_previous or 0.0 for each in others]
    return {
        "norm": {"median": [each.norm_median for each in layers]},
        "cosine": {"between positions": [each.mean_cosine for each in layers], "to the layer before": along},
        "dimensions": {
            "participation ratio": [each.participation_ratio for each in layers],
            "for 90 % of the variance": [float(each.dimensions_90) for each in layers],
        },
    }
