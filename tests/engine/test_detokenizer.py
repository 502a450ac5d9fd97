"""Text comes out piece by piece, whole characters only, up to a stop string, and adds up."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steerserve.engine.detokenizer import Detokenizer, StopStrings

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


def first_stop(text: str, stop: list[str]) -> tuple[str | None, int, int]:
    """The stop string of a text, its beginning and its end, by trying every end."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return longest, end - len(longest), end
    return None, len(text), len(text)


def may_become(text: str, stop: list[str]) -> int:
    """How many characters at the end of ``text`` begin a stop string."""
    return max(n for n in range(len(text) + 1) if any(string.startswith(text[len(text) - n :]) for string in stop))


stop_lists = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(cut=st.lists(st.text("ab", max_size=4), max_size=12), stop=stop_lists, include=st.booleans())
@example(cut=["aabaaa", "baaac"], stop=["aabaaac"], include=False)  # a beginning within a beginning
def test_the_text_up_to_the_stop_whatever_the_pieces(cut, stop, include) -> None:
    whole = "".join(cut)
    expected, begin, end = first_stop(whole, stop)
    stop_strings = StopStrings(stop, include)
    so_far, shown = "", ""
    for piece in cut:
        so_far += piece
        shown += stop_strings.push(piece)
        if first_stop(so_far, stop)[0] is None:  # nothing is held back longer than it must be
            assert shown == (so_far if include else so_far[: len(so_far) - may_become(so_far, stop)])
    assert shown + stop_strings.finish() == (whole[:end] if include else whole[:begin])
    assert stop_strings.matched == expected
    assert stop_strings.push("more") == "" or expected is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), include=st.booleans())
@pytest.mark.parametrize("name", ["byte_tokenizer", "real_tokenizer"])
def test_a_stop_string_is_found_whatever_the_tokens(name, data, include, request) -> None:
    """The same text in other tokens: it is cut at random places and every part tokenised by itself."""
    tokenizer = request.getfixturevalue(name)
    cuts = sorted({0, len(TEXT), *data.draw(st.lists(st.integers(0, len(TEXT)), max_size=10))})
    begin = data.draw(st.integers(0, len(TEXT) - 1))
    stop = [TEXT[begin : data.draw(st.integers(begin + 1, min(len(TEXT), begin + 8)))]]
    token_ids = [
        token_id for left, right in itertools.pairwise(cuts) for token_id in tokenizer(TEXT[left:right])["input_ids"]
    ]
    stop_strings = StopStrings(stop, include)
    shown = [stop_strings.push(piece) for piece in pieces(tokenizer, [], token_ids)]
    matched, expected_begin, expected_end = first_stop(TEXT, stop)
    assert "".join(shown) == TEXT[: expected_end if include else expected_begin]
    assert stop_strings.matched == matched == stop[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), include=st.booleans(), ends=st.booleans())
@pytest.mark.parametrize("name", ["byte_tokenizer", "real_tokenizer"])
def test_text_goes_on_as_if_nothing_had_been_pushed_ahead(name, data, include, ends, request) -> None:
    """Back to any token, in the middle of a character or of a stop string, and from behind a stop or the end too."""
    tokenizer = request.getfixturevalue(name)
    token_ids = tokenizer(TEXT)["input_ids"]
    begin = data.draw(st.integers(0, len(TEXT) - 1))
    stop = [TEXT[begin : begin + 6], "🙂 c", "no such text"]
    num_kept = data.draw(st.integers(0, len(token_ids)))
    ahead = data.draw(st.lists(st.sampled_from(token_ids), max_size=12)) + token_ids[num_kept : num_kept + 12]
    detokenizer, stop_strings = Detokenizer(tokenizer, token_ids[:2]), StopStrings(stop, include)

    def push(some: list[int]) -> list[str]:
        return [stop_strings.push(detokenizer.push(token_id)) for token_id in some]

    def finish() -> str:
        return stop_strings.push(detokenizer.finish()) + stop_strings.finish()

    expected = [*push(token_ids), finish(), stop_strings.matched]
    detokenizer, stop_strings = Detokenizer(tokenizer, token_ids[:2]), StopStrings(stop, include)
    kept = push(token_ids[:num_kept])
    states = detokenizer.snapshot(), stop_strings.snapshot()
    push(ahead)
    if ends:
        finish()
    detokenizer.restore(states[0])
    stop_strings.restore(states[1])
    assert [*kept, *push(token_ids[num_kept:]), finish(), stop_strings.matched] == expected


def test_text_that_only_began_a_stop_string_is_shown_in_the_end() -> None:
    stop_strings = StopStrings(["END."], include=False)
    assert [stop_strings.push(piece) for piece in ("The E", "N", "D", " is EN")] == ["The ", "", "", "END is "]
    assert stop_strings.finish() == "EN"
    assert stop_strings.matched is None
