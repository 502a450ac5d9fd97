"""The direct path from a direction in the residual stream to the logits.

    logits = (gain ∘ (w − mean w)) W_U        (the mean for LayerNorm alone), then less their mean over the vocabulary

The final norm also divides by the size of the whole residual, so a logit here is right up to a factor that differs
from token to token. Layers in between are skipped and a soft cap on the logits is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import nn

from steerserve.models.loading import LoadedModel

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")
"""What the supported families call the norm before the unembedding."""

DIRECTIONS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class RankedTokens:
    """Of each of n directions k tokens: ``ids`` and ``logits`` ``[n, k]``, the most extreme first."""

    ids: torch.Tensor
    logits: torch.Tensor


class LogitLens:
    """Direct-path logits of directions at any site that writes to the residual stream.

    Attributes:
        W: ``[vocab, d]`` float32: logits are ``direction @ W.T``.
    """

    @torch.inference_mode()
    def __init__(self, model: LoadedModel) -> None:
        norm = _final_norm(model)
        gain = norm.weight if isinstance(norm, nn.LayerNorm) else norm(torch.ones_like(norm.weight))
        unembedding: Any = model.model.get_output_embeddings()
        self.W = unembedding.weight.float() * gain.float()
        if isinstance(norm, nn.LayerNorm):
            self.W -= self.W.mean(1, keepdim=True)
        self.W -= self.W.mean(0)

    @torch.inference_mode()
    def extremes(self, directions: torch.Tensor, k: int) -> tuple[RankedTokens, RankedTokens]:
        """The ``k`` tokens with the largest, and those with the smallest, logits of ``directions`` ``[n, d]``."""
        top, bottom = [], []
        for part in track(directions.split(DIRECTIONS_AT_ONCE), "logit lens"):
            logits = part.float() @ self.W.T
            top.append(logits.topk(k, dim=1))
            bottom.append(logits.topk(k, dim=1, largest=False))
        return _joined(top), _joined(bottom)


def token_texts(model: LoadedModel, ids: list[int]) -> list[str]:
    """The text of each token by itself, its leading space included."""
    tokenizer: Any = model.tokenizer
    texts: list[str] = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    pieces: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return [
        f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text  # SentencePiece drops it
        for text, piece in zip(texts, pieces, strict=True)
    ]


def _final_norm(model: LoadedModel) -> Any:
    return next(module for name, module in model.model.base_model.named_children() if name in FINAL_NORMS)


def _joined(parts: list[torch.return_types.topk]) -> RankedTokens:
    values, indices = zip(*parts, strict=True)
    return RankedTokens(torch.cat(indices), torch.cat(values))
