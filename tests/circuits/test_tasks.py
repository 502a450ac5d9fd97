"""The built-in tasks, with a tokenizer that has a token for every word."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steerserve.circuits.metrics import METRICS
from steerserve.circuits.prompts import Split
from steerserve.circuits.tasks.capitals import CAPITALS, COUNTRIES
from steerserve.circuits.tasks.greater_than import GREATER_THAN
from steerserve.circuits.tasks.ioi import IOI, NAMES
from steerserve.circuits.tasks.pronouns import FEMALE, MALE, PRONOUNS
from steerserve.circuits.tasks.registry import TASKS
from steerserve.circuits.tasks.repetition import DOCSTRING, INDUCTION
from steerserve.circuits.tasks.task import single_tokens
from steerserve.errors import IncompatibleError, InvalidRequestError

WORDS = "| ?[A-Za-z]+|\\s?[^\\sA-Za-z0-9]|\\s"


def tokenizer_of(pieces: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """One token for each match of ``pieces`` in ``texts``."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class AnyWord:
    """Stands for a tokenizer to which every word and every year is one token."""

    def __call__(self, texts: str | list[str], **_: object) -> object:
        one = isinstance(texts, str)
        ids = [self.split(text) for text in ([texts] if one else texts)]
        return type("Encoding", (), {"input_ids": ids[0] if one else ids})

    def split(self, text: str) -> list[str]:
        return re.findall(r"[0-9]{2}" + WORDS, text)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [
        text
        for task in TASKS.values()
        for split in Split
        for pair in islice(task.draw(AnyWord(), Random(0), split), 600)
        for text in (pair.clean, pair.corrupted, *pair.correct, *pair.wrong)
    ]
    return tokenizer_of("[0-9]{2}" + WORDS, [*texts, *(f"{year:02}" for year in range(100))])


@pytest.mark.parametrize("name", TASKS)
def test_the_pairs_are_different_and_follow_from_the_seed(tokenizer, name) -> None:
    first, again, other = (TASKS[name].generate(tokenizer, 30, seed) for seed in (1, 1, 2))
    assert first.texts == again.texts
    assert first.texts != other.texts
    assert first.name == name
    assert len({text.clean for text in first.texts}) == 30
    assert TASKS[name].metric in METRICS


@pytest.mark.parametrize("name", TASKS)
def test_discovery_never_sees_a_held_out_prompt(tokenizer, name) -> None:
    discovery, held_out = (TASKS[name].generate(tokenizer, 30, split=split) for split in Split)
    prompts = [{text for pair in of.texts for text in (pair.clean, pair.corrupted)} for of in (discovery, held_out)]
    assert prompts[0].isdisjoint(prompts[1])


def test_ioi_asks_for_the_one_who_is_named_once(tokenizer) -> None:
    pairs = IOI.generate(tokenizer, 100)
    abba = 0
    for text in pairs.texts:
        a, b, s = (word for word in re.findall(r"\w+", text.clean) if word in NAMES)
        indirect, subject = text.correct[0].strip(), text.wrong[0].strip()
        assert {a, b} == {indirect, subject}
        assert s == subject
        abba += a == indirect
        others = [word for word in re.findall(r"\w+", text.corrupted) if word in NAMES]
        assert len(set(others)) == 3
        assert set(others).isdisjoint({indirect, subject})
        assert [w for w in text.clean.split() if w.strip(",") not in NAMES] == [
            w for w in text.corrupted.split() if w.strip(",") not in NAMES
        ]
    assert abba == 50


def test_ioi_has_names_of_its_own_in_each_part(tokenizer) -> None:
    discovery, held_out = (
        {name for text in IOI.generate(tokenizer, 100, split=split).texts for name in text.correct} for split in Split
    )
    assert discovery.isdisjoint(held_out)


