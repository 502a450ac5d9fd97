"""Prompts in pairs: a clean one that shows a behaviour, and a corrupted one in which its cause is swapped.

Both have the same number of tokens and end on the same token, so that each position of the one has its counterpart in
the other and the next token is predicted from the same place. Attention is causal: padding at the end is harmless.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from steerserve.errors import AssetError, InvalidRequestError

HELD_OUT_SHARE = 0.3
MAX_IDLE_DRAWS = 1000
"""A task that draws so often without a new prompt has no more."""


class Split(StrEnum):
    """What a circuit is found on, and what is said of it is measured on."""

    DISCOVERY = "discovery"
    HELD_OUT = "held_out"

    @classmethod
    def of(cls, text: str) -> Split:
        """The split of a text that belongs to no template; it follows from the text alone."""
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        return cls.HELD_OUT if bucket < HELD_OUT_SHARE else cls.DISCOVERY


@dataclass(frozen=True)
class PairText:
    """One pair as text.

    Attributes:
        correct: what follows ``clean``; each a single token, written with its leading space.
        wrong: what would follow if the behaviour were absent, as after ``corrupted``.
    """

    clean: str
    corrupted: str
    correct: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class TokenPair:
    """One pair as token ids; ``clean`` and ``corrupted`` are of one length and end on one token."""

    text: PairText
    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    correct: tuple[int, ...]
    wrong: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: PairText, place: str = "pair") -> TokenPair:
        """Tokenise, with the special tokens that the tokenizer puts before a prompt.

        Raises:
            InvalidRequestError: the two do not match, or an answer is no single token; names ``place``.
        """
        clean, corrupted = (tuple(tokenizer(each).input_ids) for each in (text.clean, text.corrupted))
        if len(clean) != len(corrupted) or not clean:
            lengths = f"clean of {len(clean)} and corrupted of {len(corrupted)} tokens"
            raise InvalidRequestError(place, lengths, "two prompts of the same number of tokens, one at least")
        if clean[-1] != corrupted[-1]:
            ends = tuple(tokenizer.convert_ids_to_tokens([clean[-1], corrupted[-1]]))
            raise InvalidRequestError(f"{place}: last tokens", ends, "the same: the answer is predicted from there")
        if clean == corrupted:
            raise InvalidRequestError(f"{place}: corrupted", text.corrupted, "another prompt than the clean one")
        correct = _answers(tokenizer, text.clean, text.correct, f"{place}: correct")
        wrong = _answers(tokenizer, text.clean, text.wrong, f"{place}: wrong")
        if both := set(correct) & set(wrong):
            shared = tokenizer.convert_ids_to_tokens(sorted(both))
            raise InvalidRequestError(f"{place}: wrong", shared, "no answer that is correct too")
        return cls(text, clean, corrupted, correct, wrong)


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """N pairs, padded on the right with token 0 to T positions.

    Attributes:
        name: of the task, or of the file.
        clean, corrupted: ``[N, T]`` int64 token ids.
        last: ``[N]`` int64, the position whose next token counts.
        correct, wrong: of each pair the token ids of either kind of answer, at least one.
        texts: of each pair; empty if the tokens were not made from any.
    """

    name: str
    clean: torch.Tensor
    corrupted: torch.Tensor
    last: torch.Tensor
    correct: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]
    texts: tuple[PairText, ...]

    @classmethod
    def of(cls, name: str, pairs: Iterable[TokenPair]) -> PromptPairs:
        """Put pairs, one at least, into one batch."""
        pairs = tuple(pairs)
        assert pairs, "no pairs"
        return cls(
            name,
            clean=pad_sequence([torch.tensor(pair.clean) for pair in pairs], batch_first=True),
            corrupted=pad_sequence([torch.tensor(pair.corrupted) for pair in pairs], batch_first=True),
            last=torch.tensor([len(pair.clean) - 1 for pair in pairs]),
            correct=tuple(pair.correct for pair in pairs),
            wrong=tuple(pair.wrong for pair in pairs),
            texts=tuple(pair.text for pair in pairs),
        )

    def __len__(self) -> int:
        return len(self.last)

    def take(self, indices: Sequence[int]) -> PromptPairs:
        """The pairs at ``indices``, at least one, without columns that are then padding alone."""
        width = int(self.last[list(indices)].max()) + 1
        return PromptPairs(
            self.name,
            clean=self.clean[list(indices), :width],
            corrupted=self.corrupted[list(indices), :width],
            last=self.last[list(indices)],
            correct=tuple(self.correct[i] for i in indices),
            wrong=tuple(self.wrong[i] for i in indices),
            texts=tuple(self.texts[i] for i in indices) if self.texts else (),
        )

    @property
    def real(self) -> torch.Tensor:
        """``[N, T]`` mask of the positions that are no padding."""
        return torch.arange(self.clean.shape[1]) <= self.last[:, None]

    @property
    def changed(self) -> torch.Tensor:
        """``[N, T]`` mask of the positions at which the two prompts have different tokens."""
        return self.clean != self.corrupted


def added_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens that each answer adds to the prompt; none if its beginning merges with the prompt's end."""
    before, *behind = tokenizer([prompt, *(prompt + answer for answer in answers)]).input_ids
    return [tuple(ids[len(before) :]) if ids[: len(before)] == before else () for ids in behind]


