"""Harvest: run texts through a model once and keep the activations of chosen sites on disk.

The result is a directory of shards (see ``manifest``) that training and evaluation map into memory. While one shard is
computed, the one before is written: two are in memory at most. A harvest that was stopped, by whatever, goes on behind
its last complete shard, to the same bytes as one that was not; it knows its texts by a hash of each shard's tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.manifest import DTYPES, Manifest, ShardRecord
from steerserve.lab.tokens import pack_contexts
from steerserve.models.loading import LoadedModel
from steerserve.sae.formats.whole import written_whole
from steerserve.steering.packs import width_of
from steerserve.types import Site

TOKENS_PER_SHARD = 2**18
MAX_SHARD_BYTES = 2**30
"""Shards of wide models, or of many sites, have fewer tokens."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, for how many tokens it is done, and how many have been taken from the texts."""


@dataclass(frozen=True)
class HarvestConfig:
    """What to harvest.

    Attributes:
        sites: sites to keep, all read in one forward pass.
        context_length: tokens per forward context; documents are joined by the end-of-sequence token.
        batch_size: contexts per forward pass.
        max_tokens: stop at the first context that reaches this many input tokens; 0 takes all texts.
        dtype: of the rows on disk, one of ``DTYPES``.
    """

    sites: tuple[Site, ...]
    context_length: int = 128
    batch_size: int = 16
    max_tokens: int = 0
    dtype: str = "bfloat16"


def harvest(
    model: LoadedModel, texts: Iterable[str], directory: Path, config: HarvestConfig, report: Report = lambda *_: None
) -> Manifest:
    """Write the activations of ``texts`` to ``directory``; a repeated call continues where it stopped.

    Raises:
        InvalidRequestError, IncompatibleError: a setting that cannot be, or is not for this model.
        AssetError: the directory holds a harvest of another model, of other settings or texts, or a damaged shard;
            the disk is full; the texts fill no context; an activation is not finite. Complete shards are kept.
    """
    _check(model, config)
    contexts = pack_contexts(model, texts, config.context_length)
    first = next(contexts, None)
    if first is None:
        raise AssetError(f"the texts fill no context of {config.context_length} tokens")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lock", timeout=0):
            return _harvest(model, chain([first], contexts), directory, config, report)
    except Timeout:
        raise AssetError(f"another process harvests into {directory}") from None
    except OSError as error:
        raise AssetError(f"cannot write to {directory}: {error}") from error


def _harvest(
    model: LoadedModel, contexts: Iterator[torch.Tensor], directory: Path, config: HarvestConfig, report: Report
) -> Manifest:
    manifest = _open_manifest(model, directory, config)
    finished = _finished_shards(manifest, directory, contexts, report)
    new = _new_shards(model, manifest, contexts, config)
    with _ShardWriter(directory, manifest) as writer:
        for name, first_context, tokens in chain(finished, new):
            try:
                shard = _compute_shard(model, tokens, first_context, config, report)
            except _NotFiniteError as error:
                raise AssetError(f"{directory / name} was not written: {error}") from None
            writer.write(name, first_context, shard)
            del shard  # it would otherwise stay until the next one is complete
    return manifest


def _check(model: LoadedModel, config: HarvestConfig) -> None:
    for site in config.sites:
        if site.layer >= model.n_layers:
            raise IncompatibleError("site", str(site), f"a layer below {model.n_layers}, as {model.name} has")
        if width_of(model, site) != model.d_model:
            raise IncompatibleError("site", str(site), f"a site as wide as the residual stream, {model.d_model}")
    if not config.sites or len(set(config.sites)) < len(config.sites):
        raise InvalidRequestError("site", ", ".join(map(str, config.sites)), "at least one site, each given once")
    longest = min(model.max_context, torch.iinfo(torch.int16).max)
    if not 2 <= config.context_length <= longest:
        raise InvalidRequestError("context_length", config.context_length, f"2 to {longest}, for {model.name}")
    if config.dtype not in DTYPES:
        raise InvalidRequestError("dtype", config.dtype, f"one of {', '.join(DTYPES)}")


def _open_manifest(model: LoadedModel, directory: Path, config: HarvestConfig) -> Manifest:
    fresh = Manifest(
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        sites=[str(site) for site in config.sites],
        d_model=model.d_model,
        context_length=config.context_length,
        dtype=config.dtype,
        batch_size=config.batch_size,
    )
    if not (directory / "manifest.json").exists():
        return fresh
    found = Manifest.load(directory)
    for name in ("model_fingerprint", "sites", "context_length", "dtype", "batch_size"):
        if getattr(found, name) != getattr(fresh, name):
            raise AssetError(
                f"{directory} holds a harvest with {name} {getattr(found, name)}, not {getattr(fresh, name)}"
            )
    if found.records.keys() != set(found.shards):
        raise AssetError(f"{directory} holds a harvest of an earlier version, which can be read but not continued")
    return found


NewShard = tuple[str, int, torch.Tensor]
"""Name, index of the first context, and the contexts ``[c, T]`` of a shard to be made."""


