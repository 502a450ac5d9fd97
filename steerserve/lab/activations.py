"""Activations of texts at chosen sites of a model.

The first position of a context and separator tokens carry *massive activations* (in SmolLM2 a norm of
24,000 beside a median of 150) that are an attention sink, not a feature. A row is not ordinary when its
norm exceeds ``MASSIVE_NORM_RATIO`` times the median of its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

import torch

from steerserve.errors import IncompatibleError
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

MASSIVE_NORM_RATIO = 8.0


CHARACTERS_AT_ONCE = 2**18
"""A tokenizer spreads the texts of one call over the processor's cores; they are held in memory."""


def pack_contexts(model: LoadedModel, texts: Iterable[str], context_length: int) -> Iterator[torch.Tensor]:
    """Tokenise ``texts``, join them by the end-of-sequence token, yield full contexts ``[context_length]`` int32.

    Raises:
        IncompatibleError: the tokenizer has no end-of-sequence token.
    """
    separator = model.tokenizer.eos_token_id
    if separator is None:
        raise IncompatibleError("tokenizer.eos_token", None, "an end-of-sequence token, which separates the texts")
    pending: list[int] = []
    for batch in _batched(texts):
        for token_ids in model.tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
            pending += [*token_ids, separator]
        full = len(pending) // context_length * context_length
        yield from torch.tensor(pending[:full], dtype=torch.int32).view(-1, context_length)
        del pending[:full]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


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


def ordinary_rows(rows: torch.Tensor) -> torch.Tensor:
    """Mask ``[B, T]`` of the rows ``[B, T, d]`` that carry no massive activation."""
    norms = rows.float().norm(dim=-1)
    keep: torch.Tensor = norms <= MASSIVE_NORM_RATIO * norms.median()
    keep[:, 0] = False
    return keep


class _AllCapturedError(Exception):
    """Ends a forward pass early."""
