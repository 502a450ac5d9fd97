"""Prompt pairs match token by token, and what does not is refused with its place."""

from __future__ import annotations

import json
from itertools import repeat

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steerserve.circuits.prompts import PairText, PromptPairs, Split, TokenPair, fitting, read_pairs, write_pairs
from steerserve.errors import AssetError, InvalidRequestError


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir) -> PreTrainedTokenizerBase:
    """Every byte is a token."""
    return AutoTokenizer.from_pretrained(tiny_model_dir("llama"))


def pair(clean: str = "xaz", corrupted: str = "xbz", correct: str = "1", wrong: str = "2") -> PairText:
    return PairText(clean, corrupted, tuple(correct), tuple(wrong))


def test_positions_of_the_two_prompts_correspond(tokenizer) -> None:
    pairs = PromptPairs.of("t", [TokenPair.of(tokenizer, each) for each in (pair(), pair("abcdz", "abddz", "12", "3"))])
    assert len(pairs) == 2
    assert pairs.clean.dtype == torch.int64
    assert pairs.clean.shape == pairs.corrupted.shape == (2, 5)
    assert pairs.last.tolist() == [2, 4]
    assert [tokenizer.decode(row[: last + 1]) for row, last in zip(pairs.corrupted, pairs.last, strict=True)] == [
        "xbz",
        "abddz",
    ]
    assert pairs.changed.tolist() == [[False, True, False, False, False], [False, False, True, False, False]]
    assert pairs.real.sum(1).tolist() == [3, 5]
    assert [tokenizer.decode(each) for each in pairs.correct[1]] == ["1", "2"]


def test_some_of_the_pairs_without_columns_of_padding(tokenizer) -> None:
    pairs = PromptPairs.of("t", [TokenPair.of(tokenizer, each) for each in (pair("abcdz", "abddz"), pair())])
    taken = pairs.take([1])
    assert taken.clean.shape == (1, 3)
    assert taken.texts == (pair(),)
    assert taken.correct == pairs.correct[1:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (pair("xaaz", "xbz"), r"clean of 4 and corrupted of 3 tokens"),
        (pair("xa", "xb"), r"last tokens.*'a', 'b'"),
        (pair("xaz", "xaz"), r"corrupted.*another prompt"),
        (PairText("xaz", "xbz", ("11",), ("2",)), r"correct.*'11'.*single token"),
        (PairText("xaz", "xbz", ("1",), ()), r"wrong.*at least one"),
        (pair(correct="12", wrong="23"), r"wrong.*\['2'\]"),
        (pair("", ""), r"0 tokens"),
    ],
)
def test_what_does_not_match_is_refused(tokenizer, text, message) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        TokenPair.of(tokenizer, text)


def test_a_file_of_pairs_is_read_as_it_was_written(tokenizer, tmp_path) -> None:
    pairs = PromptPairs.of("mine", [TokenPair.of(tokenizer, each) for each in (pair(), pair("é1z", "é2z", "ab", "c"))])
    write_pairs(tmp_path / "mine.jsonl", pairs)
    again = read_pairs(tmp_path / "mine.jsonl", tokenizer)
    assert (again.name, again.texts, again.correct) == ("mine", pairs.texts, pairs.correct)
    assert again.clean.equal(pairs.clean)


def test_a_file_splits_by_the_clean_text_alone(tokenizer, tmp_path) -> None:
    lines = [json.dumps(pair(f"{i:03}az", f"{i:03}bz").__dict__) + "\n" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
    halves = {
        split: [
            {text.clean for text in read_pairs(tmp_path / f"{name}.jsonl", tokenizer, split).texts} for name in "ab"
        ]
        for split in Split
    }
    assert all(a == b for a, b in halves.values())
    discovery, held_out = (of[0] for of in halves.values())
    assert discovery.isdisjoint(held_out)
    assert len(discovery | held_out) == 60
    assert len(discovery) > len(held_out) > 5


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"clean": "a"}', '{"clean": "a", "corrupted": "b", "correct": "1", "wrong": []}']
)
def test_a_line_of_another_form_is_named(tokenizer, tmp_path, line) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair().__dict__) + "\n" + line + "\n")
    with pytest.raises(AssetError, match=r"pairs\.jsonl:2: expected a JSON object"):
        read_pairs(path, tokenizer)


def test_a_pair_of_unequal_lengths_is_named_by_its_line(tokenizer, tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + json.dumps(pair("xaaz", "xbz").__dict__))
    with pytest.raises(InvalidRequestError, match=r"pairs\.jsonl:2: got 'clean of 4 and corrupted of 3 tokens'"):
        read_pairs(path, tokenizer)


def test_files_without_pairs_are_refused(tokenizer, tmp_path) -> None:
    with pytest.raises(AssetError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AssetError, match="holds no pair"):
        read_pairs(tmp_path / "empty.jsonl", tokenizer)


def test_a_task_drops_what_the_tokenizer_does_not_allow(tokenizer) -> None:
    drawn = [pair("xaaz", "xbz"), pair(), pair(), pair("xaz", "xcz"), pair("yaz", "ybz"), pair("zaz", "zbz")]
    assert [text.clean for text in fitting("t", tokenizer, drawn, 2).texts] == ["xaz", "yaz"]


def test_a_task_with_too_few_prompts_says_how_many_it_has(tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"num_prompts: got 2, expected at most 1"):
        fitting("t", tokenizer, repeat(pair()), 2)
