"""A word list as a judge: which words of a text are profane.

Matching is on whole words of a normalised text: lower case, common letter substitutions undone
(``sh1t``, ``a$$``), letters repeated three times or more reduced (``fuuuuck``), masks of inner letters
(``f**k``, ``b*tch``) matched as wildcards.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from steerserve.errors import AssetError

PROFANITY = Path(__file__).parent.parent / "assets" / "profanity_lexicon.json"
_WORD = re.compile(r"[^\W_][\w@$!*'-]*", re.UNICODE)
_SUBSTITUTIONS = str.maketrans({"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "@": "a", "$": "s", "!": "i"})


@dataclass(frozen=True)
class Lexicon:
    """Word forms, lower case."""

    forms: frozenset[str]

    @classmethod
    def profanity(cls, *parts: str) -> Lexicon:
        """The built-in list; ``parts`` as of ``load``."""
        return cls.load(PROFANITY, *parts)

    @classmethod
    def load(cls, path: Path, *parts: str) -> Lexicon:
        """The word forms of a JSON file ``{"selection": {lemma: [form, ...]}, "held_out": {...}}``.

        ``parts`` from ``selection`` and ``held_out``, both if none is named; ``held_out`` may be missing.

        Raises:
            AssetError: no such file, or another content.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            lemmas = {"held_out": {}, **content}
            chosen = [lemmas[part] for part in parts or ("selection", "held_out")]
            forms = frozenset(form.lower() for part in chosen for forms in part.values() for form in forms)
        except OSError as error:
            raise AssetError(f"word list {path}: cannot read it: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = 'a JSON object {"selection": {lemma: [form, ...]}, "held_out": {lemma: [form, ...]}}'
            raise AssetError(f"word list {path}: expected {expected}: {error!r}") from error
        return cls(forms)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans ``(start, end)`` of the listed words in ``text``."""
        return [match.span() for match in _WORD.finditer(text) if self._listed(match.group())]

    def matches(self, text: str) -> bool:
        """Whether ``text`` holds a listed word."""
        return any(self._listed(match.group()) for match in _WORD.finditer(text))

    def _listed(self, word: str) -> bool:
        plain = word.lower().strip("'-!*").removesuffix("'s")
        if plain in self.forms or not plain:
            return plain in self.forms
        if "*" in word:
            return self._matches_mask(word.lower())
        if plain.isdecimal():
            return False  # the number 455 spells no word
        spelled = plain.translate(_SUBSTITUTIONS)
        candidates = (spelled, re.sub(r"(.)\1{2,}", r"\1\1", spelled), re.sub(r"(.)\1+", r"\1", spelled))
        collapsible = re.search(r"(.)\1{2,}", spelled) is not None
        return any(form in self.forms for form in candidates[: 3 if collapsible else 1])

    def _matches_mask(self, word: str) -> bool:
        letters = word.replace("*", "")
        if len(letters) < 2:
            return False
        mask = re.compile("".join("[a-z]" if c == "*" else re.escape(c) for c in word))
        return any(mask.fullmatch(form) for form in self._maskable)

    @cached_property
    def _maskable(self) -> tuple[str, ...]:
        return tuple(form for form in self.forms if len(form) >= 4)
