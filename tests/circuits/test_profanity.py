"""The search for profanity pairs, on a model that follows one rule: after "stupid", "you" is followed by "darn"."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerserve.circuits.prompts import read_pairs, write_pairs
from steerserve.circuits.tasks.profanity import find_pairs
from steerserve.circuits.tasks.swaps import WordSwaps, completions
from steerserve.errors import AssetError

WORDS = (
    "stupid",
    "silly",
    "calm",
    "nice",
    "darn",
    "Darn",
    "DARN",
    "you",
    "are",
    "so",
    "and",
    "they",
    "friend",
    "today",
)
TRIGGERS = ("stupid", "silly")


class RuleModel:
    """A network of one rule, with what a search needs of a ``LoadedModel``; triggers may be needed together."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pressure: dict[str, float]) -> None:
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)
        self._pressure = {self.id(word): value for word, value in pressure.items()}

    def id(self, word: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(f"Ġ{word}"))

    def model(self, tokens: torch.Tensor, use_cache: bool, logits_to_keep: Any = None) -> SimpleNamespace:
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        logits[..., self.id("nice")] = 2
        logits[..., self.id("calm")] = 1
        logits[..., [self.id("Darn"), self.id("DARN")]] = -10
        pressure = torch.zeros(tokens.shape)
        for trigger, value in self._pressure.items():
            pressure += value * (tokens == trigger).cumsum(1).clamp(max=1)
        logits[..., self.id("darn")] = torch.where(tokens == self.id("you"), pressure, -10)
        if isinstance(logits_to_keep, int):
            logits = logits[:, -logits_to_keep:]
        elif logits_to_keep is not None:
            logits = logits[:, logits_to_keep]
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, with and without a space before them."""
    pieces = ["<unk>", *(start + word for word in WORDS for start in ("", "Ġ"))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


ONE = {"stupid": 8.0}
BOTH = {"stupid": 4.0, "silly": 4.0}


def test_the_word_that_brings_it_about_is_swapped_for_the_likeliest(tokenizer) -> None:
    found = find_pairs(RuleModel(tokenizer, ONE), ["they are so stupid and you are nice"], {"darn"}, 5)
    (text,) = found.pairs.texts
    assert text.clean == "they are so stupid and you"
    assert text.corrupted == "they are so nice and you"
    assert set(text.correct) == {" darn", " Darn", " DARN"}
    assert text.wrong[:2] == (" nice", " calm")
    assert set(text.correct).isdisjoint(text.wrong)
    (before, after) = found.probability[0]
    assert before > 0.9
    assert after < before / 10
    assert (found.num_texts, found.num_contexts) == (1, 1)


def test_two_words_are_swapped_where_one_is_not_enough(tokenizer) -> None:
    (text,) = find_pairs(RuleModel(tokenizer, BOTH), ["they are stupid and silly so you are"], {"darn"}, 5).pairs.texts
    assert text.clean == "they are stupid and silly so you"
    assert text.corrupted == "they are nice and nice so you"


def test_one_word_is_not_swapped_with_another_of_no_need(tokenizer) -> None:
    swap = WordSwaps(RuleModel(tokenizer, ONE), {"darn"}).strongest(
        tokenizer("they are stupid and silly so you").input_ids, 10
    )
    assert swap.places == (2,)


def test_controls_are_the_same_swap_as_far_from_an_end_without_profanity(tokenizer) -> None:
    texts = ["they are so stupid and you are nice", "today they are stupid and so nice today", "today so nice and calm"]
    found = find_pairs(RuleModel(tokenizer, ONE), texts, {"darn"}, 5)
    (control,) = found.controls.texts
    assert control.clean == "today they are stupid and so"
    assert control.corrupted == "today they are nice and so"
    assert control.correct == found.pairs.texts[0].correct
    assert found.controls.name == "profanity_controls"
    assert (found.num_texts, found.num_contexts) == (3, 1)


def test_a_text_shorter_than_the_distance_is_no_control(tokenizer) -> None:
    texts = ["they stupid and so are they so and so you", "they are so nice today"]
    found = find_pairs(RuleModel(tokenizer, ONE), texts, {"darn"}, 5)
    assert found.controls is None


def test_what_was_found_can_be_read_again(tokenizer, tmp_path) -> None:
    pairs = find_pairs(RuleModel(tokenizer, ONE), ["they are so stupid and you are nice"], {"darn"}, 5).pairs
    write_pairs(tmp_path / "profanity.jsonl", pairs)
    assert read_pairs(tmp_path / "profanity.jsonl", tokenizer).clean.equal(pairs.clean)


def test_the_search_ends_with_the_pairs_that_are_wanted(tokenizer) -> None:
    texts = (f"{start} are so stupid and you" for start in ["they", "you", "friend", "today"] * 20)
    assert len(find_pairs(RuleModel(tokenizer, ONE), texts, {"darn"}, 2).pairs) == 2


@pytest.mark.parametrize("texts", [[], ["so nice"], ["they are so calm and you are nice"]])
def test_texts_without_a_pair_are_refused(tokenizer, texts) -> None:
    with pytest.raises(AssetError, match=r"no pair in \d texts, of which 0 have a context"):
        find_pairs(RuleModel(tokenizer, ONE), texts, {"darn"}, 5)


def test_a_split_word_is_completed_behind_its_beginning() -> None:
    pieces = {". darn": [0, 1], ". Darn": [0, 2, 3], ". DARN": [0, 4, 5, 6], ". heck": [0, 2, 7]}
    pieces |= {". Heck": [0, 4, 1, 2, 3], ". HECK": [0, 8], ". darned": [0, 1, 9], ". Darned": [0, 2, 3, 9]}
    pieces |= {". DARNED": [0, 4, 9]}

    def tokenizer(texts: list[str], add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[pieces[text] for text in texts])

    found = completions(SimpleNamespace(tokenizer=tokenizer), {"darn", "darned", "heck"})
    assert found == {(): {1, 8}, (2,): {3, 7}, (4, 5): {6}, (4,): {9}}
