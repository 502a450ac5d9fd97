"""Facts of countries: the language spoken there, or the capital; the corrupted prompt asks of another country."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from transformers import PreTrainedTokenizerBase

from steerserve.circuits.prompts import PairText, Split
from steerserve.circuits.tasks.task import Task, part

COUNTRIES = (
    ("France", "French", "Paris"), ("Germany", "German", "Berlin"), ("Italy", "Italian", "Rome"),
    ("Spain", "Spanish", "Madrid"), ("Japan", "Japanese", "Tokyo"), ("Russia", "Russian", "Moscow"),
    ("Portugal", "Portuguese", "Lisbon"), ("Greece", "Greek", "Athens"), ("Turkey", "Turkish", "Ankara"),
    ("Poland", "Polish", "Warsaw"), ("Sweden", "Swedish", "Stockholm"), ("Norway", "Norwegian", "Oslo"),
    ("Denmark", "Danish", "Copenhagen"), ("Finland", "Finnish", "Helsinki"), ("Hungary", "Hungarian", "Budapest"),
    ("Thailand", "Thai", "Bangkok"), ("Vietnam", "Vietnamese", "Hanoi"), ("China", "Chinese", "Beijing"),
    ("Korea", "Korean", "Seoul"), ("Iran", "Persian", "Tehran"), ("Egypt", "Arabic", "Cairo"),
    ("Ukraine", "Ukrainian", "Kiev"), ("Israel", "Hebrew", "Jerusalem"), ("Mexico", "Spanish", "Mexico"),
    ("England", "English", "London"), ("Ireland", "Irish", "Dublin"), ("Scotland", "Gaelic", "Edinburgh"),
    ("Austria", "German", "Vienna"), ("Iraq", "Arabic", "Baghdad"), ("Romania", "Romanian", "Bucharest"),
    ("Bulgaria", "Bulgarian", "Sofia"), ("Serbia", "Serbian", "Belgrade"), ("Croatia", "Croatian", "Zagreb"),
    ("Chile", "Spanish", "Santiago"), ("Peru", "Spanish", "Lima"), ("Cuba", "Spanish", "Havana"),
    ("Brazil", "Portuguese", "Brasilia"), ("Syria", "Arabic", "Damascus"), ("Afghanistan", "Persian", "Kabul"),
    ("Lebanon", "Arabic", "Beirut"), ("Nepal", "Nepali", "Kathmandu"), ("Kenya", "Swahili", "Nairobi"),
)  # fmt: skip
LANGUAGE, CAPITAL = 1, 2
TEMPLATES = (
    ("The language spoken in {country} is", LANGUAGE),
    ("The capital of {country} is the city of", CAPITAL),
    ("In {country}, most people speak the language called", LANGUAGE),
    ("The capital city of {country} is called", CAPITAL),
    ("When she moved to {country}, she had to learn to speak", LANGUAGE),
    ("The government of {country} sits in the city of", CAPITAL),
    ("The official language of {country} is", LANGUAGE),
    ("They flew to the capital of {country}, the city of", CAPITAL),
    ("The people of {country} speak", LANGUAGE),
    ("The embassies in {country} are in its capital,", CAPITAL),
    ("He was born in {country}, so his mother tongue is", LANGUAGE),
    ("The largest museum of {country} is in the capital,", CAPITAL),
)


def draw(_: PreTrainedTokenizerBase, rng: Random, split: Split) -> Iterator[PairText]:
    """The held-out part has countries and templates of its own."""
    countries, templates = part(COUNTRIES, split), part(TEMPLATES, split)
    while True:
        template, asked = rng.choice(templates)
        clean, corrupted = rng.sample(countries, 2)
        yield PairText(
            template.format(country=clean[0]),
            template.format(country=corrupted[0]),
            (f" {clean[asked]}",),
            (f" {corrupted[asked]}",),
        )


CAPITALS = Task("capitals", "logit_difference", draw)
