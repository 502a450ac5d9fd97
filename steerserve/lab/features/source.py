"""Where the activations of a scan come from: texts that are run through the model, or a harvest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.manifest import Manifest, open_shard
from steerserve.lab.tokens import pack_contexts
from steerserve.models.loading import LoadedModel
from steerserve.types import Site


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive contexts and what the SAE's site holds at their ordinary positions.

    Attributes:
        first_context: number of the first of them.
        tokens: ``[B, T]`` int32.
        rows: ``[n]`` ascending indices into ``tokens.flatten()``: the ordinary positions.
        x: ``[n, d]`` their activations.
    """

    first_context: int
    tokens: torch.Tensor
    rows: torch.Tensor
    x: torch.Tensor


class Source(Protocol):
    """Contexts ``[C, T]`` int32 and their activations at one site."""

    contexts: torch.Tensor

    def blocks(self, max_contexts: int) -> Iterator[Block]:
        """All contexts in order, at most ``max_contexts`` at once."""


class TextSource:
    """Texts, packed into contexts; the model runs once over each when its block is asked for."""

    def __init__(
        self, model: LoadedModel, site: Site, texts: Iterable[str], context_length: int, max_tokens: int
    ) -> None:
        """Raises AssetError when the texts, cut at ``max_tokens``, do not fill one context."""
        contexts = list(islice(pack_contexts(model, texts, context_length), max_tokens // context_length))
        if not contexts:
            raise AssetError(f"the texts, cut at {max_tokens} tokens, fill no context of {context_length}")
        self.contexts = torch.stack(contexts)
        self._model, self._site = model, site

    def blocks(self, max_contexts: int) -> Iterator[Block]:
        """See ``Source``."""
        first = 0
        for tokens in self.contexts.split(max_contexts):
            x = activations_of(self._model, tokens, (self._site,))[self._site]
            keep = ordinary_rows(x).flatten()
            yield Block(first, tokens, keep.nonzero()[:, 0], x.flatten(0, 1)[keep])
            first += len(tokens)


class HarvestSource:
    """The first contexts of a harvest. It keeps no first positions and no massive activations."""

    def __init__(self, directory: Path, site: Site, max_tokens: int) -> None:
        """Raises AssetError when the harvest lacks the site or does not say where its rows stand in their contexts."""
        self._directory, self._site = directory, str(site)
        manifest = Manifest.load(directory)
        if self._site not in manifest.sites:
            raise AssetError(f"{directory} holds {', '.join(manifest.sites)}, not {site}")
        wanted, contexts = max_tokens // manifest.context_length, 0
        self._shards: list[tuple[str, torch.Tensor]] = []
        for name in manifest.shards:
            if contexts >= wanted:
                break
            with open_shard(directory, name) as file:
                if "input_ids" not in file.keys():  # noqa: SIM118 - it is not a mapping
                    raise AssetError(f"{directory / name} has no input_ids; run `steerserve lab harvest` again")
                tokens = file.get_tensor("input_ids")[: wanted - contexts]
            self._shards.append((name, tokens))
            contexts += len(tokens)
        if not contexts:
            raise AssetError(f"{directory}, cut at {max_tokens} tokens, holds no context of {manifest.context_length}")
        self.contexts = torch.cat([tokens for _, tokens in self._shards])

    def blocks(self, max_contexts: int) -> Iterator[Block]:
        """See ``Source``."""
        first = 0
        for name, contexts in self._shards:
            with open_shard(self._directory, name) as file:
                context, position = file.get_tensor("context").long(), file.get_tensor("position").long()
                x = file.get_tensor(self._site)
            context -= first  # not the first that is there: a context may have lost all of its rows
            for start in range(0, len(contexts), max_contexts):
                tokens = contexts[start : start + max_contexts]
                mine = (context >= start) & (context < start + len(tokens))
                rows = (context[mine] - start) * contexts.shape[1] + position[mine]
                yield Block(first + start, tokens, rows, x[mine])
            first += len(contexts)
