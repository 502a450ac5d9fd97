"""``steerserve lab eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from steerserve.lab.commands.options import ModelOption, TextsOption, console, record, sae_for
from steerserve.lab.corpus import Split, read_documents
from steerserve.lab.evaluation import evaluate_sae, feature_stats
from steerserve.lab.manifest import Manifest
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model
from steerserve.sae.saelens import save_max_activation


def eval_command(
    sae: Annotated[Path, typer.Argument(help="SAE directory in SAELens format.")],
    texts: TextsOption,
    activations: Annotated[Path, typer.Option(help="Harvest over which density and dead features are counted.")],
    model: ModelOption = "smollm2-135m-instruct",
    held_out_tokens: Annotated[int, typer.Option(min=128)] = 100_000,
    density_tokens: Annotated[int, typer.Option(min=1)] = 1_000_000,
) -> None:
    """Measure L0, FVU, ΔCE, CE recovered and the share of dead features on held-out texts."""
    loaded = load_model(resolve_model(model), torch.float32)
    trained = sae_for(loaded, sae)
    stats = feature_stats(trained, activations, density_tokens)
    held_out = [document.text for document in read_documents(texts, Split.TEST)]
    context_length = Manifest.load(activations).context_length
    figures = evaluate_sae(loaded, trained, held_out, stats, context_length, held_out_tokens).to_dict()
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    save_max_activation(stats.max_activation, sae)
    record(sae, "evaluation", figures)
