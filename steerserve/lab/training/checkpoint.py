"""The state of an unfinished run in one file, ``checkpoint.safetensors``.

Its settings are JSON in the header of the same file, so that replacing it is one step: whatever is interrupted, one
whole checkpoint is there, the old one or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steerserve.errors import AssetError

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(
    directory: Path, state: dict[str, torch.Tensor], num_steps: int, settings: Mapping[str, Any]
) -> None:
    """Replace the checkpoint in ``directory``.

    Raises:
        AssetError: it cannot be written, as on a full disk; the one before is left as it was.
    """
    path = directory / CHECKPOINT
    partial = path.with_suffix(".partial")
    header = {"num_steps": str(num_steps), "settings": json.dumps(settings)}
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, header)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        kept = "the one before is intact" if path.exists() else "there is none before it"
        raise AssetError(f"{path}: the checkpoint of step {num_steps} cannot be written: {error}; {kept}") from error


def load_checkpoint(directory: Path, settings: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], int] | None:
    """State and number of steps of the run in ``directory``; None if there is no checkpoint.

    Raises:
        AssetError: the file is damaged, or of a run with other settings.
    """
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            found, num_steps = json.loads(header["settings"]), int(header["num_steps"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AssetError(f"{path} cannot be read as a checkpoint: {error}; remove it to start anew") from error
    require_same_settings(path, found, settings)
    return state, num_steps


def require_same_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise AssetError, naming the first difference, if ``path`` belongs to a run with other settings."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise AssetError(
                f"{path} is of a run with {name} {found.get(name)}, not {value}; remove it, or choose another directory"
            )
