"""What a receiver reads where no edge is kept, and what each kept edge adds to that.

A receiver of a circuit reads ``base + Σ over kept edges (output of the source − its ablated output)``. Ablated means:

corrupted   the source's output on the corrupted prompt; ``base`` is the corrupted residual there
zero        nothing; ``base`` is what belongs to no node, the biases of the attention outputs

With all edges this is the clean residual. A norm behind attention (Gemma) makes heads non-additive: the heads of a
layer are summed for each receiver, and the norm is taken of that sum.

Positions before the first token that any pair changes are the same in every circuit under corrupted ablation. They
are left out, but for the keys and values that later positions see. All else here is at the positions from there on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from steerserve.circuits.graph import Receiver
from steerserve.circuits.prompts import PromptPairs
from steerserve.circuits.sliced import Positions, SlicedModel


class Ablation(StrEnum):
    """What a removed edge carries in place of the clean value."""

    CORRUPTED = "corrupted"
    ZERO = "zero"


@dataclass(frozen=True, eq=False)
class Recording:
    """One ordinary pass, ``[1, N, S, ·]`` each.

    Attributes:
        outputs: by source; a head's is its mixture of values, before ``W_O``.
        attention: by layer, the sum of the heads and ``b_O``.
        residuals: by layer what attention reads and what the MLP reads; last, what the logits read.
        memory: by layer keys and values of every key-value head.
    """

    outputs: list[Tensor]
    attention: list[Tensor]
    residuals: list[Tensor]
    memory: list[tuple[list[Tensor], list[Tensor]]]


def record(model: SlicedModel, tokens: Tensor) -> Recording:
    """Run the model on ``tokens`` ``[N, S]``."""
    positions = Positions(torch.arange(tokens.shape[1])[None], tokens.shape[1])
    x = model.embed(tokens)[None]
    run = Recording([x], [], [], [])
    for layer in model.layers:
        normed = layer.attn_norm(x)
        keys = [positions.rotate(layer.rope, layer.k(head, normed)) for head in range(len(layer.k.W))]
        values = [layer.v(head, normed) for head in range(len(layer.v.W))]
        attention = layer.constant.expand_as(x)
        for head in range(model.n_heads):
            q = positions.rotate(layer.rope, layer.q(head, normed))
            z = layer.attend(q, keys[head // model.group_size], values[head // model.group_size], positions)
            attention = attention + z @ layer.W_O[head]
            run.outputs.append(z)
        after = x + layer.to_stream(attention)
        run.attention.append(attention)
        run.memory.append((keys, values))
        run.residuals.extend((x, x if model.parallel else after))
        run.outputs.append(layer.mlp(run.residuals[-1]))
        x = after + run.outputs[-1]
    run.residuals.append(x)
    return run


class Baseline:
    """The prompts of a run, ablated in one way.

    Attributes:
        first: the first position at which anything can differ.
        everywhere, last: the positions from there on, and the one of each prompt whose next token counts.
        clean: by source, its clean output less its ablated one.
        ablated: by source, None under zero ablation.
        attention: by layer, ablated, before a norm.
        clean_logits: ``[N, V]`` of the whole model.
    """

    @torch.no_grad()
    def __init__(self, model: SlicedModel, pairs: PromptPairs, ablation: Ablation) -> None:
        self.model = model
        self.ablation = ablation
        self.num_prompts, length = pairs.clean.shape
        self._pairs = pairs
        self._last = pairs.last
        self.first = _first_change(pairs) if ablation is Ablation.CORRUPTED else 0
        self.everywhere = Positions(torch.arange(self.first, length)[None], length)
        self.last = Positions(pairs.last[:, None], length)
        run = record(model, pairs.clean)
        outputs = [self._cut(x) for x in run.outputs]
        self.ablated: list[Tensor] | None = None
        if ablation is Ablation.CORRUPTED:
            corrupted = record(model, pairs.corrupted)
            self.ablated = [self._cut(x) for x in corrupted.outputs]
            outputs = [x - y for x, y in zip(outputs, self.ablated, strict=True)]
            self.attention = [self._cut(x) for x in corrupted.attention]
            self._base = [self._cut(x) for x in corrupted.residuals]
        else:
            self.attention = [layer.constant.expand_as(outputs[0]) for layer in model.layers]
            self._base = self._constants()
        self.clean = outputs
        self.clean_logits = model.logits(self._at_last(run.residuals[-1], self._last))[0, :, 0]
        self._prefix = [[[x[:, :, : self.first].contiguous() for x in xs] for xs in kv] for kv in run.memory]

    def base(self, receiver: Receiver) -> Tensor:
        """``[1, N, P, d_model]``: what it reads with no edge."""
        return self._base[2 * receiver.layer + (not receiver.parts and receiver.layer < len(self.model.layers))]

    @cached_property
    def cfg(self) -> dict[str, str | int]:
        """Model, prompts and ablation, as JSON values: equal for equal baselines."""
        ids = torch.cat((self._pairs.clean, self._pairs.corrupted, self._pairs.last[:, None]), 1)
        return {
            "model": self.model.name,
            "model_fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "task": self._pairs.name,
            "num_prompts": self.num_prompts,
            "prompts_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
            "ablation": self.ablation.value,
        }

    @cached_property
    def attention_in_stream(self) -> list[Tensor]:
        """By layer, what ablated attention adds to the residual."""
        return [layer.to_stream(x) for layer, x in zip(self.model.layers, self.attention, strict=True)]

    def at_last(self, x: Tensor) -> Tensor:
        """``[rows, N, 1, ·]``: the last position, if ``x`` does not hold it alone."""
        return x if x.shape[2] == 1 else self._at_last(x, self._last - self.first)

    def with_prefix(self, kind: Literal["k", "v"], layer: int, head: int, x: Tensor) -> Tensor:
        """Keys or values of one head with those of the positions before ``first`` in front."""
        if self.first == 0:
            return x
        prefix = self._prefix[layer][kind == "v"][head]
        return torch.cat((prefix.expand(len(x), -1, -1, -1), x), 2)

    def _cut(self, x: Tensor) -> Tensor:
        return x[:, :, self.first :].contiguous()

    def _at_last(self, x: Tensor, last: Tensor) -> Tensor:
        return x[:, torch.arange(len(last)), last].unsqueeze(2)

    def _constants(self) -> list[Tensor]:
        x = torch.zeros_like(self.attention[0])
        base = []
        for layer, attention in zip(self.model.layers, self.attention, strict=True):
            after = x + layer.to_stream(attention)
            base += [x, x if self.model.parallel else after]
            x = after
        return [*base, x]


def _first_change(pairs: PromptPairs) -> int:
    """The first position that any pair changes, and no later than the first whose next token counts."""
    columns = pairs.changed.any(0)
    first = int(columns.int().argmax()) if columns.any() else columns.numel()
    return min(first, int(pairs.last.min()))
