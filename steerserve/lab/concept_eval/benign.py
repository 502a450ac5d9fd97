"""What a treatment costs where it is not needed: KL, perplexity and accuracy on fixed benign text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import islice

import numpy as np
import torch
from rich.progress import track

from steerserve.errors import AssetError
from steerserve.lab.bootstrap import Draws, Resamples
from steerserve.lab.concept_eval.outcome import Sums
from steerserve.lab.concept_eval.teacher_forced import EarlierLayers, earlier_layers, last_hidden, logits_of
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.tokens import pack_contexts, padded
from steerserve.models.loading import LoadedModel

CONTEXT_LENGTH = 128
BATCH_SIZE = 8


@dataclass(frozen=True, eq=False)
class Reading:
    """A treated model on benign text; arrays ``[num_contexts]``, sums over predicted tokens.

    Attributes:
        kl: KL(untreated ‖ treated) of the next token, in nats.
        nll: of the text's own next token, treated; ``nll_untreated`` as the model is.
        correct, correct_untreated: the likeliest token is the text's own.
        fired: positions that were edited; ``relative_edit`` is Σ |x' − x| / |x| over all.
    """

    tokens: Sums
    kl: Sums
    nll: Sums
    nll_untreated: Sums
    correct: Sums
    correct_untreated: Sums
    fired: Sums
    relative_edit: Sums

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def mean_relative_edit(self) -> float:
        """|x' − x| / |x|, averaged over all positions."""
        return float(self.relative_edit.sum() / self.tokens.sum())

    def perplexity_ratio(self, resamples: Resamples) -> Draws:
        """Treated over untreated."""
        ratio: Draws = np.exp(resamples.ratio(self.nll - self.nll_untreated, self.tokens))
        return ratio


@dataclass(frozen=True, eq=False)
class BenignBatch:
    """``tokens[B, T]``, ``predicted[B, T - 1]`` where the next token is text and not padding, and the plain model."""

    tokens: torch.Tensor
    predicted: torch.Tensor
    earlier: EarlierLayers
    hidden: torch.Tensor


class BenignText:
    """Fixed texts, with what the untreated model makes of them computed once."""

    def __init__(self, model: LoadedModel, rows: Sequence[torch.Tensor], layer: int) -> None:
        """Token rows of any length; treatments edit nothing before ``layer``."""
        self._model = model
        self._batches = [
            self._batch(rows[start : start + BATCH_SIZE], layer)
            for start in track(range(0, len(rows), BATCH_SIZE), "benign text")
        ]

    @classmethod
    def contexts(cls, model: LoadedModel, texts: Sequence[str], max_tokens: int, layer: int) -> BenignText:
        """Texts joined to contexts of ``CONTEXT_LENGTH`` tokens, at most ``max_tokens`` in all.

        Raises:
            AssetError: the texts fill none.
        """
        contexts = list(islice(pack_contexts(model, texts, CONTEXT_LENGTH), max(1, max_tokens // CONTEXT_LENGTH)))
        if not contexts:
            raise AssetError(f"the benign texts fill no context of {CONTEXT_LENGTH} tokens")
        return cls(model, contexts, layer)

    @classmethod
    def sentences(cls, model: LoadedModel, texts: Sequence[str], layer: int) -> BenignText:
        """Each text on its own."""
        rows = [torch.tensor(model.tokenizer(text).input_ids[: 2 * CONTEXT_LENGTH]) for text in texts]
        return cls(model, [row for row in rows if len(row) > 1], layer)

    @cached_property
    def sha256(self) -> str:
        """Of the model and the tokens."""
        digest = sha256(f"{self._model.fingerprint} {self._model.model.dtype}".encode())
        for batch in self._batches:
            digest.update(repr(batch.tokens.tolist()).encode())
        return digest.hexdigest()

    @property
    def num_texts(self) -> int:
        """Contexts or sentences."""
        return sum(len(batch.tokens) for batch in self._batches)

    @property
    def num_tokens(self) -> int:
        """Predicted ones."""
        return sum(int(batch.predicted.sum()) for batch in self._batches)

    def read(self, treatment: Treatment, title: str | None = None) -> Reading:
        """The treated model beside the untreated one; with a ``title`` progress is shown."""
        batches = self._batches if title is None else track(self._batches, title)
        parts = [self._read(treatment, batch) for batch in batches]
        return Reading(*(torch.cat(columns).double().numpy() for columns in zip(*parts, strict=True)))

    def _batch(self, rows: Sequence[torch.Tensor], layer: int) -> BenignBatch:
        tokens, real = padded(rows)
        earlier, hidden = earlier_layers(self._model, layer, tokens)
        return BenignBatch(tokens, real[:, 1:], earlier, hidden)

    @torch.inference_mode()
    def _read(self, treatment: Treatment, batch: BenignBatch) -> tuple[torch.Tensor, ...]:
        hidden, trace = last_hidden(self._model, treatment, batch.tokens, batch.earlier)
        where, target = batch.predicted, batch.tokens[:, 1:][batch.predicted]
        plain = logits_of(self._model, Treatment.none(self._model), batch.hidden[:, :-1][where])
        treated = logits_of(self._model, treatment, hidden[:, :-1][where])
        plain_norm, treated_norm = plain.logsumexp(-1), treated.logsumexp(-1)
        own = target[:, None]
        figures = (
            torch.ones_like(plain_norm),
            _kl(plain, plain_norm, treated, treated_norm),
            treated_norm - treated.gather(1, own)[:, 0],
            plain_norm - plain.gather(1, own)[:, 0],
            treated.argmax(-1) == target,
            plain.argmax(-1) == target,
            (trace.relative_edit[:, :-1] > 0)[where],
            trace.relative_edit[:, :-1][where],
        )
        row = torch.arange(len(where))[:, None].expand_as(where)[where]
        return tuple(torch.zeros(len(where)).index_add_(0, row, figure.float()) for figure in figures)


def _kl(
    plain: torch.Tensor, plain_norm: torch.Tensor, treated: torch.Tensor, treated_norm: torch.Tensor
) -> torch.Tensor:
    """KL ``[n]`` of next-token distributions given as logits ``[n, V]`` and their log-normalisers.

    Where the two agree the terms cancel exactly, so that an edit elsewhere does not add rounding here.
    """
    difference = plain - treated
    return (torch.softmax(plain, -1) * difference).sum(-1) - plain_norm + treated_norm
