"""Draw the next token of every row; a row's draw depends on its own logits, parameters, tokens and number.

Probabilities are float32; a row is drawn by inverting its cumulative distribution at one uniform number
from the request's own generator, so a seed reproduces a response whatever runs beside it.

The logits processors of transformers compute the same, but for a batch that shares its parameters and its
length (padding would count as a token), and they read every token anew at every step. Here a row keeps
count of its own tokens and touches their logits alone; a row that asks for nothing costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steerserve.errors import InvalidRequestError
from steerserve.types import FloatArray, SamplingParams, TokenLogprobs

TOP_P_CANDIDATES = (64, 1024)
"""Top-p looks at this many of the most likely tokens, then at more, and at all only where their mass falls short."""

SMALLEST_TEMPERATURE = 1e-6
"""Below it a draw is greedy for any logits that float32 tells apart."""

LARGEST_LOGIT = float(np.finfo(np.float32).max)


class LogitEdits:
    """What one request does to its logits before a draw: bias, then penalties, in vLLM's order."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._params = params
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        # The tokens to penalise, each once, in the order they appeared; the arrays have room to grow.
        self._place: dict[int, int] = {}
        self._num_in_prompt = 0
        self._ids = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.float32)  # in the response
        if params.repetition_penalty != 1:
            self._place = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt))}
            self._ids = np.array(list(self._place), dtype=np.int64)
            self._counts = np.zeros(len(self._ids), dtype=np.float32)
            self._num_in_prompt = len(self._ids)

    def count(self, token_id: int) -> None:
        """The response goes on with ``token_id``."""
        if not penalises(self._params):
            return
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            room = place + 64
            self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def uncount(self, token_id: int) -> None:
        """The response goes on from before ``token_id``, the last that was counted and not yet uncounted."""
        if not penalises(self._params):
            return
        place = self._place[token_id]
        self._counts[place] -= 1
        if self._counts[place] == 0 and place >= self._num_in_prompt:
            del self._place[token_id]  # it appeared last, so no other token's place moves

    def apply(self, logits: FloatArray) -> None:
        """Edit one row, ``[vocab]``, in place; what is finite stays finite."""
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if not self._place:
            return
        ids, counts = self._ids[: len(self._place)], self._counts[: len(self._place)]
        params, edited = self._params, logits[ids]
        with np.errstate(over="ignore"):
            edited = np.where(edited > 0, edited / params.repetition_penalty, edited * params.repetition_penalty)
        edited -= params.frequency_penalty * counts
        edited -= params.presence_penalty * (counts > 0)
        logits[ids] = np.clip(edited, -LARGEST_LOGIT, LARGEST_LOGIT)


class RowSampler:
    """How one response is drawn: its parameters, its random numbers and the tokens that count against it.

    Args:
        index: which of the request's ``n`` responses.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], index: int = 0) -> None:
        self.params = params
        self.edits = LogitEdits(params, prompt) if params.logit_bias or penalises(params) else None
        self._bits = np.random.PCG64(None if params.seed is None else params.seed + index)
        self._rng = np.random.Generator(self._bits)

    def draw_uniform(self) -> float:
        """The number that picks the next token; greedy requests draw none."""
        return float(self._rng.random()) if self.params.temperature > 0 else 0.0

    def count(self, token_id: int) -> None:
        """The response goes on with ``token_id``."""
        if self.edits is not None:
            self.edits.count(token_id)

    def rewind(self, token_ids: Sequence[int]) -> None:
        """The last tokens of the response, each drawn and counted, are taken back: what follows draws as they did."""
        if self.params.temperature > 0:
            self._bits.advance(-len(token_ids))  # a draw takes one step
        if self.edits is not None:
            for token_id in reversed(token_ids):
                self.edits.uncount(token_id)


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        InvalidRequestError: names the field.
    """
    named = [(f"sampling.stop_token_ids[{i}]", token_id) for i, token_id in enumerate(params.stop_token_ids)]
    named += [(f"sampling.logit_bias[{token_id}]", token_id) for token_id in params.logit_bias]
    for field, token_id in named:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(field, token_id, f"a token id from 0 to {vocab_size - 1}")


def penalises(params: SamplingParams) -> bool:
    """Tokens that were there before weigh differently from the others."""
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class DrawnToken:
    """The next token of a row, with its log-probabilities if the row asked for them."""

    token_id: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@torch.inference_mode()
