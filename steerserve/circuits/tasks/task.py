"""What a built-in task is, and what those share: single-token words, and parts that discovery never sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from steerserve.circuits.prompts import PairText, PromptPairs, Split, fitting
from steerserve.errors import IncompatibleError

T = TypeVar("T")

Draw = Callable[[PreTrainedTokenizerBase, Random, Split], Iterator[PairText]]
"""Endless pairs of a split, not all different; those that the tokenizer does not allow are dropped later."""


@dataclass(frozen=True)
class Task:
    """A behaviour whose prompts are generated.

    Attributes:
        metric: the key in ``METRICS`` by which it is usually measured.
    """

    name: str
    metric: str
    draw: Draw

    def generate(
        self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0, split: Split = Split.DISCOVERY
    ) -> PromptPairs:
        """``n`` different pairs of a split.

        Raises:
            InvalidRequestError: the task has fewer with this tokenizer.
            IncompatibleError: it splits nearly all of the task's words.
        """
        return fitting(self.name, tokenizer, self.draw(tokenizer, Random(f"{self.name} {seed}"), split), n)


def part(items: Sequence[T], split: Split) -> list[T]:
    """Every third item is held out; the others are for discovery."""
    return [item for i, item in enumerate(items) if (i % 3 == 2) is (split is Split.HELD_OUT)]


def single_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], at_least: int = 1) -> list[str]:
    """The words that are one token behind a space.

    Raises:
        IncompatibleError: fewer than ``at_least`` are.
    """
    behind = [ids[1:] for ids in tokenizer([f". {word}" for word in words], add_special_tokens=False).input_ids]
    single = [word for word, ids in zip(words, behind, strict=True) if len(ids) == 1]
    if len(single) < at_least:
        some = f"{', '.join(words[:3])}, …"
        expected = f"one with single tokens for at least {at_least} of the words {some}; it has {len(single)}"
        raise IncompatibleError("tokenizer", type(tokenizer).__name__, expected)
    return single
