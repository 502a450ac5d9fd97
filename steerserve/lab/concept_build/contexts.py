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

from steerserve.lab.concept_build.completions import Completions, TextBatch, tokenize
from steerserve.lab.concept_eval.continuations import continue_prompts
from steerserve.lab.concept_eval.prompts import Prompt
from steerserve.lab.concept_eval.teacher_forced import EarlierLayers, earlier_layers, logits_of, resumed
from steerserve.lab.concept_eval.treatments import Treatment
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
        """Every position of ``texts`` counts."""
        batch = tokenize(model, texts)
        return cls._read(model, batch, batch.real, layer)

    @classmethod
    def on_policy(cls, model: LoadedModel, prompts: Sequence[Prompt], seed: int, layer: int) -> Contexts:
        """One continuation of each prompt, by the engine that serves; only what the model wrote counts."""
        continuations = continue_prompts(model, Treatment.none(model), prompts, [seed], "on-policy texts")
        heads = [len(prompts[c.prompt].token_ids) for c in continuations]
        rows = [torch.tensor([*prompts[c.prompt].token_ids, *c.token_ids]) for c in continuations]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, True, float(model.tokenizer.eos_token_id or 0))
        position = torch.arange(tokens.shape[1])
        real = position < torch.tensor([[len(row)] for row in rows])
        # The last token's next one is as much the model's as those before.
        scored = real & (position >= torch.tensor([[head - 1] for head in heads]))
        return cls._read(model, TextBatch(tokens, real), scored, layer)

    @classmethod
    def _read(cls, model: LoadedModel, batch: TextBatch, scored: torch.Tensor, layer: int) -> Contexts:
        parts = [
            earlier_layers(model, layer, batch.tokens[start : start + BATCH_SIZE])[0].x.clone()
            for start in track(range(0, len(batch.tokens), BATCH_SIZE), "layers before the edits")
        ]
        return cls(batch.tokens, batch.real, scored, layer, torch.cat(parts))

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
        batch = TextBatch(self.tokens, self.real)
        return self.scored & (completions.opens(self.tokens) | completions.completed_next(batch))


def seed_of(texts: Sequence[str]) -> int:
    """A seed that depends on all texts."""
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode()).digest()[:4], "big")


def word_probability(log_probs: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """Σ P(listed token) over rows ``[n, V]``."""
    return log_probs.exp().masked_fill(~listed, 0).sum()