def next_tokens(logits: torch.Tensor, rows: Sequence[RowSampler]) -> list[DrawnToken]:
    """The next token of every row.

    Args:
        logits: ``[B, vocab]`` float32 with a finite maximum in every row; overwritten.
    """
    reporting = [row for row, sampler in enumerate(rows) if sampler.params.logprobs is not None]
    untouched = logits[reporting] if reporting else None
    for row, sampler in enumerate(rows):
        if sampler.edits is not None:
            sampler.edits.apply(logits[row].numpy())
    tokens = sample(logits, [sampler.params for sampler in rows], [sampler.draw_uniform() for sampler in rows])
    drawn = [DrawnToken(token) for token in tokens]
    if untouched is not None:
        counts = [rows[row].params.logprobs or 0 for row in reporting]
        for row, entry in zip(reporting, _logprobs(untouched, [tokens[row] for row in reporting], counts), strict=True):
            drawn[row] = DrawnToken(tokens[row], (entry,))
    return drawn


def _logprobs(logits: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens)[:, None])
    ranks = ((logprobs > own).sum(dim=-1) + 1).tolist()
    entries = []
    for row, logprob, rank, count in zip(logprobs, own[:, 0].tolist(), ranks, num_top, strict=True):
        values, ids = row.topk(min(count, len(row)))
        entries.append(TokenLogprobs(logprob, rank, tuple(zip(ids.tolist(), values.tolist(), strict=True))))
    return entries


@torch.inference_mode()
def sample(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Token ids ``[B]``.

    Args:
        logits: ``[B, vocab]`` float32 with a finite maximum in every row; overwritten.
        uniforms: ``[B]`` in [0, 1); not used by greedy rows.
    """
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    if len(drawn) == len(params):
        return _draw_all(logits, params, uniforms)
    tokens: list[int] = logits.numpy().argmax(axis=-1).tolist()
    if drawn:
        chosen = _draw_all(logits[drawn], [params[row] for row in drawn], [uniforms[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return tokens


def _draw_all(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    scale = torch.tensor([max(row.temperature, SMALLEST_TEMPERATURE) for row in params])
    # In place: the logits of a batch are megabytes, and fresh pages cost more than the arithmetic.
    # Centred before they are scaled: a small temperature would overflow large logits to inf − inf.
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(scale[:, None]).exp_()
    for row, row_params in zip(weights, params, strict=True):
        if row_params.min_p > 0:
            row.masked_fill_(row < row_params.min_p, 0)  # the largest weight is 1
    return [
        _draw_filtered(row, row_params.top_k, row_params.top_p, uniform)
        if row_params.top_k or row_params.top_p < 1
        else _draw(_running_sum(row), uniform)
        for row, row_params, uniform in zip(weights, params, uniforms, strict=True)
    ]


def _draw_filtered(weights: torch.Tensor, top_k: int, top_p: float, uniform: float) -> int:
    """Draw among the ``top_k`` largest weights, cut to the fewest that hold ``top_p`` of their sum."""
    if top_k:
        candidates, ids = weights.topk(min(top_k, len(weights)))
        total = float(candidates.sum())
    else:
        total = float(weights.sum())
        candidates, ids = _largest_holding(weights, top_p * total)
    mass = _running_sum(candidates)
    kept = int(np.searchsorted(mass, np.float32(top_p * total), side="left")) + 1
    return int(ids[_draw(mass[:kept], uniform)])


def _largest_holding(weights: torch.Tensor, needed: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Enough of the largest weights to sum to ``needed``, in descending order, and their indices."""
    for count in TOP_P_CANDIDATES:
        candidates, ids = weights.topk(min(count, len(weights)))
        if float(candidates.sum()) >= needed:
            return candidates, ids
    candidates, ids = weights.sort(descending=True)
    return candidates, ids


def _running_sum(weights: torch.Tensor) -> FloatArray:
    mass: FloatArray = torch.cumsum(weights, dim=0, out=weights).numpy()
    return mass


def _draw(mass: FloatArray, uniform: float) -> int:
    """Index whose share of the running sum ``mass[n]`` holds ``uniform``; never one without mass."""
    target = np.float32(uniform * float(mass[-1]))
    last_with_mass = np.searchsorted(mass, mass[-1], side="left")
    return int(min(np.searchsorted(mass, target, side="right"), last_with_mass))
