"""Harvest: run texts through a model once and keep the activations of chosen sites on disk.

The result is a directory of shards (see ``manifest``) that training and evaluation map into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import save_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.lab.activations import activations_of, ordinary_rows, pack_contexts
from steerserve.lab.manifest import Manifest
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

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
