"""Texts as tokens: packed into full contexts, or side by side with padding on the right.

Where a model's tokenizer begins texts with a BOS token, so do contexts and texts here: models trained with it break
down without. It carries no text, and its activation is an attention sink, so that nothing is learned or scored there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from steerserve.errors import IncompatibleError
from steerserve.models.loading import LoadedModel

CHARACTERS_AT_ONCE = 2**18
"""A tokenizer spreads the texts of one call over the processor's cores; they are held in memory."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Right-padded texts ``tokens[B, T]``.

    Attributes:
        real: ``[B, T]`` which positions are not padding.
        text: those of them that are not a BOS token.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    text: torch.Tensor


def padded(rows: Sequence[Sequence[int] | torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as ``tokens[B, T]`` int64, and ``real[B, T]``, which are not padding.

    Padding is token 0 on the right, where causal attention lets no other position see it.
    """
    tokens = pad_sequence([torch.as_tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])


def tokenize(model: LoadedModel, texts: Sequence[str], max_tokens: int) -> TokenBatch:
    """The first ``max_tokens`` of each text, behind a BOS token if the tokenizer adds one."""
    bos = bos_of(model)
    encoded = model.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    tokens, real = padded([[*bos, *ids[:max_tokens]] for ids in encoded])
    return TokenBatch(tokens, real, real & (torch.arange(tokens.shape[1]) >= len(bos)))


def bos_of(model: LoadedModel) -> list[int]:
    """The BOS token, if the tokenizer begins texts with it; else nothing."""
    bos = model.tokenizer.bos_token_id
    return [bos] if bos is not None and model.tokenizer("x").input_ids[0] == bos else []


def pack_contexts(model: LoadedModel, texts: Iterable[str], context_length: int) -> Iterator[torch.Tensor]:
    """Tokenise ``texts``, join them by the end-of-sequence token, yield full contexts ``[context_length]`` int32.

    Each context begins with a BOS token if the tokenizer adds one.

    Raises:
        IncompatibleError: the tokenizer has no end-of-sequence token.
    """
    separator = model.tokenizer.eos_token_id
    if separator is None:
        raise IncompatibleError("tokenizer.eos_token", None, "an end-of-sequence token, which separates the texts")
    bos = torch.tensor(bos_of(model), dtype=torch.int32)
    width = context_length - len(bos)
    pending: list[int] = []
    for batch in _batched(texts):
        for token_ids in model.tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
            pending += [*token_ids, separator]
        full = len(pending) // width * width
        for part in torch.tensor(pending[:full], dtype=torch.int32).view(-1, width):
            yield torch.cat([bos, part])
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
