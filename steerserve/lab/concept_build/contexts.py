"""Texts that features are ranked and operands fitted on, with the layers before the first edit run once.

On-policy contexts count most: continuations that the model itself writes of positive texts are what a
policy will meet, and only there does it matter what the model would write next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track

from steerserve.lab.concept_build.completions import Completions
from steerserve.lab.concept_eval.continuations import continue_prompts
from steerserve.lab.concept_eval.prompts import Prompt
from steerserve.lab.concept_eval.teacher_forced import EarlierLayers, earlier_layers, logits_of, resumed
from steerserve.lab.concept_eval.texts import FITTED_TOKENS
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.tokens import padded, tokenize
from steerserve.models.loading import LoadedModel

BATCH_SIZE = 16


@dataclass(frozen=True, eq=False)
class Contexts:
    """``n`` right-padded rows of tokens.

    Attributes:
        tokens: ``[n, T]``; ``real[n, T]`` which are not padding.
        scored: ``[n, T]`` positions whose next token counts.
        x: ``[n, T, d]`` input of ``layer`` in the model's own precision.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    scored: torch.Tensor
    layer: int
    x: torch.Tensor

    @classmethod
    def of_texts(cls, model: LoadedModel, texts: Sequence[str], layer: int) -> Contexts:
        """Every position of ``texts`` counts, but for a BOS token."""
        batch = tokenize(model, texts, FITTED_TOKENS)
        return cls._read(model, batch.tokens, batch.real, batch.text, layer)

    @classmethod
    def on_policy(cls, model: LoadedModel, prompts: Sequence[Prompt], seed: int, layer: int) -> Contexts:
        """One continuation of each prompt, by the engine that serves; only what the model wrote counts."""
        continuations = continue_prompts(model, Treatment.none(model), prompts, [seed], "on-policy texts", scored=False)
        heads = [len(prompts[c.prompt].token_ids) for c in continuations]
        tokens, real = padded([(*prompts[c.prompt].token_ids, *c.token_ids) for c in continuations])
        # The last token's next one is as much the model's as those before.
        scored = real & (torch.arange(tokens.shape[1]) >= torch.tensor([[head - 1] for head in heads]))
        return cls._read(model, tokens, real, scored, layer)

    @classmethod
    def _read(
        cls, model: LoadedModel, tokens: torch.Tensor, real: torch.Tensor, scored: torch.Tensor, layer: int
    ) -> Contexts:
        parts = [
            earlier_layers(model, layer, tokens[start : start + BATCH_SIZE])[0].x.clone()
            for start in track(range(0, len(tokens), BATCH_SIZE), "layers before the edits")
        ]
        return cls(tokens, real, scored, layer, torch.cat(parts))

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: torch.Tensor) -> Contexts:
        """Some of the rows, without padding that none of them needs."""
        length = int(self.real[index].sum(1).max())
        cut = (column[index, :length] for column in (self.tokens, self.real, self.scored))
        tokens, real, scored = cut
        return Contexts(tokens, real, scored, self.layer, self.x[index, :length])

    def batches(self, size: int = BATCH_SIZE) -> Iterator[Contexts]:
        """All rows, in order."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))))

    def log_probs(self, model: LoadedModel, where: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` next-token log-probabilities at the positions ``where``; edits come from ``transformed``."""
        with resumed(model, EarlierLayers(self.layer, self.x)):
            hidden = model.model.base_model(self.tokens, use_cache=False).last_hidden_state
        return logits_of(model, Treatment.none(model), hidden[where]).log_softmax(-1)

    def places(self, completions: Completions) -> torch.Tensor:
        """``[n, T]`` scored positions where a word of the concept may be completed or is."""
        return self.scored & (completions.opens(self.tokens) | completions.completed_next(self.tokens, self.real))


def seed_of(texts: Sequence[str]) -> int:
    """A seed that depends on all texts."""
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode()).digest()[:4], "big")


def word_probability(log_probs: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """Σ P(listed token) over rows ``[n, V]``."""
    return log_probs.exp().masked_fill(~listed, 0).sum()
