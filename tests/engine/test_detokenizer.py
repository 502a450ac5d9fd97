"""Text comes out piece by piece, whole characters only, and adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steerserve.engine.detokenizer import Detokenizer

TEXT = "naïve 🙂 café — 日本語, and plain English."


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_model_dir) -> PreTrainedTokenizerBase:
    """One token a byte: characters of up to four tokens."""
    return AutoTokenizer.from_pretrained(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def real_tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: list[int], token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("name", ["byte_tokenizer", "real_tokenizer"])
@pytest.mark.parametrize("prompt", ["", "Say:", "日本"])
def test_pieces_are_whole_characters_and_add_up(name, prompt, request) -> None:
    tokenizer = request.getfixturevalue(name)
    out = pieces(tokenizer, tokenizer(prompt)["input_ids"], tokenizer(TEXT)["input_ids"])
    assert "".join(out) == TEXT
    assert not any("\ufffd" in piece for piece in out)
    assert sum(map(bool, out)) > len(TEXT) / 5


def test_a_character_waits_for_its_last_byte(byte_tokenizer) -> None:
    emoji = byte_tokenizer("🙂!")["input_ids"]
    assert pieces(byte_tokenizer, [], emoji) == ["", "", "", "🙂", "!", ""]
    assert pieces(byte_tokenizer, [], emoji[:3]) == ["", "", "", "\ufffd"]


def test_a_prompt_may_end_inside_a_character(byte_tokenizer) -> None:
    token_ids = byte_tokenizer("a🙂b")["input_ids"]
    assert "".join(pieces(byte_tokenizer, token_ids[:3], token_ids[3:])) == "🙂b"


def test_special_tokens_have_no_text(byte_tokenizer) -> None:
    assert pieces(byte_tokenizer, [], [*byte_tokenizer("a")["input_ids"], 256]) == ["a", "", ""]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=24))
def test_any_bytes_add_up_to_decoding_them_at_once(data, byte_tokenizer) -> None:
    byte_of = {byte_tokenizer.convert_tokens_to_ids(c): c for c in byte_tokenizer.get_vocab()}
    token_ids = [sorted(byte_of)[byte] for byte in data]
    whole = byte_tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces(byte_tokenizer, [], token_ids)) == whole
