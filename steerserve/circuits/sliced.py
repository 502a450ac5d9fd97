"""A model's layers as functions of separate inputs: each head's query, key and value, each MLP, the logits.

Hooks on the modelling code cannot give every head an input of its own. Here the weights are sliced by head, and every
receiver's input goes through the layer's own norm. The bias of the attention output belongs to no head: it is a
constant of the stream. Weights are views of the loaded model's; MLPs, embedding and rotary tables are its modules.

Activations are ``[rows, N, P, ·]``: rows run different circuits, on N prompts, at P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerserve.circuits.graph import KV, Graph

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Position ids ``[M, P]`` to cosines and sines ``[M, P, rotary dims]``."""


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm, or layer norm where ``centered``, in the dtype of its input."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.centered:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@dataclass(frozen=True, eq=False)
class Projection:
    """``[heads, d_model, d_head]`` and its bias ``[heads, d_head]``; ``norm`` is taken of each head's result."""

    W: Tensor
    b: Tensor | None = None
    norm: Norm | None = None

    def __call__(self, head: int, x: Tensor) -> Tensor:
        y = x @ self.W[head]
        if self.b is not None:
            y += self.b[head]
        return y if self.norm is None else self.norm(y)


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer.

    Attributes:
        W_O: ``[heads, d_head, d_model]``.
        b_O: ``[d_model]``.
        window: positions that a query sees, itself included; None: all before it.
        post_attn_norm: of the sum of the heads (Gemma), else None.
    """

    attn_norm: Norm
    q: Projection
    k: Projection
    v: Projection
    W_O: Tensor
    b_O: Tensor | None  # noqa: N815
    scaling: float
    softcap: float | None
    window: int | None
    rope: Rope | None
    post_attn_norm: Norm | None
    mlp_norm: Norm
    mlp_module: nn.Module
    post_mlp_norm: Norm | None

    @property
    def constant(self) -> Tensor:
        """``[d_model]``: what attention writes without any head, ``b_O`` or nothing."""
        return self.mlp_norm.weight.new_zeros(self.W_O.shape[-1]) if self.b_O is None else self.b_O

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """One head's mixture of values ``[rows, N, P, d_head]``; ``q`` at ``positions``, ``k`` and ``v`` at all."""
        scores = (q * self.scaling) @ k.mT
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        scores = scores.masked_fill(positions.hidden(self.window), -torch.inf)
        return scores.softmax(-1) @ v

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds to the residual, from the residual ``x``."""
        out: Tensor = self.mlp_module(self.mlp_norm(x))
        return out if self.post_mlp_norm is None else self.post_mlp_norm(out)

    def to_stream(self, attention: Tensor) -> Tensor:
        """What attention adds to the residual, from the sum of its heads and ``b_O``."""
        return attention if self.post_attn_norm is None else self.post_attn_norm(attention)


class Positions:
    """Some positions of every prompt: their ids ``[1 or N, P]`` among ``length``, and what attention needs of them."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids = ids
        self.length = length
        self._ropes: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._hidden: dict[int | None, Tensor] = {}

    def rotate(self, rope: Rope | None, x: Tensor) -> Tensor:
        """Rotary embedding of the first dims of ``x`` ``[..., 1 or N, P, d_head]``; halves rotate into each other."""
        if rope is None:
            return x
        if rope not in self._ropes:
            self._ropes[rope] = rope(self.ids)
        cos, sin = self._ropes[rope]
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)

    def hidden(self, window: int | None) -> Tensor:
        """``[1 or N, P, length]``: keys that a query does not see."""
        if window not in self._hidden:
            distance = self.ids[..., None] - torch.arange(self.length, device=self.ids.device)
            self._hidden[window] = (distance < 0) | (distance >= (window or self.length))
        return self._hidden[window]


@dataclass(frozen=True, eq=False)
class SlicedModel:
    """A decoder as functions of its receivers' inputs.

    Attributes:
        name, fingerprint: of the loaded model.
        position_embedding: of absolute positions (GPT-2), else None.
        parallel: attention and MLP of a layer read the same residual.
        d_mlp: width of an MLP's hidden layer.
    """

    name: str
    fingerprint: str
    token_embedding: nn.Module
    position_embedding: nn.Module | None
    layers: tuple[Layer, ...]
    final_norm: Norm
    unembed: nn.Module
    logit_softcap: float | None
    parallel: bool
    d_mlp: int

    @property
    def n_heads(self) -> int:
        return len(self.layers[0].W_O)

    @property
    def group_size(self) -> int:
        """Query heads that share a key and a value."""
        return self.n_heads // len(self.layers[0].k.W)

    def graph(self, split: bool = True, kv: KV = "grouped") -> Graph:
        """The model's nodes and edges."""
        kv_heads = self.n_heads // self.group_size
        return Graph(len(self.layers), self.n_heads, kv_heads, self.parallel, split, kv)

    @property
    def d_model(self) -> int:
        return self.layers[0].W_O.shape[-1]

    @property
    def d_head(self) -> int:
        return self.layers[0].W_O.shape[1]

    @property
    def vocab_size(self) -> int:
        return int(self.unembed.weight.shape[0])  # type: ignore[index]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].W_O.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """``[N, S]`` token ids to ``[N, S, d_model]``."""
        x: Tensor = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.shape[-1], device=tokens.device))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """``[..., V]`` from the last residual ``[..., d_model]``."""
        logits: Tensor = self.unembed(self.final_norm(x))
        cap = self.logit_softcap
        return logits if cap is None else cap * (logits / cap).tanh()
