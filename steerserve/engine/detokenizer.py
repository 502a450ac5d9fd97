"""Turn a growing list of token ids into text, piece by piece, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the first new ones, so that a leading space is kept."""

REPLACEMENT = "\ufffd"


class DetokenizerState(NamedTuple):
    """How far a ``Detokenizer`` had come."""

    num_tokens: int
    context_start: int
    num_emitted: int


class Detokenizer:
    """The text of one response; a character is emitted once all of its bytes are there.

    Special tokens have no text. The pieces joined are what decoding everything at once gives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._token_ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        # Decoding starts here: the tokens up to num_emitted have been emitted and are the context of those behind.
        self._context_start = 0
        self._num_emitted = len(self._token_ids)

    def push(self, token_id: int) -> str:
        """Add a token; the text that is now certain."""
        self._token_ids.append(token_id)
        text = self._decode(len(self._token_ids))
        if text.endswith(REPLACEMENT):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is left when no token follows; bytes that make no character become U+FFFD."""
        return self._emit(self._decode(len(self._token_ids)))

    def snapshot(self) -> DetokenizerState:
        """What ``restore`` needs to take back every token pushed from now on."""
        return DetokenizerState(len(self._token_ids), self._context_start, self._num_emitted)

    def restore(self, state: DetokenizerState) -> None:
        """Go back to where an earlier ``snapshot`` was taken."""
        num_tokens, self._context_start, self._num_emitted = state
        del self._token_ids[num_tokens:]

    def _emit(self, text: str) -> str:
        known = self._decode(self._num_emitted)
        if not text.startswith(known):  # a prompt that ends inside a character, which is whole now
            known = known.rstrip(REPLACEMENT)
        if self._num_emitted < len(self._token_ids):
            self._context_start, self._num_emitted = self._num_emitted, len(self._token_ids)
        return text[len(known) :]

    def _decode(self, end: int) -> str:
        token_ids = self._token_ids[self._context_start : end]
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopStringsState(NamedTuple):
    """How far ``StopStrings`` had come; ``num_matched`` is each automaton's."""

    held: str
    matched: str | None
    num_matched: tuple[int, ...]


class StopStrings:
    """Ends a text at the first of some strings, wherever the text is cut into pieces.

    The first is the one that is complete first; of those complete at the same character, the longest. Text
    that may still become a stop string is held back: a reader never sees the beginning of one. With
    ``include`` the stop string is part of the text, so that nothing needs to be held.

    Each string is followed by a Knuth-Morris-Pratt automaton: a character costs the same however long the
    strings are.

    Attributes:
        matched: the string that ended the text.
    """

    def __init__(self, strings: Sequence[str], include: bool) -> None:
        self._automata = [_Automaton(text) for text in sorted(strings, key=len, reverse=True)]
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Add a piece; the text that is now certain."""
        if not self._automata:
            return piece
        if self.matched is not None:
            return ""
        text = self._held + piece
        for end in range(len(self._held) + 1, len(text) + 1):
            complete = [automaton.text for automaton in self._automata if automaton.advance(text[end - 1])]
            if complete:
                self.matched, self._held = complete[0], ""
                return text[: end if self._include else end - len(complete[0])]
        num_held = 0 if self._include else max(automaton.num_matched for automaton in self._automata)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, when no piece follows."""
        held, self._held = self._held, ""
        return held

    def snapshot(self) -> StopStringsState:
        """What ``restore`` needs to take back every piece pushed from now on."""
        return StopStringsState(self._held, self.matched, tuple(automaton.num_matched for automaton in self._automata))

    def restore(self, state: StopStringsState) -> None:
        """Go back to where an earlier ``snapshot`` was taken."""
        self._held, self.matched, num_matched = state
        for automaton, count in zip(self._automata, num_matched, strict=True):
            automaton.num_matched = count


class _Automaton:
    """The longest beginning of ``text`` that the characters so far end with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # _shorter[n]: the longest proper beginning of text[:n] that text[:n] also ends with.
        self._shorter = [0, 0]
        for character in text[1:]:
            shorter = self._shorter[-1]
            while shorter and text[shorter] != character:
                shorter = self._shorter[shorter]
            self._shorter.append(shorter + (text[shorter] == character))

    def advance(self, character: str) -> bool:
        """Take one more character; whether ``text`` is complete with it."""
        while self.num_matched and self.text[self.num_matched] != character:
            self.num_matched = self._shorter[self.num_matched]
        self.num_matched += self.text[self.num_matched] == character
        return self.num_matched == len(self.text)
