"""Forward passes over prompt pairs: logits behind each prompt, and what is read or replaced on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

HeadFunction = Callable[[torch.Tensor], torch.Tensor]

BATCH_SIZE = 32


def last_logits(model: LoadedModel, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Logits ``[N, V]`` at position ``last`` ``[N]`` of each of ``tokens`` ``[N, T]``, in one pass."""
    kept = last.unique()
    logits: torch.Tensor = model.model(tokens, use_cache=False, logits_to_keep=kept).logits
    return logits[torch.arange(len(last)), torch.searchsorted(kept, last)]


@torch.no_grad()
def all_last_logits(model: LoadedModel, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The same of any number of prompts, ``BATCH_SIZE`` at a time, without gradients."""
    parts = zip(tokens.split(BATCH_SIZE), last.split(BATCH_SIZE), strict=True)
    return torch.cat([last_logits(model, *part) for part in parts])


def unembedded(model: LoadedModel, x: torch.Tensor) -> torch.Tensor:
    """Logits ``[..., V]`` that the model would give if ``x`` ``[..., d]`` were the output of its last layer."""
    network: Any = model.model
    logits: torch.Tensor = network.get_output_embeddings()(network.get_submodule(model.adapter.final_norm)(x))
    cap = getattr(network.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@contextmanager
def heads_transformed(model: LoadedModel, functions: Mapping[int, HeadFunction]) -> Iterator[None]:
    """Forward passes inside the block go on with ``functions[layer](z)``, ``[B, T, heads, head_dim]`` each.

    z is what a head reads from the values, before the output projection (``attn.hook_z``). A function that only reads
    returns its argument.
    """
    projections = model.adapter.out_projections(model.model)
    with ExitStack() as stack:
        for layer, function in functions.items():
            handle = projections[layer].register_forward_pre_hook(partial(_by_head, num_heads(model), function))
            stack.callback(handle.remove)
        yield


def num_heads(model: LoadedModel) -> int:
    """Query heads of each layer."""
    return int(model.model.config.num_attention_heads)


@torch.no_grad()
def activations(model: LoadedModel, tokens: torch.Tensor, sites: Sequence[Site]) -> dict[Site, torch.Tensor]:
    """Activations ``[N, T, d]`` at ``sites``, ``BATCH_SIZE`` prompts at a time."""
    seen: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}

    def keep(site: Site, x: torch.Tensor) -> torch.Tensor:
        seen[site].append(x)
        return x

    with transformed(model, {site: partial(keep, site) for site in sites}):
        for part in tokens.split(BATCH_SIZE):
            model.model(part, use_cache=False, logits_to_keep=1)
    return {site: torch.cat(parts) for site, parts in seen.items()}


@torch.no_grad()
def head_outputs(model: LoadedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """z ``[N, T, heads, head_dim]`` of every layer."""
    seen: list[list[torch.Tensor]] = [[] for _ in range(model.n_layers)]

    def keep(layer: int, z: torch.Tensor) -> torch.Tensor:
        seen[layer].append(z)
        return z

    with heads_transformed(model, {layer: partial(keep, layer) for layer in range(model.n_layers)}):
        for part in tokens.split(BATCH_SIZE):
            model.model(part, use_cache=False, logits_to_keep=1)
    return [torch.cat(parts) for parts in seen]


def _by_head(heads: int, function: HeadFunction, _module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    z = args[0]
    return (function(z.unflatten(-1, (heads, -1))).flatten(-2), *args[1:])
