"""Which words of a response are not shown: all of a word from its first character on, whichever of its tokens fired.

A word is what stands between white space, so that no way to spell one with dots or stars shows a part of it. A token is
released once its word is closed by a token that can no longer be taken back, or once ``MAX_WORD_TOKENS`` more of the
same word have been read.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from steerserve.types import REDACTED_TEXT

MAX_WORD_TOKENS = 32
"""Tokens of one word that are held back; text without white space is judged through a window of this many."""

_WORD = re.compile(r"\S+")
_OPEN_WORD = re.compile(r"\S*\Z")


class WaitingToken(NamedTuple):
    """A token that was read and can not be taken back.

    Attributes:
        text: what it adds to the response's text.
        num_emitted: how many characters go out with it: of its own, or held back until now for the sake of a stop
            string.
        fires: a detector wants it redacted.
    """

    text: str
    num_emitted: int
    fires: bool


class ShownToken(NamedTuple):
    """What goes out with a token, and whether the token itself is withheld."""

    text: str
    is_withheld: bool


class Redactor:
    """Follows one response, its tokens in their order, as they are released for good."""

    def __init__(self) -> None:
        self._characters: deque[str] = deque()  # as they are shown; of tokens that were released, not yet emitted
        self._hides_word = False  # the last released word is hidden, and so is what follows of it
        self._hides_next = False  # a token fired that has a part in the character to come

    @staticmethod
    def num_closed(waiting: Sequence[WaitingToken]) -> int:
        """How many of the tokens may be released while the response goes on."""
        match = _OPEN_WORD.search("".join(token.text for token in waiting))
        assert match is not None
        closed = sum(end <= match.start() for _, end in _spans(waiting))
        while closed and not waiting[closed - 1].text:  # it belongs to the next token, which stays
            closed -= 1
        return max(closed, len(waiting) - MAX_WORD_TOKENS)

    def release(self, waiting: Sequence[WaitingToken], count: int) -> list[ShownToken]:
        """Release the first ``count`` of the tokens."""
        text, spans = "".join(token.text for token in waiting), _spans(waiting)
        fired = [span for span, token in zip(spans, waiting, strict=True) if token.fires]
        begins_word = not text[:1].isspace()
        goes_on = self._hides_word and begins_word
        hides_first = goes_on or (self._hides_next and begins_word)
        words = [match.span() for match in _WORD.finditer(text)]
        hidden = [word for word in words if _overlaps(word, fired) or (hides_first and word[0] == 0)]
        size = sum(len(token.text) for token in waiting[:count])
        characters = list(text[:size])
        for begin, end in hidden:
            for at in range(begin, min(end, size)):
                characters[at] = REDACTED_TEXT if at == begin and not (goes_on and begin == 0) else ""
        self._characters.extend(characters)
        if size:
            self._hides_word, self._hides_next = any(begin < size <= end for begin, end in hidden), False
        released = list(zip(waiting[:count], spans, strict=False))
        self._hides_next |= any(token.fires and begin >= size for token, (begin, _) in released)
        return [
            ShownToken(
                "".join(self._characters.popleft() for _ in range(token.num_emitted)),
                token.fires or _overlaps(span, hidden),
            )
            for token, span in released
        ]


def _spans(waiting: Sequence[WaitingToken]) -> list[tuple[int, int]]:
    """The characters of each token; one without any has a part in the next."""
    ends = accumulate(len(token.text) for token in waiting)
    return [(end - len(token.text), end + (not token.text)) for end, token in zip(ends, waiting, strict=True)]


def _overlaps(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(span[0] < end and begin < span[1] for begin, end in others)
