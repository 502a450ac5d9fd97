"""attend: causal attention of a flat batch of tokens over a paged KV cache.

The maths and the guarantee are in ``csrc/ops.h``. ``attend`` is the operator, ``attend_ref`` the same in plain torch,
``AttentionState`` what a layer keeps between steps.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from steerserve.kernels.backend import define, refuse_gradients
from steerserve.kernels.native import C

_STATES: weakref.WeakValueDictionary[int, AttentionState] = weakref.WeakValueDictionary()
_HANDLES_OFF_CPU = itertools.count(-1, -1)


class AttentionState:
    """The KV cache of one layer, and where the tokens of the running step belong.

    Position p of row r lies in block ``block_table[r, p // block_size]``, at p % block_size. The operator knows a state
    by its ``handle``, an integer, so that a compiled graph has no tensor of it among its inputs. The buffers are
    written in place between steps and may not be resized. A handle is valid until ``close`` or the last reference to
    the state goes; afterwards it is refused.

    Args:
        k_cache: ``[num_blocks, kv_heads, block_size, d_head]`` float32 or bfloat16, contiguous.
        v_cache: like ``k_cache``.
        block_table: ``[R, max_blocks]`` int32, contiguous.
        row: ``[T]`` int32: the row of each token of the step.
        position: ``[T]`` int32.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape, strides or device; the message names it.
    """

    def __init__(self, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, row: Tensor, position: Tensor) -> None:
        self.k_cache, self.v_cache, self.block_table = k_cache, v_cache, block_table
        self.row, self.position = row, position
        if k_cache.is_cpu:
            self.handle = C.open_attention(k_cache, v_cache, block_table, row, position)
        else:
            self.handle = next(_HANDLES_OFF_CPU)
        _STATES[self.handle] = self
        self._finalizer = weakref.finalize(self, _close, self.handle)

    def close(self) -> None:
        """Invalidate the handle. Not while an operator runs on it."""
        self._finalizer()


def attend(q: Tensor, k: Tensor, v: Tensor, state: int, scale: float, softcap: float = 0.0, window: int = 0) -> Tensor:
    """``[N, H, d_head]``, contiguous: write k and v to the cache, then attend to all visible positions of each row.

    Token n of the step belongs to row ``row[n]`` of the state, at ``position[n]``. It sees positions up to its own, of
    the step's own tokens too. On the CPU its bits depend on its q and on the visible part of its row alone: neither on
    how a prompt was cut into steps nor on the other rows or the number of threads. On a GPU this is ``attend_ref``.

    Args:
        q: ``[N, H, d_head]`` of the cache's dtype; tokens and heads may lie apart. H is a multiple of kv_heads:
            consecutive heads share a KV head.
        k: ``[N, kv_heads, d_head]`` likewise.
        v: ``[N, kv_heads, d_head]`` likewise.
        state: the handle of an ``AttentionState``. Its cache is written.
        scale: of the scores.
        softcap: c of ``c · tanh(score / c)``; 0 for none.
        window: how many positions a token sees at most, its own included; 0 for no limit.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape, strides or range, requires grad, or the state is closed; or a row,
            position or block of the state is out of range. The message names it. Nothing is written.
    """
    refuse_gradients(q=q, k=k, v=v)
    result: Tensor = _attend(q, k, v, state, scale, softcap, window)
    return result


def attend_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row: Tensor,
    position: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """``attend`` in torch operators, on any device: the same results within rounding, from the state's tensors."""
    num_tokens, num_heads, d_head = q.shape
    block_size = k_cache.shape[2]
    row, position = row[:num_tokens].long(), position[:num_tokens].long()
    block = block_table[row, position // block_size].long()
    k_cache[block, :, position % block_size] = k
    v_cache[block, :, position % block_size] = v
    out = torch.empty(num_tokens, num_heads, d_head, dtype=q.dtype, device=q.device)
    for each in row.unique():
        tokens = (row == each).nonzero().squeeze(1)
        seen = torch.arange(int(position[tokens].max()) + 1, device=q.device)
        blocks = block_table[each, seen // block_size].long()
        group = num_heads // k_cache.shape[1]
        keys, values = (
            cache[blocks, :, seen % block_size].float().repeat_interleave(group, dim=1) for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("nhd,phd->hnp", q[tokens].float(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = position[tokens][:, None] - seen
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[tokens] = torch.einsum("hnp,phd->nhd", weights, values).to(q.dtype)
    return out


def _close(handle: int) -> None:
    _STATES.pop(handle, None)
    C.close_attention(handle)


def _fake(q: Tensor, k: Tensor, v: Tensor, state: int, scale: float, softcap: float, window: int) -> Tensor:
    return q.new_empty(q.shape)


def _attend_on_cuda(q: Tensor, k: Tensor, v: Tensor, handle: int, scale: float, softcap: float, window: int) -> Tensor:
    state = _STATES.get(handle)
    if state is None:
        raise ValueError(f"state: got {handle}, expected the handle of an open state")
    return attend_ref(
        q, k, v, state.k_cache, state.v_cache, state.block_table, state.row, state.position, scale, softcap, window
    )


_attend = define(
    "attend(Tensor q, Tensor k, Tensor v, int state, float scale, float softcap, int window) -> Tensor",
    fake=_fake,
    on_cuda=_attend_on_cuda,
)
