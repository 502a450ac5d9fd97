"""``steerserve lab harvest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from steerserve.lab.commands.options import ModelOption, TextsOption, console
from steerserve.lab.corpus import Split, read_documents
from steerserve.lab.harvest import HarvestConfig, harvest
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model
from steerserve.types import Site


def harvest_command(
    texts: TextsOption,
    site: Annotated[list[str], typer.Option(help="Site to keep, e.g. blocks.20.hook_resid_post; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for the activations; a repeated run continues there.")],
    model: ModelOption = "smollm2-135m-instruct",
    context_length: Annotated[int, typer.Option(min=2)] = 128,
    max_tokens: Annotated[int, typer.Option(min=0, help="0: all texts.")] = 0,
) -> None:
    """Run the training split of TEXTS through the model and keep the activations of SITE."""
    loaded = load_model(resolve_model(model), torch.bfloat16)
    documents = read_documents(texts, Split.TRAIN)
    config = HarvestConfig(tuple(Site.parse(name) for name in site), context_length, max_tokens=max_tokens)
    manifest = harvest(loaded, [document.text for document in documents], out, config)
    console.print(f"{manifest.num_tokens:,} tokens, {manifest.num_rows:,} rows kept in {len(manifest.shards)} shards")
