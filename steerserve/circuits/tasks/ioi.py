"""Indirect object identification (Wang et al. 2022): of two people, who is the one that nothing was yet given by?

The corrupted prompt names three other people, all different (ABC), so that nothing says whose name is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from transformers import PreTrainedTokenizerBase

from steerserve.circuits.prompts import PairText, Split
from steerserve.circuits.tasks.task import Task, part, single_tokens

NAMES = (
    "Aaron", "Adam", "Alan", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anthony", "Arthur", "Ben", "Brian", "Carl",
    "Charles", "Christina", "Daniel", "David", "Dean", "Edward", "Emily", "Eric", "Frank", "George", "Graham", "Grant",
    "Henry", "Jack", "Jacob", "James", "Jane", "Jason", "Jennifer", "Jeremy", "Jessica", "John", "Jonathan", "Joseph",
    "Kate", "Kelly", "Kevin", "Laura", "Lisa", "Luke", "Maria", "Mark", "Martin", "Mary", "Matthew", "Michael",
    "Michelle", "Patrick", "Paul", "Peter", "Rachel", "Richard", "Robert", "Roger", "Ryan", "Sarah", "Scott", "Simon",
    "Stephen", "Steven", "Susan", "Thomas", "Tom", "Tyler", "Victoria", "William",
)  # fmt: skip
PLACES = ("school", "station", "office", "hospital", "church", "restaurant", "shop", "house", "garden", "market")
OBJECTS = ("book", "letter", "ticket", "coat", "key", "camera", "bottle", "map", "phone", "ring", "bag", "gift")
TEMPLATES = (
    "At the {place},{a} and{b} waited for an hour, and then{s} handed a {object} to",
    "When{a} and{b} came to the {place},{s} brought a {object} for",
    "Yesterday{a} and{b} were seen at the {place}, where{s} gave a {object} to",
    "While{a} and{b} talked in the {place},{s} passed a {object} to",
    "Because{a} and{b} both worked at the {place},{s} lent a {object} to",
    "After{a} and{b} had cleaned the {place},{s} decided to give a {object} to",
    "Last week{a} and{b} met near the {place}. On the way back{s} offered a {object} to",
    "Once{a} and{b} had left the {place},{s} sent a {object} to",
    "There was a quarrel between{a} and{b} at the {place}. In the end{s} returned a {object} to",
    "Every day{a} and{b} walked to the {place}, and today{s} showed a {object} to",
    "Long before{a} and{b} opened the {place} together,{s} sold a {object} to",
    "The old friends{a} and{b} found a {object} in the {place}, and{s} gave it to",
)


def draw(tokenizer: PreTrainedTokenizerBase, rng: Random, split: Split) -> Iterator[PairText]:
    """ABBA and BABA in turn: the indirect object is named first, or second."""
    names = single_tokens(tokenizer, part(NAMES, split), at_least=5)
    templates = part(TEMPLATES, split)
    while True:
        for abba in (True, False):
            template, place, item = rng.choice(templates), rng.choice(PLACES), rng.choice(OBJECTS)
            indirect, subject, *others = (f" {name}" for name in rng.sample(names, 5))
            a, b = (indirect, subject) if abba else (subject, indirect)
            clean = template.format(a=a, b=b, s=subject, place=place, object=item)
            a, b, s = others
            corrupted = template.format(a=a, b=b, s=s, place=place, object=item)
            yield PairText(clean, corrupted, (indirect,), (subject,))


IOI = Task("ioi", "logit_difference", draw)
