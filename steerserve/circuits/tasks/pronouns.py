"""Gendered pronouns: the one that goes with a first name; the corrupted prompt has a name of the other gender."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from transformers import PreTrainedTokenizerBase

from steerserve.circuits.prompts import PairText, Split
from steerserve.circuits.tasks.task import Task, part, single_tokens

FEMALE = (
    "Mary", "Lisa", "Anna", "Sarah", "Amy", "Laura", "Julia", "Emma", "Susan", "Jane", "Alice", "Rachel", "Helen",
    "Rebecca", "Emily", "Maria", "Jessica", "Kate", "Jennifer", "Michelle", "Diana", "Barbara", "Margaret", "Elizabeth",
    "Caroline", "Charlotte", "Christina", "Linda", "Nancy", "Victoria",
)  # fmt: skip
MALE = (
    "John", "David", "Mark", "Paul", "Ryan", "Gary", "Jack", "Sean", "Carlos", "Peter", "Robert", "Thomas", "James",
    "Michael", "Andrew", "Brian", "Steven", "George", "Henry", "Frank", "Daniel", "Kevin", "Edward", "Charles",
    "William", "Joseph", "Adam", "Richard", "Simon", "Eric",
)  # fmt: skip
TEMPLATES = (
    "So{name} is a really great friend, isn't",
    "So{name} is such a good cook, isn't",
    "The doctor told{name} that",
    "When{name} woke up this morning,",
    "Everyone likes{name} because",
    "I have not seen{name} since",
    "Before{name} left the house,",
    "If you ask{name} nicely, I am sure that",
    "As a child{name} was often ill, but today",
    "Nobody knew where{name} was, or what",
    "The letter made{name} smile, because",
    "Although{name} was tired,",
)


def draw(tokenizer: PreTrainedTokenizerBase, rng: Random, split: Split) -> Iterator[PairText]:
    """As many female names as male ones, in turn."""
    female, male = (single_tokens(tokenizer, part(names, split), at_least=2) for names in (FEMALE, MALE))
    templates = part(TEMPLATES, split)
    while True:
        template = rng.choice(templates)
        she, he = (template.format(name=f" {rng.choice(names)}") for names in (female, male))
        yield PairText(she, he, (" she",), (" he",))
        she, he = (template.format(name=f" {rng.choice(names)}") for names in (female, male))
        yield PairText(he, she, (" he",), (" she",))


PRONOUNS = Task("pronouns", "logit_difference", draw)
