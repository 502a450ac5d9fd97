"""Judges: does a text show the concept? Each is a name and a function from texts to a mask.

The primary judge of a card is a word list or a lexicon of sentiment; the second one a classifier that had no
part in making the pack. ``NAMES`` says which there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.lexicon import PROFANITY, Lexicon

Mask = npt.NDArray[np.bool_]

NAMES = "profanity, lexicon:FILE, phrases:FILE, alt-profanity-check, vader-negative or vader-positive"
CLASSIFIER_THRESHOLD = 0.5
VADER_THRESHOLD = 0.05
"""VADER's authors call a text positive or negative from this compound score on."""


@dataclass(frozen=True)
class Judge:
    """``flags(texts)`` is the mask of the texts that show the concept; ``words`` its word list, if it is one."""

    name: str
    flags: Callable[[Sequence[str]], Mask]
    words: Path | None = None


def judge(name: str) -> Judge:
    """The judge of that name.

    Raises:
        InvalidRequestError: no such judge.
        AssetError: its file cannot be read.
    """
    kind, _, file = name.partition(":")
    match kind, file:
        case "profanity", "":
            return _lexicon(name, PROFANITY)
        case "lexicon", str() if file:
            return _lexicon(name, Path(file))
        case "phrases", str() if file:
            return _phrases(name, Path(file))
        case "alt-profanity-check", "":
            return Judge(name, _profanity_classifier)
        case "vader-negative", "":
            return Judge(name, lambda texts: _vader(texts) <= -VADER_THRESHOLD)
        case "vader-positive", "":
            return Judge(name, lambda texts: _vader(texts) >= VADER_THRESHOLD)
    raise InvalidRequestError("judge", name, NAMES)


def _lexicon(name: str, path: Path) -> Judge:
    lexicon = Lexicon.load(path)
    return Judge(name, lambda texts: np.array([lexicon.matches(text) for text in texts], dtype=bool), path)


def _phrases(name: str, path: Path) -> Judge:
    """A phrase per line, matched as whole words whatever their case; both apostrophes are one."""
    try:
        lines = [_plain(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"phrases {path}: cannot read them: {error}") from error
    phrases = [re.escape(line.strip()) for line in lines if line.strip()]
    if not phrases:
        raise AssetError(f"phrases {path}: expected a phrase per line, found none")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)")
    return Judge(name, lambda texts: np.array([pattern.search(_plain(text)) is not None for text in texts], dtype=bool))


def _plain(text: str) -> str:
    return text.lower().replace("’", "'")


def _profanity_classifier(texts: Sequence[str]) -> Mask:
    from profanity_check import predict_prob

    flagged: Mask = np.asarray(predict_prob(list(texts))) >= CLASSIFIER_THRESHOLD
    return flagged


def _vader(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts])