def test_later_years_are_right_and_earlier_ones_wrong(tokenizer) -> None:
    for text in GREATER_THAN.generate(tokenizer, 50).texts:
        century, year = re.search(r"(\d\d)(\d\d)", text.clean).groups()
        assert text.correct == tuple(f"{later:02}" for later in range(int(year) + 1, 100))
        assert text.wrong == tuple(f"{other:02}" for other in range(int(year) + 1))
        assert text.corrupted == text.clean.replace(f"{century}{year}", f"{century}01")


def test_where_digits_are_tokens_the_ambiguous_one_is_no_answer() -> None:
    texts = [pair.clean for pair in islice(GREATER_THAN.draw(AnyWord(), Random(0), Split.DISCOVERY), 600)]
    digits = tokenizer_of("[0-9]" + WORDS, texts)
    for text in GREATER_THAN.generate(digits, 50).texts:
        tens = int(re.search(r"\d\d(\d)\d", text.clean).group(1))
        later, earlier = set(map(str, range(tens + 1, 10))), set(map(str, range(tens)))
        is_last_of_its_tens = re.search(r"\d\d\d9", text.clean)
        assert set(text.correct) == later
        assert set(text.wrong) == (earlier | {str(tens)} if is_last_of_its_tens else earlier)


def test_capitals_ask_the_same_of_two_countries(tokenizer) -> None:
    facts = {country: set(known) for country, *known in COUNTRIES}
    for text in CAPITALS.generate(tokenizer, 50).texts:
        clean, corrupted = (
            next(country for country in facts if f" {country}" in prompt) for prompt in (text.clean, text.corrupted)
        )
        assert text.clean.replace(clean, corrupted) == text.corrupted
        assert text.correct[0].strip() in facts[clean]
        assert text.wrong[0].strip() in facts[corrupted]


def test_pronouns_go_with_the_name_of_the_prompt(tokenizer) -> None:
    texts = PRONOUNS.generate(tokenizer, 40).texts
    for text in texts:
        names, others = (FEMALE, MALE) if text.correct == (" she",) else (MALE, FEMALE)
        assert {text.correct, text.wrong} == {(" she",), (" he",)}
        assert any(f" {name}" in text.clean for name in names)
        assert any(f" {name}" in text.corrupted for name in others)
    assert 10 < sum(text.correct == (" she",) for text in texts) < 30


def test_induction_repeats_what_followed(tokenizer) -> None:
    for text in INDUCTION.generate(tokenizer, 50).texts:
        words, changed = text.clean.split()[1:], text.corrupted.split()[1:]
        last = words[-1]
        assert words[words.index(last) + 1] == text.correct[0].strip()
        assert changed.index(last) == len(changed) - 1
        assert sum(a != b for a, b in zip(words, changed, strict=True)) == 1


def test_the_docstring_goes_on_with_the_next_parameter(tokenizer) -> None:
    for text in DOCSTRING.generate(tokenizer, 20).texts:
        signature = re.search(r"self, (.*)\)", text.clean).group(1).split(", ")
        documented = re.findall(r":param (\w+):", text.clean)
        assert documented == signature[:2]
        assert text.correct == (f" {signature[2]}",)
        assert text.correct[0] not in text.corrupted
        assert set(text.wrong).isdisjoint(text.correct)


def test_a_tokenizer_without_single_tokens_for_the_words_is_refused(tiny_model_dir) -> None:
    by_bytes = AutoTokenizer.from_pretrained(tiny_model_dir("llama"))
    with pytest.raises(IncompatibleError, match=r"tokenizer.*at least 5 of the words.*it has 0"):
        IOI.generate(by_bytes, 1)
    assert single_tokens(by_bytes, ["a"], at_least=0) == []


def test_a_task_has_an_end(tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"num_prompts: got 1000, expected at most \d+, as many as capitals"):
        CAPITALS.generate(tokenizer, 1000)


def test_a_split_word_is_no_single_token() -> None:
    tokenizer = tokenizer_of(" ?[a-z]| ?[A-Z][a-z]*|\\.", [". Ann", ". bob", " b", "o", "b"])
    assert single_tokens(tokenizer, ["Ann", "bob"]) == ["Ann"]
