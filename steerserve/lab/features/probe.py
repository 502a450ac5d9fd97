"""What the model would predict after one token if the activation there were another.

An edit at one position changes the prediction after it, and nothing before it. So the context is run once, and a
probe is one more token: the context's own, at its position, attending to the cached keys and values of what comes
before it, with the edit added at the SAE's site. Hundreds of probes share a context and go in one pass, which begins
at the layer of that site: below it they equal the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from steerserve.models.attention import KVStore, PagedAttention
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream


@dataclass(frozen=True, eq=False)
class CleanRun:
    """A context as it is: what the SAE reads, ``x[T, d_in]``, and log P(next token), ``log_probs[T, V]``."""

    x: torch.Tensor
    log_probs: torch.Tensor


class Prober:
    """Runs contexts, and probes of the last one; made by ``probing``."""

    def __init__(self, model: LoadedModel, sae: SAE, store: KVStore) -> None:
        self._model, self._sae, self._store = model, sae, store
        self._entry = Site(sae.out_site.layer, Stream.RESID_PRE)
        self._tokens = torch.zeros(0, dtype=torch.long)
        self._entering = torch.zeros(0, model.d_model)

    def run(self, tokens: torch.Tensor) -> CleanRun:
        """Run the context ``tokens`` ``[T]``; the probes that follow are of its positions."""
        self._tokens = tokens.long()
        positions = torch.arange(len(tokens), dtype=torch.int32)
        self._store.block_table[0, : len(tokens)] = positions
        seen: dict[Site, torch.Tensor] = {}

        def watch(site: Site, x: torch.Tensor) -> torch.Tensor:
            seen[site] = x[0].clone()
            return x

        sites = {self._sae.site, self._entry}
        with transformed(self._model, {site: partial(watch, site) for site in sites}):
            log_probs = self._forward(self._tokens, positions, torch.zeros_like(positions))
        self._entering = seen[self._entry]
        return CleanRun(seen[self._sae.site], log_probs)

    def probe(self, positions: torch.Tensor, edits: torch.Tensor) -> torch.Tensor:
        """log P(next token) ``[K, V]`` after ``positions`` ``[K]``, each with its edit ``[K, d_out]``."""
        rows = torch.arange(1, len(positions) + 1, dtype=torch.int32)
        table = self._store.block_table
        table[1 : len(positions) + 1] = table[0]
        table[rows.long(), positions] = table.shape[1] + rows - 1  # a block of its own
        with ExitStack() as stack:
            stack.enter_context(_skipped(self._model, self._entry.layer))
            # In this order: the site may be the entry itself.
            stack.enter_context(transformed(self._model, {self._entry: lambda _: self._entering[positions][None]}))
            stack.enter_context(transformed(self._model, {self._sae.out_site: lambda x: x + edits.to(x.dtype)}))
            return self._forward(self._tokens[positions], positions.int(), rows)

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self._store.position[: len(tokens)] = positions
        self._store.row[: len(tokens)] = rows
        output = self._model.model(input_ids=tokens[None], position_ids=positions[None].long(), use_cache=False)
        log_probs: torch.Tensor = output.logits[0].float().log_softmax(-1)
        return log_probs


@contextmanager
def _skipped(model: LoadedModel, num_layers: int) -> Iterator[None]:
    """The first layers pass on what they are given."""
    layers = model.adapter.layers(model.model)[:num_layers]
    for layer in layers:
        layer.forward = _passed_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _passed_on(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return hidden_states


@contextmanager
def probing(model: LoadedModel, sae: SAE, context_length: int, max_probes: int) -> Iterator[Prober]:
    """A ``Prober``; the model is its own inside the block.

    Raises:
        IncompatibleError: the model's positions depend on the whole batch.
    """
    store = KVStore(
        model.model.config,
        num_blocks=context_length + max_probes,
        block_size=1,
        max_num_seqs=1 + max_probes,
        max_model_len=context_length,
        max_num_batched_tokens=max(context_length, max_probes),
        dtype=model.model.dtype,
    )
    attention = PagedAttention(model.model, model.adapter, store)
    try:
        yield Prober(model, sae, store)
    finally:
        attention.remove()
        store.close()
