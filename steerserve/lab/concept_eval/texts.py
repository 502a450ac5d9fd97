"""Texts of one split, by whether they show the concept.

With a word list, what a text says decides, whatever file it is in: ``positive`` texts hold a listed word,
``negative`` ones none, and texts with a held-out lemma are seen on the test split alone. So it does with a judge that
sorts the texts. Without either, the file decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import AssetError
from steerserve.lab.concept_eval.judges import Judge
from steerserve.lab.corpus import Document, Split, read_documents
from steerserve.lab.lexicon import Lexicon

EXCERPT_CHARS = 300
FITTED_TOKENS = 48
"""Of each text, that anything is fitted on."""
READ_TOKENS = 96
"""Of each text, that a detector is tested on."""


@dataclass(frozen=True)
class Labels:
    """Which labels texts of either kind may have; none named: any, or no label at all.

    Attributes:
        judge: sorts all texts, cut to one length, where they have no labels of the concept.
    """

    positive: frozenset[str] = frozenset()
    negative: frozenset[str] = frozenset()
    judge: Judge | None = None

    @property
    def record(self) -> dict[str, object]:
        """What a card says of them."""
        labels: dict[str, object] = {"positive": sorted(self.positive), "negative": sorted(self.negative)}
        return labels if self.judge is None else {**labels, "judge": self.judge.name}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts of one split: ``positive`` show the concept, ``negative`` do not."""

    positive: list[str]
    negative: list[str]

    @classmethod
    def read(
        cls,
        positive: Sequence[Path],
        negative: Sequence[Path],
        split: Split,
        words: Path | None,
        labels: Labels = Labels(),
    ) -> Corpus:
        """Texts of ``split``; those of ``negative`` files are cut, so that both kinds have the length of a message.

        Args:
            words: the concept's word list; None: file and label say of which kind a text is.
            labels: texts with others are left out. With them, one file may hold both kinds.

        Raises:
            AssetError: files that cannot be read, a label that no text has, or no text of one kind.
        """
        showing = [document.text for document in _labelled(positive, split, labels.positive)]
        others = [document.text[:EXCERPT_CHARS] for document in _labelled(negative, split, labels.negative)]
        others = [text for text in others if text.strip()]
        if labels.judge is not None:
            corpus = cls._by_judge([*(text[:EXCERPT_CHARS] for text in showing), *others], labels.judge)
        elif words is not None:
            corpus = cls._by_words(showing, others, split, words)
        else:
            corpus = cls(showing, others)
        for kind, texts in vars(corpus).items():
            if not texts:
                raise AssetError(f"the files hold no {kind} text of the {split} split")
        return corpus

    @classmethod
    def _by_judge(cls, texts: Sequence[str], judge: Judge) -> Corpus:
        unique = list(dict.fromkeys(texts))  # one file may be named as both kinds
        flags = judge.flags(unique)
        return cls(
            positive=[text for text, shows in zip(unique, flags, strict=True) if shows],
            negative=[text for text, shows in zip(unique, flags, strict=True) if not shows],
        )

    @classmethod
    def _by_words(cls, showing: list[str], others: list[str], split: Split, words: Path) -> Corpus:
        listed, held_out = Lexicon.load(words), Lexicon.load(words, "held_out")
        seen = listed if split is Split.TEST else Lexicon.load(words, "selection")
        hidden = held_out if split is not Split.TEST else Lexicon(frozenset())
        return cls(
            positive=[text for text in showing if seen.matches(text) and not hidden.matches(text)],
            negative=[text for text in others + showing if not listed.matches(text)],
        )


def _labelled(paths: Sequence[Path], split: Split, labels: frozenset[str]) -> list[Document]:
    documents = read_documents(paths, split)
    present = {document.label for document in documents}
    missing = sorted(labels - present)
    if missing:
        files = ", ".join(str(path) for path in paths)
        there = ", ".join(sorted(present - {""})) or "none"
        raise AssetError(f"{files}: no text of the {split} split has the label {missing[0]!r}; labels there: {there}")
    return [document for document in documents if not labels or document.label in labels]
