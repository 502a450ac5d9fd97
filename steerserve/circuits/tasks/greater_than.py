"""Greater-than (Hanna et al. 2023): what lasted from the year 1732 ended in a year of 17 that is later than 32.

The corrupted prompt begins in the year 01 of the century. Where a token holds one digit, the answers are tens digits;
the one that begins later and earlier years alike is no answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from transformers import PreTrainedTokenizerBase

from steerserve.circuits.prompts import PairText, Split, added_tokens
from steerserve.circuits.tasks.task import Task, part

EVENTS = (
    "war", "siege", "strike", "voyage", "trial", "reign", "project", "dispute", "journey", "campaign", "famine",
    "treaty", "expedition", "rebellion", "construction", "occupation", "alliance", "drought", "crusade", "conflict",
    "marriage", "friendship", "partnership", "empire", "truce", "epidemic", "revolt", "blockade", "programme", "study",
)  # fmt: skip
TEMPLATES = (
    "The {event} lasted from the year {first} to the year {century}",
    "The {event} began in {first} and ended in {century}",
    "The {event} went on between the years {first} and {century}",
)
CENTURIES = range(11, 19)


def draw(tokenizer: PreTrainedTokenizerBase, rng: Random, split: Split) -> Iterator[PairText]:
    """The held-out part has events and a template of its own."""
    events, templates = part(EVENTS, split), part(TEMPLATES, split)
    while True:
        century, year = rng.choice(CENTURIES), rng.randint(2, 98)
        template, event = rng.choice(templates), rng.choice(events)
        clean = template.format(event=event, century=century, first=f"{century}{year:02}")
        corrupted = template.format(event=event, century=century, first=f"{century}01")
        endings = _endings(tokenizer, clean)
        late = {endings[later] for later in range(year + 1, 100)} - {""}
        early = {endings[earlier] for earlier in range(year + 1)} - {""}
        yield PairText(clean, corrupted, tuple(sorted(late - early)), tuple(sorted(early - late)))


def _endings(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Of each year from 00 to 99 what one token behind the prompt holds of it: both digits, the first, or nothing."""
    years = [f"{year:02}" for year in range(100)]
    whole = [len(added) == 1 for added in added_tokens(tokenizer, prompt, years)]
    digits = [len(added) == 1 for added in added_tokens(tokenizer, prompt, list("0123456789"))]
    if any(whole):
        return [year if single else "" for year, single in zip(years, whole, strict=True)]
    return [year[0] if digits[int(year[0])] else "" for year in years]


GREATER_THAN = Task("greater_than", "greater_than", draw)
