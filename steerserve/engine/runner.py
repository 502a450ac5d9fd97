"""One forward pass: the model, its KV cache and the splice, and nothing about requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from steerserve.engine.kv_cache import BatchKVCache, attention_masks
from steerserve.models.loading import LoadedModel
from steerserve.models.splice import SiteWork, Splicer
from steerserve.types import Site

SteeringWork = Mapping[Site, SiteWork]


class ModelRunner:
    """Runs the model over rows of the KV cache.

    At a fixed batch shape a row's result depends on that row alone. The caller keeps the rows in
    use compact (see ``BatchKVCache``).
    """

    def __init__(self, loaded: LoadedModel, max_num_seqs: int, max_model_len: int) -> None:
        self._model = loaded.model
        self._mask_per_layer_type = loaded.adapter.mask_per_layer_type
        self._splicer = Splicer(loaded.model, loaded.adapter)
        self.kv_cache = BatchKVCache(loaded.model.config, max_num_seqs, max_model_len, loaded.model.dtype)

    def prefill(self, token_ids: Sequence[int], row: int, work: SteeringWork) -> torch.Tensor:
        """Feed a whole prompt into an empty row; float32 logits ``[1, vocab]`` at its last position."""
        self.kv_cache.begin_prefill(row, len(token_ids))
        positions = torch.arange(len(token_ids))[None]
        return self._forward(torch.tensor(token_ids)[None], positions, len(token_ids), work)

    def decode(self, token_ids: Sequence[int], positions: Sequence[int], work: SteeringWork) -> torch.Tensor:
        """Feed row r its token at its position; float32 logits ``[B, vocab]``."""
        where = torch.tensor(positions)
        num_keys = self.kv_cache.begin_decode(where)
        return self._forward(torch.tensor(token_ids)[:, None], where[:, None], num_keys, work)

    def _forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, num_keys: int, work: SteeringWork
    ) -> torch.Tensor:
        config = self._model.config
        masks = attention_masks(config, self._mask_per_layer_type, positions, num_keys, self._model.dtype)
        with torch.inference_mode(), self._splicer.applying(work):
            output = self._model(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask=masks,
                past_key_values=self.kv_cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def close(self) -> None:
        """Give the model back without hooks."""
        self._splicer.remove()
