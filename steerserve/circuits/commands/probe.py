"""``steerserve analyse probe``."""

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
from steerserve.circuits.layer_probes import Examples, examples_of_pairs, examples_of_texts, probe_layers
from steerserve.circuits.lens import layer_labels
from steerserve.circuits.plots import curves
from steerserve.circuits.prompts import Split
from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelOption
from steerserve.lab.corpus import Split as TextSplit
from steerserve.lab.corpus import read_documents
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model


def probe_command(
    task: OptionalTaskArgument = None,
    labelled: Annotated[
        Path | None, typer.Option(help="Instead of a task: .jsonl[.gz] with a 'text' and a 'label' field.")
    ] = None,
    num_texts: Annotated[int, typer.Option(min=10, help="Most labelled texts.")] = 500,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each labelled text.")] = 64,
    num_prompts: NumPromptsOption = 200,
    seed: SeedOption = 0,
    split: SplitOption = Split.DISCOVERY,
    out: OutOption = Path("probes.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Train a linear probe at every layer: on clean against corrupted prompts of a task, or on labelled texts."""
    if (task is None) == (labelled is None):
        raise InvalidRequestError("TASK", task, "either a task or --labelled")
    require_out(out)
    loaded = load_model(resolve_model(model), torch.float32)
    if task is not None:
        examples = examples_of_pairs(loaded, prompts_of(loaded, task, num_prompts, seed, split))
    elif labelled is not None:
        examples = _labelled_texts(loaded, labelled, num_texts, max_tokens)
    probes = probe_layers(loaded, examples)
    accuracy = {
        "labels": [each.accuracy for each in probes.probes],
        "shuffled": [each.shuffled for each in probes.probes],
    }
    title = f"linear probes: {probes.examples} ({' / '.join(probes.labels)})"
    write(probes.to_dict(), curves({"balanced accuracy": accuracy}, layer_labels(loaded), title), out)


def _labelled_texts(model: LoadedModel, path: Path, num_texts: int, max_tokens: int) -> Examples:
    documents = read_documents([path], TextSplit.TRAIN)[:num_texts]
    texts, labels = [each.text for each in documents], [each.label for each in documents]
    return examples_of_texts(model, path.stem, texts, labels, min(max_tokens, model.max_context))
