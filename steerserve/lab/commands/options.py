"""What several commands share: options, loading an SAE for a model, and the record beside an SAE."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.sae.registry import load_sae
from steerserve.steering.catalog import check_sae

console = Console()

ModelOption = Annotated[str, typer.Option(help="Name of a pullable model, a hub id, or a directory.")]
TextsOption = Annotated[
    list[Path], typer.Option(help=".jsonl[.gz] with a 'text' field, or .txt with a text per line; repeatable.")
]


def sae_for(model: LoadedModel, directory: Path) -> SAE:
    """The SAE in ``directory``; refused if it was trained on another model."""
    sae = load_sae(directory)
    check_sae(sae, model)
    return sae


def record(sae: Path, key: str, figures: dict[str, Any]) -> None:
    """Put figures, and the command that made them, into the SAE's ``evaluation.json``."""
    path = sae / "evaluation.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record[key] = {**figures, "command": shlex.join(["steerserve", *sys.argv[1:]])}
    path.write_text(json.dumps(record, indent=1) + "\n")
