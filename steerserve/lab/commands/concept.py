"""``steerserve lab concept`` and ``steerserve lab card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from steerserve.lab.commands.options import ModelOption, console, sae_for
from steerserve.lab.concepts import ConceptConfig, make_concept, measure_concept
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model


def concept_command(
    name: Annotated[str, typer.Argument(help="Name of the pack.")],
    sae: Annotated[Path, typer.Option(help="SAE directory.")],
    harmful: Annotated[list[Path], typer.Option(help="Texts of which many hold profanity; repeatable.")],
    benign: Annotated[list[Path], typer.Option(help="Texts of any other kind; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for the pack.")],
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Build a profanity pack: features chosen by effect, clamps fitted and calibrated. Next: `lab card`."""
    loaded = load_model(resolve_model(model), torch.bfloat16)
    make_concept(loaded, sae_for(loaded, sae), name, harmful, benign, ConceptConfig(), out, console)


def card_command(
    pack: Annotated[Path, typer.Argument(help="Pack directory; its card.json is rewritten.")],
    harmful: Annotated[list[Path], typer.Option(help="As for `lab concept`; the test split is used.")],
    benign: Annotated[list[Path], typer.Option(help="As for `lab concept`.")],
    model: ModelOption = "smollm2-135m-instruct",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, chosen before the seeds are drawn.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Continuations per prompt.")] = 5,
) -> None:
    """Measure a pack on held-out texts, guarded against unguarded, and write the figures into its card."""
    loaded = load_model(resolve_model(model), torch.bfloat16)
    measured = measure_concept(loaded, pack, harmful, benign, prompts, seeds)
    console.print_json(data=measured.card.evaluation)
