"""Profanity: contexts that it follows, and the words that bring it about swapped for neutral ones.

The pairs are searched for in texts, with the model itself. A clean context ends where the model gives profane words a
probability of ``MIN_PROBABILITY`` or more; in the corrupted one, one or two earlier words are others that the model
finds likely at their place, so that this probability falls ``MIN_FALL`` times or more. Every word is one token for
one, the last stays. Where the tokenizer splits a profane word, the context ends on its beginning, and what counts is
the token that completes it. *Controls* are the same swaps at the same distance from the end of other contexts, which
profanity does not follow: what reacts to those has to do with the words swapped, not with profanity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.progress import track

from steerserve.circuits.prompts import PromptPairs, TokenPair
from steerserve.circuits.tasks.swaps import ReadText, Swap, WordSwaps, with_words
from steerserve.errors import AssetError
from steerserve.models.loading import LoadedModel

NAME = "profanity"
METRIC = "log_odds"
MIN_PROBABILITY, MAX_CONTROL_PROBABILITY = 0.1, 0.01
MIN_FALL = 10.0


@dataclass(frozen=True, eq=False)
class ProfanityPairs:
    """What a search found.

    Attributes:
        pairs, controls: of one kind each; no controls if no other context has a word that was swapped.
        probability: of each pair, P(profane) after the clean and after the corrupted prompt.
        num_texts, num_contexts: texts that were read, and those with a context that profanity follows.
    """

    pairs: PromptPairs
    controls: PromptPairs | None
    probability: tuple[tuple[float, float], ...]
    num_texts: int
    num_contexts: int


def find_pairs(model: LoadedModel, texts: Iterable[str], words: Iterable[str], n: int) -> ProfanityPairs:
    """Search ``texts`` in their order until ``n`` pairs are found, one of a text at most, or there are no more.

    Args:
        words: the profane ones, in lower case.

    Raises:
        AssetError: the texts have no pair.
    """
    swaps = WordSwaps(model, words)
    found: list[tuple[Swap, TokenPair]] = []
    read: list[ReadText] = []
    num_contexts = 0
    for text in track(swaps.read(texts), "texts", total=None):
        read.append(text)
        if text.probability[text.likeliest_end] >= MIN_PROBABILITY:
            num_contexts += 1
            swap = swaps.strongest(text.ids[: text.likeliest_end + 1], MIN_FALL)
            if swap is not None and (pair := swaps.pair(swap.context, swap.swapped)) is not None:
                found.append((swap, pair))
        if len(found) == n:
            break
    if not found:
        raise AssetError(f"no pair in {len(read)} texts, of which {num_contexts} have a context that profanity follows")
    return ProfanityPairs(
        PromptPairs.of(NAME, [pair for _, pair in found]),
        _controls(swaps, [swap for swap, _ in found], read),
        tuple(swap.probability for swap, _ in found),
        len(read),
        num_contexts,
    )


def _controls(swaps: WordSwaps, done: Sequence[Swap], read: Sequence[ReadText]) -> PromptPairs | None:
    """For each swap another text's context, with the same word as far from its end; one text serves one swap."""
    unused = dict(enumerate(read))
    controls = []
    for swap in done:
        place = swap.places[0]
        old, new, distance = swap.context[place], swap.swapped[place], len(swap.context) - 1 - place
        for number, text in unused.items():
            pair = next((swaps.pair(*each) for each in _same_swaps(swaps, text, old, new, distance)), None)
            if pair is not None:
                controls.append(pair)
                del unused[number]
                break
    return PromptPairs.of(f"{NAME}_controls", controls) if controls else None


def _same_swaps(
    swaps: WordSwaps, text: ReadText, old: int, new: int, distance: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts of a text that profanity does not follow, with ``old`` at the distance, and with ``new`` for it."""
    for place in range(len(text.ids) - distance):
        context = text.ids[: place + distance + 1]
        is_unlikely = text.probability[place + distance] <= MAX_CONTROL_PROBABILITY
        if text.ids[place] == old and is_unlikely and swaps.swappable(context, place):
            yield context, with_words(context, [(place, new)])
