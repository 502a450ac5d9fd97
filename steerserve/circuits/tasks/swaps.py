"""Words of a context swapped for others that the model finds likely there, so that listed words no longer follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from steerserve.circuits.forward import BATCH_SIZE, all_last_logits
from steerserve.circuits.prompts import PairText, TokenPair, added_tokens
from steerserve.errors import InvalidRequestError
from steerserve.models.loading import LoadedModel

MIN_TOKENS, MAX_TOKENS = 5, 24
WINDOW = 12
"""Words before the last that may be swapped."""
LONGEST_BEGINNING = 2
"""Tokens of a listed word before the one that completes it."""
NUM_OTHERS = 10
"""Answers that are wrong."""
LEADING = 4
"""Swaps that are tried two by two, those that do most by themselves."""

Choice = Sequence[tuple[int, int]]
"""Places, and the tokens to put there."""


@dataclass(frozen=True, eq=False)
class ReadText:
    """The tokens of a text and, after each, the probability of a listed word."""

    ids: list[int]
    probability: list[float]

    @property
    def likeliest_end(self) -> int:
        """The position, of those with enough tokens before, after which a listed word is likeliest."""
        return max(range(MIN_TOKENS - 1, len(self.ids)), key=self.probability.__getitem__)


@dataclass(frozen=True)
class Swap:
    """``context``, and the same with other words at ``places``; the probability of a listed word after both."""

    context: list[int]
    swapped: list[int]
    places: tuple[int, ...]
    probability: tuple[float, float]


class WordSwaps:
    """What is asked of a model about listed words."""

    def __init__(self, model: LoadedModel, words: Iterable[str]) -> None:
        """``words`` are in lower case; each counts in three spellings."""
        self._model = model
        words = set(words)
        self._completions = completions(model, words)
        pieces = [piece or "" for piece in model.tokenizer.convert_ids_to_tokens(list(range(model.vocab_size)))]
        self._starts_word = torch.tensor([piece[:1] in ("Ġ", "▁") for piece in pieces])
        self._goes_on = torch.tensor([piece[:1].isalpha() for piece in pieces]) & ~self._starts_word
        word = [piece[1:] for piece in pieces]
        neutral = [len(each) > 1 and each.isalpha() and each.islower() and each not in words for each in word]
        self._neutral = torch.tensor(neutral) & self._starts_word

    @torch.no_grad()
    def read(self, texts: Iterable[str]) -> Iterator[ReadText]:
        """The texts that are long enough, cut at ``MAX_TOKENS``."""
        encoded = (self._model.tokenizer(text).input_ids[:MAX_TOKENS] for text in texts)
        long_enough = (ids for ids in encoded if len(ids) >= MIN_TOKENS)
        while batch := list(islice(long_enough, BATCH_SIZE)):
            tokens = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)
            p = self._model.model(tokens, use_cache=False).logits.softmax(-1)
            for ids, rows in zip(batch, p, strict=True):
                answers = [self.answers(ids[: end + 1]) for end in range(len(ids))]
                yield ReadText(ids, [row[of].sum().item() for row, of in zip(rows, answers, strict=False)])

    @torch.no_grad()
    def strongest(self, context: list[int], min_fall: float) -> Swap | None:
        """The word, or if one is not enough the two words, whose swap lowers the probability most.

        Each is swapped for the likeliest at its place. None if the probability does not fall ``min_fall`` times.
        """
        answers, singles = self.answers(context), [(each,) for each in self._alternatives(context)]
        before, *after = self._after(answers, [context, *(with_words(context, single) for single in singles)])
        leading = [single for _, single in sorted(zip(after, singles, strict=True))[:LEADING]]
        for choices in (leading[:1], [one + other for one, other in combinations(leading, 2)]):
            after = self._after(answers, [with_words(context, choice) for choice in choices])
            value, choice = min(zip(after, choices, strict=True), default=(before, ()))
            if value * min_fall <= before:
                return Swap(context, with_words(context, choice), tuple(place for place, _ in choice), (before, value))
        return None

    @torch.no_grad()
    def pair(self, context: Sequence[int], swapped: Sequence[int]) -> TokenPair | None:
        """The two as a pair; None if their texts have other tokens, or are no pair.

        Right are the tokens that complete a listed word, wrong the others that are likeliest after ``swapped``.
        """
        tokenizer: Any = self._model.tokenizer
        clean, corrupted = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (context, swapped))
        listed = self.answers(context)
        logits = self._model.model(torch.tensor([swapped]), use_cache=False, logits_to_keep=1).logits[0, -1]
        logits[listed] = -torch.inf
        correct, wrong = (
            _as_answers(tokenizer, clean, ids) for ids in (listed, logits.topk(NUM_OTHERS).indices.tolist())
        )
        try:
            pair = TokenPair.of(tokenizer, PairText(clean, corrupted, correct, wrong))
        except InvalidRequestError:
            return None
        return pair if (pair.clean, pair.corrupted) == (tuple(context), tuple(swapped)) else None

    def answers(self, context: Sequence[int]) -> list[int]:
        """The tokens that complete a listed word behind ``context``."""
        ends = (tuple(context[len(context) - size :]) for size in range(LONGEST_BEGINNING + 1))
        return sorted({token for end in ends for token in self._completions.get(end, ())})

    def swappable(self, ids: Sequence[int], place: int) -> bool:
        """Whether a whole word of one token stands at ``place``, neither first nor last."""
        return 0 < place < len(ids) - 1 and bool(self._starts_word[ids[place]] and not self._goes_on[ids[place + 1]])

    def _alternatives(self, context: list[int]) -> list[tuple[int, int]]:
        """The likeliest word that is not listed, at the places of the last ``WINDOW`` whole words."""
        places = [place for place in range(len(context)) if self.swappable(context, place)][-WINDOW:]
        logits = self._model.model(torch.tensor([context]), use_cache=False).logits[0]
        found = []
        for place in places:
            allowed = self._neutral.clone()
            allowed[context[place]] = False
            found.append((place, int(logits[place - 1].where(allowed, -torch.inf).argmax())))
        return found

    def _after(self, answers: list[int], contexts: list[list[int]]) -> list[float]:
        """The probability of the answers after each of some contexts of one length."""
        if not contexts:
            return []
        tokens = torch.tensor(contexts)
        logits = all_last_logits(self._model, tokens, torch.full((len(tokens),), tokens.shape[1] - 1))
        return [float(value) for value in logits.softmax(-1)[:, answers].sum(-1)]


def completions(model: LoadedModel, words: Iterable[str]) -> dict[tuple[int, ...], set[int]]:
    """By the tokens that a listed word begins with, those that complete it; by none, those that are one by themselves.

    Words of more than ``LONGEST_BEGINNING`` + 1 tokens are left out, and those that go on from another listed word.
    """
    spellings = sorted({spelling for word in words for spelling in (word, word.capitalize(), word.upper())})
    found: dict[tuple[int, ...], set[int]] = {}
    behind = model.tokenizer([f". {word}" for word in spellings], add_special_tokens=False).input_ids
    for _, *beginning, token in behind:
        if len(beginning) <= LONGEST_BEGINNING:
            found.setdefault(tuple(beginning), set()).add(token)
    return {start: ends for start, ends in found.items() if not (start and start[-1] in found.get(start[:-1], ()))}


def _as_answers(tokenizer: Any, prompt: str, ids: Sequence[int]) -> tuple[str, ...]:
    """The texts of tokens, of those that are the same tokens behind the prompt."""
    texts = tokenizer.batch_decode([[token] for token in ids])
    added = added_tokens(tokenizer, prompt, texts)
    return tuple(text for text, token, of in zip(texts, ids, added, strict=True) if of == (token,))


def with_words(context: Sequence[int], choice: Choice) -> list[int]:
    """The context with other tokens at some places."""
    swapped = list(context)
    for place, token in choice:
        swapped[place] = token
    return swapped
