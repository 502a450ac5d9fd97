"""What a pack is to be made of: its texts, words, judge and budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.concept_build.contrast import contrast_words
from steerserve.lab.concept_build.strength import Budget
from steerserve.lab.concept_eval.judges import Judge
from steerserve.lab.concept_eval.texts import Corpus, Labels
from steerserve.lab.concept_eval.trial import Direction
from steerserve.lab.corpus import Split
from steerserve.lab.lexicon import Lexicon
from steerserve.steering.packs import Name

MIN_TEXTS = {Split.TRAIN: 20, Split.VALIDATION: 5}
"""Of each kind."""


@dataclass(frozen=True, eq=False)
class Concept:
    """The order for a pack.

    Attributes:
        positive, negative: files of texts that show the concept and of texts that do not.
        words: a word list; None: learned from the contrast of the train texts, where words are needed.
        judge: what decides in validation whether a continuation shows the concept; None: the words.
        chat: texts are user's turns, each rendered by the model's chat template.

    Raises:
        InvalidRequestError: a name that no pack can have.
    """

    name: str
    direction: Direction
    positive: Sequence[Path]
    negative: Sequence[Path]
    budget: Budget
    labels: Labels = field(default_factory=Labels)
    words: Path | None = None
    judge: Judge | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        try:
            TypeAdapter(Name).validate_python(self.name)
        except ValidationError as error:
            expected = "letters, digits, '.', '_' and '-', beginning with a letter or a digit"
            raise InvalidRequestError("name", self.name, expected) from error


@dataclass(frozen=True, eq=False)
class Materials:
    """An order with its texts read.

    Attributes:
        record: what the card says of it.
    """

    concept: Concept
    train: Corpus
    validation: Corpus
    words: Lexicon
    judge: Judge
    record: dict[str, Any]

    @classmethod
    def read(cls, concept: Concept, needs_words: bool) -> Materials:
        """Read the texts and learn the words, if they are needed and no list is given.

        Raises:
            AssetError: as ``Corpus.read``, too few texts of one kind, or no word that tells positive texts.
        """
        train, validation = _texts(concept, Split.TRAIN), _texts(concept, Split.VALIDATION)
        words, origin = _words(concept, train) if needs_words or concept.judge is None else (Lexicon(frozenset()), {})
        judge = concept.judge or Judge("words", lambda texts: np.array([words.matches(t) for t in texts], dtype=bool))
        record = {
            "direction": str(concept.direction),
            "labels": concept.labels.record,
            "texts": {"train": _counted(train), "validation": _counted(validation)},
            "words": origin,
            "judge": judge.name,
            "budget": asdict(concept.budget),
        }
        return cls(concept, train, validation, words, judge, record)


def _texts(concept: Concept, split: Split) -> Corpus:
    corpus = Corpus.read(concept.positive, concept.negative, split, concept.words, concept.labels)
    for kind, paths in (("positive", concept.positive), ("negative", concept.negative)):
        count = len(getattr(corpus, kind))
        if count < MIN_TEXTS[split]:
            files = ", ".join(map(str, paths))
            expected = f"expected at least {MIN_TEXTS[split]}"
            raise AssetError(f"{files}: {count} {kind} texts in the {split} split, {expected}")
    return corpus


def _words(concept: Concept, train: Corpus) -> tuple[Lexicon, dict[str, Any]]:
    """The words that the concept is written with, and where they are from."""
    if concept.words is not None:
        return Lexicon.load(concept.words, "selection"), {"list": concept.words.name}
    learned = contrast_words(train.positive, train.negative)
    return Lexicon(frozenset(word.word for word in learned)), {"learned": [word.word for word in learned]}


def _counted(corpus: Corpus) -> dict[str, Any]:
    """Numbers of texts, and a hash of them all."""
    texts = sorted([*corpus.positive, *corpus.negative])
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {"positive": len(corpus.positive), "negative": len(corpus.negative), "sha256": digest}
