"""Harvest: run texts through a model once and keep the activations of chosen sites on disk.

The result is a directory of shards that training and evaluation map into memory::

    manifest.json            what was harvested, from which model, and the shards that are complete
    shard_00000.safetensors  "tokens" [n] int32, and per site "blocks.L.hook_S" [n, d] bfloat16

Rows are kept only where the activation says something about the text: the first position of a
context and separator tokens carry *massive activations* (in SmolLM2 a norm of 24,000 beside a
median of 150) that are an attention sink, not a feature. A row is dropped when its norm exceeds
``MASSIVE_NORM_RATIO`` times the median of its batch at any harvested site.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

MASSIVE_NORM_RATIO = 8.0
CONTEXTS_PER_SHARD = 2048


@dataclass(frozen=True)
class HarvestConfig:
    """What to harvest.

    Attributes:
        sites: sites to keep, all read in one forward pass.
        context_length: tokens per forward context; documents are joined by the end-of-sequence token.
        batch_size: contexts per forward pass.
        max_tokens: stop at the first context that reaches this many input tokens; 0 takes all texts.
    """

    sites: tuple[Site, ...]
    context_length: int = 128
    batch_size: int = 16
    max_tokens: int = 0


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


def harvest(model: LoadedModel, texts: Iterable[str], directory: Path, config: HarvestConfig) -> Manifest:
    """Write the activations of ``texts`` to ``directory``; a repeated call continues where it stopped.

    Raises:
        AssetError: the directory holds a harvest of another model or other sites.
        IncompatibleError: a site is outside the model.
    """
    for site in config.sites:
        if site.layer >= model.n_layers:
            raise IncompatibleError("site", str(site), f"a layer below {model.n_layers}, as {model.name} has")
    directory.mkdir(parents=True, exist_ok=True)
    manifest = _open_manifest(model, directory, config)
    contexts = pack_contexts(model, texts, config.context_length)
    shards = _batched(contexts, CONTEXTS_PER_SHARD, math.ceil(config.max_tokens / config.context_length))
    with Progress() as progress:
        task = progress.add_task("harvest", total=config.max_tokens or None, completed=manifest.num_tokens)
        for number, tokens in enumerate(shards):
            if number < len(manifest.shards):
                continue
            name = f"shard_{number:05d}.safetensors"
            shard = _harvest_shard(model, tokens, config, lambda n: progress.advance(task, n))
            save_file(shard, directory / name)
            manifest.shards.append(name)
            manifest.num_tokens += tokens.numel()
            manifest.num_rows += len(shard["tokens"])
            manifest.save(directory)
    return manifest


def pack_contexts(model: LoadedModel, texts: Iterable[str], context_length: int) -> Iterator[torch.Tensor]:
    """Tokenise ``texts``, join them by the end-of-sequence token, yield full contexts ``[context_length]``."""
    separator = model.tokenizer.eos_token_id
    pending: list[int] = []
    for text in texts:
        pending += [*model.tokenizer(text, add_special_tokens=False).input_ids, separator]
        while len(pending) >= context_length:
            yield torch.tensor(pending[:context_length], dtype=torch.int32)
            pending = pending[context_length:]


@torch.inference_mode()
def activations_of(model: LoadedModel, tokens: torch.Tensor, sites: tuple[Site, ...]) -> dict[Site, torch.Tensor]:
    """Activations ``[B, T, d]`` of ``tokens`` ``[B, T]``; the forward pass stops after the last site."""
    captured: dict[Site, torch.Tensor] = {}

    def keep(site: Site, activation: torch.Tensor) -> torch.Tensor:
        captured[site] = activation
        if len(captured) == len(sites):
            raise _AllCapturedError
        return activation

    with transformed(model, {site: partial(keep, site) for site in sites}), suppress(_AllCapturedError):
        model.model(tokens.long(), use_cache=False, logits_to_keep=1)
    return captured


class ActivationStore:
    """Shuffled mini-batches of one site of a harvest, through a buffer of several mapped shards."""

    def __init__(self, directory: Path, site: Site, *, seed: int, shards_in_buffer: int = 4) -> None:
        self.directory = directory
        self.site = site
        self.manifest = Manifest.load(directory)
        if str(site) not in self.manifest.sites:
            raise AssetError(f"{directory} holds {', '.join(self.manifest.sites)}, not {site}")
        self._generator = torch.Generator().manual_seed(seed)
        self._shards_in_buffer = shards_in_buffer

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """One epoch of ``[batch_size, d]`` fp32 batches, in a new order at each call.

        Every row comes once, but for those that fill no batch at the end.

        Raises:
            AssetError: the harvest is smaller than one batch.
        """
        if self.manifest.num_rows < batch_size:
            raise AssetError(
                f"{self.directory} holds {self.manifest.num_rows} rows, less than one batch ({batch_size})"
            )
        order = torch.randperm(len(self.manifest.shards), generator=self._generator).tolist()
        leftover: list[torch.Tensor] = []
        for start in range(0, len(order), self._shards_in_buffer):
            chosen = order[start : start + self._shards_in_buffer]
            buffer = torch.cat([*leftover, *(self.shard(number) for number in chosen)])
            shuffled = torch.randperm(len(buffer), generator=self._generator)
            full = len(buffer) // batch_size * batch_size
            for begin in range(0, full, batch_size):
                yield buffer[shuffled[begin : begin + batch_size]].float()
            leftover = [buffer[shuffled[full:]]]

    def shard(self, number: int) -> torch.Tensor:
        """Rows ``[n, d]`` bfloat16 of one shard, mapped from disk."""
        with safe_open(self.directory / self.manifest.shards[number], framework="pt") as file:
            rows: torch.Tensor = file.get_tensor(str(self.site))
        return rows


class _AllCapturedError(Exception):
    """Ends a forward pass early."""


def _harvest_shard(
    model: LoadedModel, tokens: torch.Tensor, config: HarvestConfig, advance: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    kept: dict[str, list[torch.Tensor]] = {"tokens": [], **{str(site): [] for site in config.sites}}
    for batch in tokens.split(config.batch_size):
        activations = activations_of(model, batch, config.sites)
        keep = torch.stack([ordinary_rows(rows) for rows in activations.values()]).all(0)
        kept["tokens"].append(batch[keep])
        for site, rows in activations.items():
            kept[str(site)].append(rows[keep].to(torch.bfloat16))
        advance(batch.numel())
    return {name: torch.cat(parts) for name, parts in kept.items()}


def ordinary_rows(rows: torch.Tensor) -> torch.Tensor:
    """Mask ``[B, T]`` of the rows ``[B, T, d]`` that carry no massive activation."""
    norms = rows.float().norm(dim=-1)
    keep: torch.Tensor = norms <= MASSIVE_NORM_RATIO * norms.median()
    keep[:, 0] = False
    return keep


def _open_manifest(model: LoadedModel, directory: Path, config: HarvestConfig) -> Manifest:
    sites = [str(site) for site in config.sites]
    fresh = Manifest(model.name, model.fingerprint, sites, model.d_model, config.context_length)
    if not (directory / "manifest.json").exists():
        return fresh
    found = Manifest.load(directory)
    for name in ("model_fingerprint", "sites", "context_length"):
        if getattr(found, name) != getattr(fresh, name):
            raise AssetError(
                f"{directory} holds a harvest with {name} {getattr(found, name)}, not {getattr(fresh, name)}"
            )
    return found


def _batched(contexts: Iterator[torch.Tensor], size: int, limit: int) -> Iterator[torch.Tensor]:
    pending: list[torch.Tensor] = []
    for count, context in enumerate(contexts, 1):
        pending.append(context)
        if len(pending) == size or count == limit:
            yield torch.stack(pending)
            pending = []
        if count == limit:
            return
    if pending:
        yield torch.stack(pending)