def fitting(name: str, tokenizer: PreTrainedTokenizerBase, drawn: Iterable[PairText], n: int) -> PromptPairs:
    """The first ``n`` different pairs of ``drawn`` that the tokenizer allows; the others are dropped.

    Raises:
        InvalidRequestError: there are not as many.
    """
    pairs: dict[str, TokenPair] = {}
    idle = 0
    for text in drawn:
        idle += 1
        if text.clean not in pairs:
            with suppress(InvalidRequestError):
                pairs[text.clean] = TokenPair.of(tokenizer, text)
                idle = 0
        if len(pairs) == n:
            return PromptPairs.of(name, pairs.values())
        if idle == MAX_IDLE_DRAWS:
            break
    expected = f"at most {len(pairs)}, as many as {name} has with this tokenizer"
    raise InvalidRequestError("num_prompts", n, expected)


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, split: Split | None = None) -> PromptPairs:
    """Pairs from ``.jsonl``: ``{"clean": text, "corrupted": text, "correct": [answer], "wrong": [answer]}``.

    Args:
        split: only the pairs whose clean text belongs to it; None: all.

    Raises:
        AssetError: no such file, a line of another form, or no pair of the split.
        InvalidRequestError: a pair is not one, see ``TokenPair.of``; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"{path} cannot be read: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            pair = TokenPair.of(tokenizer, _pair_text(line, f"{path}:{number}"), f"{path}:{number}")
            if split in (None, Split.of(pair.text.clean)):
                pairs.append(pair)
    if not pairs:
        raise AssetError(f"{path} holds no pair" + (f" that falls into the {split} split" if split else ""))
    return PromptPairs.of(path.stem, pairs)


def write_pairs(path: Path, pairs: PromptPairs) -> None:
    """Write what ``read_pairs`` reads."""
    path.write_text("".join(json.dumps(asdict(text)) + "\n" for text in pairs.texts), encoding="utf-8")


def _pair_text(line: str, place: str) -> PairText:
    try:
        record: Any = json.loads(line)
        texts = [record["clean"], record["corrupted"]]
        answers = [record["correct"], record["wrong"]]
        valid = all(isinstance(of, list) for of in answers) and all(
            isinstance(text, str) for text in (*texts, *answers[0], *answers[1])
        )
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        form = '{"clean": text, "corrupted": text, "correct": [answer, ...], "wrong": [answer, ...]}'
        raise AssetError(f"{place}: expected a JSON object {form}")
    return PairText(texts[0], texts[1], tuple(answers[0]), tuple(answers[1]))


def _answers(tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], place: str) -> tuple[int, ...]:
    if not answers:
        raise InvalidRequestError(place, list(answers), "at least one answer")
    ids = []
    for answer, added in zip(answers, added_tokens(tokenizer, prompt, answers), strict=True):
        if len(added) != 1:
            pieces = tokenizer.convert_ids_to_tokens(list(added)) if added else "merged with the prompt's end"
            raise InvalidRequestError(place, answer, f"a single token behind the prompt; it is {pieces}")
        ids.append(added[0])
    return tuple(dict.fromkeys(ids))
