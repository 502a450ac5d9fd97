"""Which positions of which texts a question is asked of, and what each text is for; see ``trial`` for the protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from steerserve.circuits.monitoring.reads import MAX_TOKENS, Reads
from steerserve.circuits.prompts import Split as PairSplit
from steerserve.errors import InvalidRequestError
from steerserve.lab.corpus import Document
from steerserve.lab.corpus import Split as TextSplit
from steerserve.lab.lexicon import Lexicon
from steerserve.models.loading import LoadedModel

MAX_PER_KIND = 1400
FIRST_AHEAD = 2
"""The first token, from 0, that is asked what comes next."""

Bools = npt.NDArray[np.bool_]


class Use(StrEnum):
    """What a text is for."""

    FIT = "fit"
    TUNE = "tune"
    TEST = "test"

    @classmethod
    def of(cls, text: str) -> Use:
        """Follows from the text alone; no prompt pair that a circuit is found on comes from a text for testing."""
        if PairSplit.of(text) is PairSplit.HELD_OUT:
            return cls.TEST
        return cls.FIT if TextSplit.of(text) is TextSplit.TRAIN else cls.TUNE


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Different texts, with what each shows and is for.

    Attributes:
        label: ``[n]`` True for those that show the behaviour; ``use`` ``[n]``.
    """

    texts: tuple[str, ...]
    label: Bools
    use: tuple[Use, ...]

    @classmethod
    def choose(cls, documents: Iterable[Document], positive: Collection[str], max_per_kind: int) -> LabelledTexts:
        """Of every use as many of either kind as there are of the rarer one, at most ``max_per_kind``.

        Args:
            positive: labels that show the behaviour; all others do not.

        Raises:
            InvalidRequestError: some use has texts of one kind alone.
        """
        label_of = {each.text: each.label in positive for each in documents}
        ordered = sorted(label_of, key=lambda text: hashlib.sha256(text.encode()).digest()[::-1])
        chosen: list[str] = []
        for use in Use:
            kinds = [[t for t in ordered if Use.of(t) is use and label_of[t] is kind] for kind in (True, False)]
            size = min(max_per_kind, *map(len, kinds))
            if size == 0:
                found = f"{len(kinds[0])} with {', '.join(sorted(positive))} and {len(kinds[1])} without to {use}"
                raise InvalidRequestError("texts", found, "some of either kind")
            chosen += [text for kind in kinds for text in kind[:size]]
        return cls(tuple(chosen), np.array([label_of[text] for text in chosen]), tuple(map(Use.of, chosen)))


@dataclass(frozen=True, eq=False)
class Examples:
    """The positions of one question, and what texts they are of.

    Attributes:
        positions: ``[M]`` rows of the reads.
        text: ``[M]`` number of each one's text.
        label: ``[n]`` of every text; ``fit``, ``tune``, ``test`` ``[n]`` which have positions, and for what.
    """

    positions: npt.NDArray[np.int64]
    text: npt.NDArray[np.int64]
    label: Bools
    fit: Bools
    tune: Bools
    test: Bools

    @classmethod
    def of_texts(cls, reads: Reads, texts: LabelledTexts) -> Examples:
        """All ordinary positions."""
        return cls._of(reads, texts, reads.ordinary)

    @classmethod
    def ahead(cls, model: LoadedModel, reads: Reads, texts: LabelledTexts, words: Lexicon) -> Examples:
        """One position a text: the one before a listed word, or in texts without any one as far from the start.

        Raises:
            InvalidRequestError: no text has a listed word that is late enough.
        """
        ends = _before_listed(model, texts.texts, words)
        late = [(i, end) for i, end in enumerate(ends) if texts.label[i] and end is not None and end >= FIRST_AHEAD]
        at = dict(late)
        if not at:
            raise InvalidRequestError("words", len(words.forms), "words that texts of the behaviour hold")
        distances = np.array([end for _, end in late])
        longest = np.zeros(len(texts.texts), np.int64)
        np.maximum.at(longest, reads.text, reads.position)
        rng = np.random.default_rng(0)
        for i, end in enumerate(ends):
            fitting = distances[distances < longest[i]]  # a word follows there
            if not texts.label[i] and end is None and len(fitting):
                at[i] = int(rng.choice(fitting))
        wanted = np.array([at.get(i, -1) for i in range(len(texts.texts))])
        return cls._of(reads, texts, reads.ordinary & (reads.position == wanted[reads.text]))

    @classmethod
    def _of(cls, reads: Reads, texts: LabelledTexts, keep: Bools) -> Examples:
        positions = np.flatnonzero(keep)
        text = reads.text[positions].astype(np.int64)
        seen = np.bincount(text, minlength=len(texts.texts)) > 0
        uses = np.array(texts.use)
        fit, tune, test = (seen & (uses == use) for use in Use)
        return cls(positions, text, texts.label, fit, tune, test)

    def counts(self) -> dict[str, dict[str, int]]:
        """By use, how many texts show the behaviour and how many do not."""
        return {
            name: {"positive": int((mask & self.label).sum()), "negative": int((mask & ~self.label).sum())}
            for name, mask in (("fit", self.fit), ("tune", self.tune), ("test", self.test))
        }


def _before_listed(model: LoadedModel, texts: Sequence[str], words: Lexicon) -> list[int | None]:
    """Of each text the token before the first listed word, −1 if it begins with one; None without a listed word."""
    tokenizer: Any = model.tokenizer
    found: list[int | None] = []
    for text in texts:
        spans = words.spans(text)
        if not spans:
            found.append(None)
            continue
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping[:MAX_TOKENS]
        first = next((i for i, (_, end) in enumerate(offsets) if end > spans[0][0]), None)
        found.append(-1 if first is None else first - 1)
    return found