def _finished_shards(
    manifest: Manifest, directory: Path, contexts: Iterator[torch.Tensor], report: Report
) -> Iterator[NewShard]:
    """Pass over the contexts of the shards that exist; one whose file was deleted comes out, to be made again."""
    for name, record in list(manifest.records.items()):
        num_tokens = record.first_context * manifest.context_length
        report("checking", num_tokens, num_tokens)
        taken = list(islice(contexts, record.num_contexts))
        if not taken or _sha256(tokens := torch.stack(taken)) != record.input_sha256:
            raise AssetError(f"{directory / name} was made of other texts; give the same ones, or another directory")
        if (directory / name).exists():
            manifest.check(directory, name)
        else:
            yield name, record.first_context, tokens


def _new_shards(
    model: LoadedModel, manifest: Manifest, contexts: Iterator[torch.Tensor], config: HarvestConfig
) -> Iterator[NewShard]:
    """Shards behind those of the manifest, which must have been passed over."""
    context_bytes = config.context_length * len(config.sites) * model.d_model * DTYPES[config.dtype].itemsize
    size = max(1, min(TOKENS_PER_SHARD // config.context_length, MAX_SHARD_BYTES // context_bytes))
    first_context = manifest.num_contexts
    if config.max_tokens:
        wanted = math.ceil(config.max_tokens / config.context_length)
        contexts = islice(contexts, max(0, wanted - first_context))
    for number in count(len(manifest.shards)):
        taken = list(islice(contexts, size))
        if not taken:
            return
        yield f"shard_{number:05d}.safetensors", first_context, torch.stack(taken)
        first_context += len(taken)


@torch.inference_mode()
def _compute_shard(
    model: LoadedModel, contexts: torch.Tensor, first_context: int, config: HarvestConfig, report: Report
) -> dict[str, torch.Tensor]:
    capacity = contexts[:, 1:].numel()  # the first position of a context is never kept
    kept: dict[str, torch.Tensor] = {}
    num_rows = 0
    num_tokens_read = (first_context + len(contexts)) * config.context_length
    for start in range(0, len(contexts), config.batch_size):
        tokens = contexts[start : start + config.batch_size]
        report("harvesting", (first_context + start) * config.context_length, num_tokens_read)
        activations = activations_of(model, tokens, config.sites)
        for site, rows in activations.items():
            _check_finite(site, rows, first_context + start)
        keep = torch.stack([ordinary_rows(rows) for rows in activations.values()]).all(0)
        context, position = keep.nonzero(as_tuple=True)
        context += first_context + start
        columns = {"tokens": tokens[keep], "context": context.int(), "position": position.short()}
        for site, rows in activations.items():
            columns[str(site)] = rows[keep].to(DTYPES[config.dtype])
            if config.dtype == "float16":
                _check_fits(site, columns[str(site)])
        end = num_rows + len(context)
        for name, values in columns.items():
            if name not in kept:
                kept[name] = torch.empty(capacity, *values.shape[1:], dtype=values.dtype)
            kept[name][num_rows:end] = values
        num_rows = end
    report("harvesting", num_tokens_read, num_tokens_read)
    return {name: values[:num_rows] for name, values in kept.items()} | {"input_ids": contexts}


def _check_finite(site: Site, rows: torch.Tensor, first_context: int) -> None:
    """Look for NaN and infinity in ``[B, T, d]``; least and largest value are a fifth of the cost of ``isfinite``."""
    if not torch.stack(rows.aminmax()).isfinite().all():
        context, position, _ = (~rows.isfinite()).nonzero()[0].tolist()
        raise _NotFiniteError(f"{site} is NaN or infinite in context {first_context + context}, position {position}")


def _check_fits(site: Site, rows: torch.Tensor) -> None:
    if len(rows) and not torch.stack(rows.aminmax()).isfinite().all():
        raise _NotFiniteError(f"{site} has values beyond the range of float16; use bfloat16 or float32")


class _NotFiniteError(Exception):
    """An activation that cannot be kept; says which."""


class _ShardWriter:
    """Writes one shard, and then the manifest, in a thread of its own while the next shard is computed.

    Whatever ends the block, the shard that was being written is complete behind it, or has failed.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if error_type is None:
            self._wait()

    def write(self, name: str, first_context: int, shard: dict[str, torch.Tensor]) -> None:
        """Take a shard once the one before is on disk; raises AssetError if that one is not."""
        self._wait()
        self._pending = self._thread.submit(self._write, name, first_context, shard)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _write(self, name: str, first_context: int, shard: dict[str, torch.Tensor]) -> None:
        path = self._directory / name
        try:
            with written_whole(path) as partial:
                save_file(shard, partial)
            contexts, num_rows = shard["input_ids"], len(shard["tokens"])
            num_bytes = path.stat().st_size
            record = ShardRecord(first_context, len(contexts), num_rows, num_bytes, _sha256(contexts))
            self._manifest.add(name, record)
            self._manifest.save(self._directory)
        except (OSError, SafetensorError) as error:
            kept = f"{len(self._manifest.shards)} shards with {self._manifest.num_tokens:,} tokens are kept"
            raise AssetError(
                f"{path} could not be written: {error}; {kept}. When there is room, repeat the command to continue"
            ) from error


def _sha256(contexts: torch.Tensor) -> str:
    return hashlib.sha256(contexts.numpy().tobytes()).hexdigest()
