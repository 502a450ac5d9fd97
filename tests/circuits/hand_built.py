"""Small transformers whose weights are set by hand, so that the edges they use are known.

Norms are the identity to 1e-12: their eps is so large that the input hardly counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from steerserve.circuits.prompts import PromptPairs
from steerserve.circuits.sliced import Layer, Norm, Projection, SlicedModel

SHARP = 60.0
"""A score so much above the others that softmax takes one position alone."""

Reads = dict[int, int]
"""Dimension of the head by dimension of the stream."""


class Function(nn.Module):
    """An MLP given as a function of the stream."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def identity_norm(width: int) -> Norm:
    return Norm(torch.full((width,), 1e9, dtype=torch.float64), None, 1e18, centered=False)


def head(width: int, d_head: int, q: Reads, k: Reads, v: Reads, writes: Reads) -> tuple[Tensor, ...]:
    """Matrices q, k, v ``[width, d_head]`` and O ``[d_head, width]`` of ones where something is read or written."""
    matrices = []
    for reads in (q, k, v):
        matrix = torch.zeros(width, d_head, dtype=torch.float64)
        for of_stream, of_head in reads.items():
            matrix[of_stream, of_head] = 1.0
        matrices.append(matrix)
    out = torch.zeros(d_head, width, dtype=torch.float64)
    for of_head, of_stream in writes.items():
        out[of_head, of_stream] = 1.0
    return (*matrices, out)


def layer(heads: Sequence[tuple[Tensor, ...]], mlp: Callable[[Tensor], Tensor] = torch.zeros_like) -> Layer:
    q, k, v, out = (torch.stack(matrices) for matrices in zip(*heads, strict=True))
    norm = identity_norm(q.shape[1])
    return Layer(
        attn_norm=norm,
        q=Projection(q),
        k=Projection(k),
        v=Projection(v),
        W_O=out,
        b_O=None,
        scaling=SHARP,
        softcap=None,
        window=None,
        rope=None,
        post_attn_norm=None,
        mlp_norm=norm,
        mlp_module=Function(mlp),
        post_mlp_norm=None,
    )


def model(tokens: Tensor, positions: Tensor, layers: Sequence[Layer], unembed: Tensor) -> SlicedModel:
    """From embeddings ``[vocabulary, width]`` and ``[length, width]``, and the unembedding ``[width, answers]``."""
    readout = nn.Linear(*unembed.shape, bias=False, dtype=torch.float64)
    readout.weight.data = unembed.T.contiguous()
    return SlicedModel(
        name="hand-built",
        fingerprint="0" * 64,
        token_embedding=nn.Embedding.from_pretrained(tokens),
        position_embedding=nn.Embedding.from_pretrained(positions),
        layers=tuple(layers),
        final_norm=identity_norm(len(unembed)),
        unembed=readout,
        logit_softcap=None,
        parallel=False,
        d_mlp=1,
    )


def pairs(clean: Sequence[Sequence[int]], corrupted: Sequence[Sequence[int]]) -> PromptPairs:
    """Pairs of one length, judged at the last position."""
    tokens = torch.tensor(clean)
    count, length = tokens.shape
    answers = ((0,),) * count
    return PromptPairs(
        "hand-built", tokens, torch.tensor(corrupted), torch.full((count,), length - 1), answers, answers, ()
    )
