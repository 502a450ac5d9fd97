"""What a harvest holds: ``manifest.json`` of a directory of activation shards.

::

    manifest.json            what was harvested, from which model, and the shards that are complete
    shard_00000.safetensors  "blocks.L.hook_S" [n, d]  per site, the rows that were kept, in the manifest's dtype
                             "tokens" [n] int32        the token of each row
                             "context" [n] int32       the context it comes from, counted over the whole harvest
                             "position" [n] int16      its position in that context
                             "input_ids" [c, T] int32  all tokens of the shard's contexts, dropped rows too

Files appear under their names only when they are complete: what a kill leaves behind ends in ``.partial``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from steerserve.errors import AssetError
from steerserve.sae.formats.whole import written_whole

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What rows can be stored in."""


@dataclass(frozen=True)
class ShardRecord:
    """One complete shard.

    Attributes:
        first_context: index of its first context in the harvest.
        input_sha256: hash of its ``input_ids``, by which a repeated run knows that it was given the same texts.
    """

    first_context: int
    num_contexts: int
    num_rows: int
    num_bytes: int
    input_sha256: str


@dataclass
class Manifest:
    """Contents of ``manifest.json``; a shard listed here is complete.

    Attributes:
        dtype: of the rows, one of ``DTYPES``.
        batch_size: contexts of one forward pass, over which the median norm of ``ordinary_rows`` is taken.
        records: of every shard, by name; harvests of earlier versions have none and cannot be continued.
    """

    model_name: str
    model_fingerprint: str
    sites: list[str]
    d_model: int
    context_length: int
    num_tokens: int = 0
    num_rows: int = 0
    shards: list[str] = field(default_factory=list)
    dtype: str = "bfloat16"
    batch_size: int = 16
    records: dict[str, ShardRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read it; raises AssetError when the directory holds no harvest, or a damaged one."""
        path = directory / "manifest.json"
        try:
            if not path.is_file():
                raise AssetError(f"{directory} holds no harvest (no manifest.json); run `steerserve lab harvest` first")
            content = json.loads(path.read_text())
            records = {name: ShardRecord(**record) for name, record in content.pop("records", {}).items()}
            manifest = cls(**content, records=records)
            if manifest.dtype not in DTYPES:
                raise ValueError(f"dtype is {manifest.dtype!r}, expected one of {', '.join(DTYPES)}")
            return manifest
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise AssetError(f"{path} is damaged: {error}") from error

    def save(self, directory: Path) -> None:
        """Write it, so that a kill leaves either the old or the new list of shards."""
        with written_whole(directory / "manifest.json") as partial:
            partial.write_text(json.dumps(asdict(self), indent=1))

    def add(self, name: str, record: ShardRecord) -> None:
        """List a shard; one that is listed already, and was made again, changes nothing."""
        if name not in self.shards:
            self.shards.append(name)
            self.records[name] = record
            self.num_tokens += record.num_contexts * self.context_length
            self.num_rows += record.num_rows

    @property
    def num_contexts(self) -> int:
        """Contexts of all shards that have a record."""
        return sum(record.num_contexts for record in self.records.values())

    def check(self, directory: Path, name: str) -> None:
        """Open a shard; raises AssetError if it is missing, cut short or damaged. Its values are not read."""
        with open_shard(directory, name):
            num_bytes = (directory / name).stat().st_size
        if name in self.records and num_bytes != self.records[name].num_bytes:
            raise _damaged(directory / name, f"{num_bytes} bytes, not {self.records[name].num_bytes}")


def open_shard(directory: Path, name: str) -> Any:
    """A handle for ``with``, whose ``get_tensor`` maps from disk; raises AssetError if missing or damaged."""
    try:
        return safe_open(directory / name, framework="pt")
    except FileNotFoundError:
        raise AssetError(f"{directory / name} is missing; repeat the harvest, which makes it again") from None
    except (OSError, SafetensorError) as error:
        raise _damaged(directory / name, error) from error


def _damaged(path: Path, why: object) -> AssetError:
    return AssetError(f"{path} is damaged ({why}); delete it and repeat the harvest, which makes it again")
