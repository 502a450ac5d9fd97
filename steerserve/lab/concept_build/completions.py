"""Tokens that complete the words of a concept.

Tokenizers split rare words (``Ġf|uck``), so what completes a listed word depends on the token before;
``Completions`` learns from texts which pairs do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from steerserve.lab.lexicon import Lexicon
from steerserve.models.loading import LoadedModel

MIN_COUNT = 3
MIN_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Completions:
    """Tokens that complete a listed word.

    Attributes:
        alone: ``[V]`` mask of tokens that do so after any token.
        after: those that do so after a given token.
    """

    alone: torch.Tensor
    after: dict[int, list[int]]

    @classmethod
    def learn(cls, model: LoadedModel, texts: Sequence[str], lexicon: Lexicon) -> Completions:
        """Tokens that are listed words; of split ones, the first pair that in ``texts`` mostly belongs to one."""
        seen: Counter[tuple[int, int]] = Counter()
        inside: Counter[tuple[int, int]] = Counter()
        words: set[tuple[int, ...]] = set()
        for text in texts:
            encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded.input_ids
            seen.update(pairwise(ids))
            for start, end in lexicon.spans(text):
                pieces = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < end and start < b]
                words.add(tuple(ids[i] for i in pieces))
                inside.update(pairwise(ids[i] for i in pieces))
        telling = {pair for pair, n in inside.items() if n >= MIN_COUNT and n > MIN_SHARE * seen[pair]}
        alone = torch.zeros(model.vocab_size, dtype=torch.bool)
        alone[[word[0] for word in words if len(word) == 1]] = True
        after: dict[int, list[int]] = {}
        for word in sorted(words):
            first = next((pair for pair in pairwise(word) if pair in telling), None)
            if first is not None and not alone[first[0]] and first[1] not in after.setdefault(first[0], []):
                after[first[0]].append(first[1])
        return cls(alone, after)

    def __bool__(self) -> bool:
        return bool(self.alone.any()) or any(self.after.values())

    def next_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` tokens that would complete a listed word after each of ``tokens`` ``[n]``."""
        mask = self.alone.repeat(len(tokens), 1)
        for row, token in enumerate(tokens.tolist()):
            mask[row, self.after.get(token, [])] = True
        return mask

    def opens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mask like ``tokens``: places whose token begins a word that may become a listed one."""
        return torch.isin(tokens, torch.tensor(sorted(self.after)))

    def completed_next(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` positions whose next token completes a listed word, of right-padded ``tokens`` ``[B, T]``."""
        current, following = tokens[:, :-1], tokens[:, 1:]
        pairs = torch.tensor([(a, b) for a, tokens in self.after.items() for b in tokens], dtype=torch.long).view(-1, 2)
        codes = pairs[:, 0] * len(self.alone) + pairs[:, 1]
        hit = self.alone[following] | torch.isin(current * len(self.alone) + following, codes)
        return F.pad(hit & real[:, 1:], (0, 1))
