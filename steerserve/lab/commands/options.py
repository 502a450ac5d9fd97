"""What several commands share: options, loading an SAE for a model, and the record beside an SAE."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.lab.manifest import Manifest
from steerserve.lab.verification import EVALUATION
from steerserve.models.loading import LoadedModel
from steerserve.sae.formats.files import read_json
from steerserve.sae.formats.whole import written_whole
from steerserve.sae.model import SAE
from steerserve.sae.registry import load_sae
from steerserve.steering.catalog import check_sae

console = Console()

ModelOption = Annotated[str, typer.Option(help="Name of a pullable model, a hub id, or a directory.")]
TextsOption = Annotated[
    list[Path], typer.Option(help=".jsonl[.gz] with a 'text' field, or .txt with a text per line; repeatable.")
]
SortByOption = Annotated[
    str, typer.Option(help="Judge that sorts the texts of all files by what they say, where no labels do.")
]


class ModelDtype(StrEnum):
    """Precision in which a model runs."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def torch(self) -> torch.dtype:
        """The dtype of that name."""
        return torch.bfloat16 if self is ModelDtype.BFLOAT16 else torch.float32


ModelDtypeOption = Annotated[
    ModelDtype, typer.Option(help="bfloat16, as it serves; float32 is faster on a CPU without bfloat16 instructions.")
]


def sae_for(model: LoadedModel, directory: Path) -> SAE:
    """The SAE in ``directory``; refused if it was trained on another model."""
    sae = load_sae(directory)
    check_sae(sae, model)
    return sae


def harvest_for(sae: SAE, directory: Path, model: LoadedModel | None = None) -> Manifest:
    """The manifest of the harvest in ``directory``.

    Raises:
        AssetError: there is none.
        IncompatibleError: it is of another width than ``sae``, or of another model than ``model`` or, without one, than
            ``sae`` records.
    """
    manifest = Manifest.load(directory)
    recorded = sae.metadata.get("model_fingerprint") if model is None else model.fingerprint
    if recorded is not None and manifest.model_fingerprint != recorded:
        name = sae.name if model is None else model.name
        expected = f"{recorded}, as {name} has: a harvest of the same model"
        raise IncompatibleError(f"{directory}: model_fingerprint", manifest.model_fingerprint, expected)
    for field, width in (("d_in", sae.d_in), ("d_out", sae.d_out)):
        if manifest.d_model != width:
            raise IncompatibleError(f"{directory}: d_model", manifest.d_model, f"{width}, the {field} of {sae.name}")
    return manifest


def require_writable(field: str, path: Path) -> None:
    """Raise InvalidRequestError, naming the option, before work whose result could not be put into ``path``."""
    if not path.parent.is_dir() or path.is_dir():
        raise InvalidRequestError(field, str(path), "a file in a directory that exists")


def read_record(sae: Path) -> dict[str, Any]:
    """The SAE's ``evaluation.json``, empty without one; raises AssetError if it is damaged."""
    path = sae / EVALUATION
    return read_json(path) if path.exists() else {}


def record(sae: Path, key: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Put figures, and the command that made them, into the SAE's ``evaluation.json``; the figures as they are there.

    Raises:
        AssetError: what is there is damaged.
    """
    content = read_record(sae)
    content[key] = {**figures, "command": shlex.join(["steerserve", *sys.argv[1:]])}
    text = json.dumps(content, indent=1) + "\n"
    with written_whole(sae / EVALUATION) as partial:
        partial.write_text(text, encoding="utf-8")
    written: dict[str, Any] = json.loads(text)[key]
    return written
