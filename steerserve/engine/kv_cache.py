"""Keys and values of the running requests, one row a request.

Rows 0..B−1 are the running batch: a finished row is filled by moving the last one into it. Every
row has its own length; a decode step writes each row at its own position and attends to a view cut
at the longest, rounded up, so that the shapes the model sees change rarely.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

LENGTH_STEP = 64
"""Attention views are cut at a multiple of this many positions."""


class BatchKVCache(Cache):
    """A preallocated cache ``[2, layers, rows, kv_heads, positions, head_dim]``.

    Zero where nothing was written: a masked position still enters the attention product, and a
    stale NaN there would survive the mask.
    """

    def __init__(self, config: PreTrainedConfig, num_rows: int, max_len: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        heads = config.num_attention_heads
        self._num_kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._capacity = _rounded_up(max_len)
        shape = (2, config.num_hidden_layers, num_rows, self._num_kv_heads, self._capacity, head_dim)
        self._store = torch.zeros(shape, dtype=dtype)
        self._lengths = [0] * num_rows
        self._flat = self._store.view(2, config.num_hidden_layers, -1, head_dim)
        self._prefill_row: int | None = None
        self._decode_index = torch.empty(0, dtype=torch.long)
        self._decode_shape = (0, 0)

    def begin_prefill(self, row: int, num_tokens: int) -> None:
        """The next forward pass writes positions 0..num_tokens−1 of an empty row."""
        assert self._lengths[row] == 0
        self._prefill_row = row
        self._lengths[row] = num_tokens

    def begin_decode(self, positions: torch.Tensor) -> int:
        """The next forward pass writes row r at ``positions[r]``, ``[B]``.

        Returns:
            Number of key positions every row attends over; those past its own are to be masked.
        """
        self._prefill_row = None
        num_rows = len(positions)
        self._lengths[:num_rows] = (positions + 1).tolist()
        length = _rounded_up(max(self._lengths[:num_rows]))
        heads = torch.arange(num_rows * self._num_kv_heads).view(num_rows, self._num_kv_heads)
        self._decode_index = (heads * self._capacity + positions[:, None]).view(-1)
        self._decode_shape = (num_rows, length)
        return length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, kv_heads, T, head_dim]`` and return what the layer attends to."""
        if self._prefill_row is not None:
            self._store[0, layer_idx, self._prefill_row, :, : key_states.shape[2]] = key_states[0]
            self._store[1, layer_idx, self._prefill_row, :, : key_states.shape[2]] = value_states[0]
            return key_states, value_states
        num_rows, length = self._decode_shape
        for side, states in enumerate((key_states, value_states)):
            self._flat[side, layer_idx].index_copy_(0, self._decode_index, states.reshape(-1, states.shape[-1]))
        layer = self._store[:, layer_idx, :num_rows, :, :length]
        return layer[0], layer[1]

    def free_row(self, row: int, last_row: int) -> None:
        """Empty ``row``; ``last_row``, the last in use, takes its place."""
        if row != last_row:
            length = max(self._lengths[row], self._lengths[last_row])
            self._store[:, :, row, :, :length] = self._store[:, :, last_row, :, :length]
            self._lengths[row] = self._lengths[last_row]
        self._store[:, :, last_row, :, : self._lengths[last_row]] = 0
        self._lengths[last_row] = 0


def attention_masks(
    config: PreTrainedConfig, per_layer_type: bool, positions: torch.Tensor, num_keys: int, dtype: torch.dtype
) -> torch.Tensor | Mapping[str, torch.Tensor]:
    """Additive masks ``[B, 1, Q, num_keys]`` for queries at ``positions[B, Q]`` of their own rows.

    One mask, or one for each layer type of the model; a sliding layer sees its last
    ``sliding_window`` positions only.
    """
    key = torch.arange(num_keys)
    distance = positions[:, None, :, None] - key
    causal = distance >= 0
    if not per_layer_type:
        return _additive(causal, dtype)
    seen = {"full_attention": causal}
    if "sliding_attention" in config.layer_types:
        seen["sliding_attention"] = causal & (distance < config.sliding_window)
    return {layer_type: _additive(visible, dtype) for layer_type, visible in seen.items()}


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # The lowest finite number, as eager attention in transformers adds it to real scores.
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def _rounded_up(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP
