"""Load a causal language model from a local directory or the Hugging Face hub.

Only safetensors weights and the modelling code of the installed ``transformers`` are used; a
repository's own code is never downloaded or run.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steerserve.errors import AssetError
from steerserve.models.families import FamilyAdapter, adapter_for
from steerserve.models.huge_pages import move_to_huge_pages


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to serve.

    Attributes:
        model: in eval mode, on the CPU.
        name: the directory's name, or the hub id.
        fingerprint: SHA-256 of the checkpoint's tensors, whatever dtype they were loaded in.
        max_context: longest sequence the model was made for, in tokens.
        eos_token_ids: tokens that end a response.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: FamilyAdapter
    name: str
    fingerprint: str
    d_model: int
    n_layers: int
    vocab_size: int
    max_context: int
    eos_token_ids: frozenset[int]

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        return int(self.model.config.num_attention_heads)

    @property
    def d_head(self) -> int:
        """Width of a head's output."""
        return int(getattr(self.model.config, "head_dim", None) or self.d_model // self.n_heads)

    def head_writes(self, layer: int, head: int) -> npt.NDArray[np.float32]:
        """``[d_head, d_model]``: what a head's output becomes in the residual stream, ahead of any norm there."""
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        writes: npt.NDArray[np.float32] = self.adapter.out_weight(self.model, layer)[rows].float().numpy()
        return writes


def load_model(path_or_id: str, dtype: torch.dtype) -> LoadedModel:
    """Load a model directory, or a hub id (from the local hub cache when offline).

    Raises:
        AssetError: nothing there, no safetensors weights, or files that cannot be read.
        IncompatibleError: a model family steerserve does not know.
    """
    directory = _resolve(path_or_id)
    adapter = adapter_for(_model_type(directory))
    fingerprint = checkpoint_fingerprint(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise AssetError(f"cannot load the model in {directory}: {error!r}") from error
    model, report = loaded
    if absent := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise AssetError(
            f"the weights in {directory} are incomplete; transformers would invent {', '.join(absent[:3])}"
        )
    move_to_huge_pages(model)
    config = model.config
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        adapter=adapter,
        name=directory.name if Path(path_or_id).is_dir() else path_or_id,
        fingerprint=fingerprint,
        d_model=int(config.hidden_size),
        n_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        max_context=int(config.max_position_embeddings),
        eos_token_ids=_eos_token_ids(model, tokenizer),
    )


def checkpoint_fingerprint(directory: Path) -> str:
    """SHA-256 over every tensor of the checkpoint, by name: its name, dtype, shape and bytes.

    How the tensors are spread over files, and the metadata of those files, do not count.

    Raises:
        AssetError: no safetensors weights, or files that cannot be read.
    """
    digest = hashlib.sha256()
    files = [_read_safetensors(file) for file in _weight_files(directory)]
    for name, data, spec in sorted(
        ((name, data, spec) for data, specs in files for name, spec in specs.items()), key=lambda item: item[0]
    ):
        begin, end = spec["data_offsets"]
        digest.update(json.dumps([name, spec["dtype"], spec["shape"]]).encode())
        digest.update(data[begin:end])
    return digest.hexdigest()


def _resolve(path_or_id: str) -> Path:
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(path_or_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise AssetError(
            f"{path_or_id!r} is neither a directory nor a model that the Hugging Face hub or its local cache holds. "
            "When offline, give the path of a directory with config.json, tokenizer files and *.safetensors weights."
        ) from error


def _model_type(directory: Path) -> str:
    return str(_read_json(directory / "config.json").get("model_type"))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(weight_map, dict) or not weight_map:
        raise AssetError(f"{index} has no weight_map")
    names = set(weight_map.values())
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise AssetError(f"{file} is missing; steerserve loads safetensors weights only")
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise AssetError(f"{file} does not hold a JSON object")
    return content


def _read_safetensors(file: Path) -> tuple[memoryview, dict[str, Any]]:
    """A safetensors file's tensor bytes and, by name, where each tensor lies in them.

    The file is an 8-byte little-endian length, that many bytes of JSON, then the tensors.
    """
    try:
        with file.open("rb") as stream:
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        start = 8 + int.from_bytes(data[:8], "little")
        specs = dict(json.loads(bytes(data[8:start])))
    except (OSError, ValueError) as error:
        raise AssetError(f"{file} is not a safetensors file: {error}") from error
    specs.pop("__metadata__", None)
    return data[start:], specs


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset(_token_ids(declared if declared is not None else tokenizer.eos_token_id))


def _token_ids(declared: int | list[int] | None) -> Iterator[int]:
    if isinstance(declared, int):
        yield declared
    elif declared is not None:
        yield from declared
