"""Attention over a paged key-value cache, put into the unmodified models of ``transformers``.

Keys and values lie in blocks of ``block_size`` positions. A row, the slot of a running request, has a line of the
block table that says which block holds which of its positions. A forward pass runs over a flat batch of tokens
``[1, N]`` that belong to any rows in any order; ``row`` and ``position`` say where each one stands. Its key and value
are stored first, then it attends to what its row holds up to its own position. Layers with a sliding window keep all
positions too: they only look at fewer.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from steerserve.errors import IncompatibleError
from steerserve.kernels.attend import AttentionState, attend
from steerserve.models.families import FamilyAdapter

IMPLEMENTATION = "steerserve"
"""Name of the attention function in ``transformers``. A name without a mask function gets no mask."""

ROPE_OF_THE_BATCH = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies follow the longest sequence of the batch."""


class KVStore:
    """The cache of one model, and the shared arguments of its attention layers. Nothing is allocated later.

    Attributes:
        blocks: ``[layers, 2, num_blocks, kv_heads, block_size, head_dim]``, keys then values, in the model's dtype.
        block_table: ``[max_num_seqs, max_blocks]`` int32: the block of every ``block_size`` positions of a row.
        row, position: ``[max_num_batched_tokens]`` int32, of every token of the pass.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        # Written once, so that the memory is there: a full cache must not be what runs the machine out of it.
        self.blocks = torch.zeros(config.num_hidden_layers, 2, num_blocks, kv_heads, block_size, head_dim, dtype=dtype)
        self.block_table = torch.zeros(max_num_seqs, -(-max_model_len // block_size), dtype=torch.int32)
        self.row = torch.zeros(max_num_batched_tokens, dtype=torch.int32)
        self.position = torch.zeros(max_num_batched_tokens, dtype=torch.int32)
        self.states = [
            AttentionState(keys, values, self.block_table, self.row, self.position) for keys, values in self.blocks
        ]

    @property
    def num_bytes(self) -> int:
        """Size of the keys and values."""
        return self.blocks.nbytes

    def close(self) -> None:
        """Give the handles of the layers back; nothing may run on them any more."""
        for state in self.states:
            state.close()


class PagedAttention:
    """A model whose layers attend through a ``KVStore``, until ``remove``."""

    def __init__(self, model: PreTrainedModel, adapter: FamilyAdapter, store: KVStore) -> None:
        """Take the model over.

        Raises:
            IncompatibleError: the model's rotary embedding would make a token depend on its neighbours.
        """
        _refuse_rope_of_the_batch(model.config)
        self._model = model
        self._layers = cast("list[Any]", adapter.attention_layers(model))
        self._implementation = model.config._attn_implementation
        for layer, state in zip(self._layers, store.states, strict=True):
            layer.steerserve_state = state.handle
        model.set_attn_implementation(IMPLEMENTATION)

    def remove(self) -> None:
        """Give the model its own attention back."""
        self._model.set_attn_implementation(self._implementation)
        for layer in self._layers:
            del layer.steerserve_state


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """``[1, heads, N, head_dim]`` as ``transformers`` passes them, to ``[1, N, heads, head_dim]`` as it expects."""
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    out = attend(q, k, v, module.steerserve_state, scaling, softcap or 0.0, sliding_window or 0)
    return out[None], None


def _refuse_rope_of_the_batch(config: PreTrainedConfig) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *parameters.values()):
        kind = each.get("rope_type", "default") if isinstance(each, dict) else "default"
        if any(name in kind for name in ROPE_OF_THE_BATCH):
            expected = "a rotary embedding that does not depend on the longest sequence of a batch"
            raise IncompatibleError("model.rope_type", kind, expected)


AttentionInterface.register(IMPLEMENTATION, _attend)
