"""What a harvest holds: ``manifest.json`` of a directory of activation shards.

::

    manifest.json            what was harvested, from which model, and the shards that are complete
    shard_00000.safetensors  "tokens" [n] int32, and per site "blocks.L.hook_S" [n, d] bfloat16
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from steerserve.errors import AssetError


@dataclass
class Manifest:
    """Contents of ``manifest.json``; a shard listed here is complete."""

    model_name: str
    model_fingerprint: str
    sites: list[str]
    d_model: int
    context_length: int
    num_tokens: int = 0
    num_rows: int = 0
    shards: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read it; raises AssetError when the directory holds no harvest, or a damaged one."""
        path = directory / "manifest.json"
        if not path.is_file():
            raise AssetError(f"{directory} holds no harvest (no manifest.json); run `steerserve lab harvest` first")
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise AssetError(f"{path} is damaged: {error}") from error

    def save(self, directory: Path) -> None:
        """Write it atomically, so that a kill leaves either the old or the new list of shards."""
        partial = directory / "manifest.json.partial"
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(directory / "manifest.json")
