"""Turn a growing list of token ids into text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the first new ones, so that a leading space is kept."""

REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one response; a character is emitted once all of its bytes are there.

    Special tokens have no text. The pieces joined are what decoding everything at once gives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pending = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._num_emitted = len(self._pending)

    def push(self, token_id: int) -> str:
        """Add a token; the text that is now certain."""
        self._pending.append(token_id)
        text = self._decode(self._pending)
        if text.endswith(REPLACEMENT):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is left when no token follows; bytes that make no character become U+FFFD."""
        return self._emit(self._decode(self._pending))

    def _emit(self, text: str) -> str:
        known = self._decode(self._pending[: self._num_emitted])
        if not text.startswith(known):  # a prompt that ends inside a character, which is whole now
            known = known.rstrip(REPLACEMENT)
        # Keep the last emitted tokens as context for the next ones, and drop what came before.
        self._pending = self._pending[self._num_emitted :] or self._pending
        self._num_emitted = len(self._pending)
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
