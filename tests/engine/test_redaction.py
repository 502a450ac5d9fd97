"""What of a text is hidden, against a mask of the whole; and whole responses from the engine."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from engine_runs import drive
from guard_oracle import ASLEEP, BASE, GREEDY, LETTERS, PROMPT, SAMPLED, Oracle, activations_behind, fires_at, guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steerserve.engine.redaction import MAX_WORD_TOKENS, Redactor, ShownToken, WaitingToken
from steerserve.types import (
    REDACTED_TEXT,
    REDACTED_TOKEN_ID,
    FinishReason,
    Guard,
    GuardAction,
    Phase,
    Rewind,
    SamplingParams,
    SteeringSpec,
)


def released(tokens: list[WaitingToken], ends: list[int]) -> list[list[ShownToken]]:
    """Settle ``ends`` tokens one after another, then end the response."""
    redactor, shown, done = Redactor(), [], 0
    for end in ends:
        waiting = tokens[done:end]
        shown.append(redactor.release(waiting, redactor.num_closed(waiting)))
        done += len(shown[-1])
    return [*shown, redactor.release(tokens[done:], len(tokens) - done)]


@st.composite
def responses(draw: st.DrawFn) -> tuple[list[WaitingToken], list[int]]:
    """Tokens of which some have no text, some more than a word, some fire; text may lag behind as for stop strings."""
    texts = draw(st.lists(st.text(" \nab.", max_size=4), max_size=20))
    fires = draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    lags = draw(st.lists(st.integers(0, 3), min_size=len(texts), max_size=len(texts)))
    tokens, total, emitted = [], 0, 0
    for index, (text, fire, lag) in enumerate(zip(texts, fires, lags, strict=True)):
        total += len(text)
        upto = total if index == len(texts) - 1 else max(emitted, total - lag)
        tokens.append(WaitingToken(text, upto - emitted, fire))
        emitted = upto
    return tokens, sorted(draw(st.lists(st.integers(0, len(texts)), max_size=20)))


BYTE, WHOLE = WaitingToken("", 0, False), WaitingToken("a a", 3, False)


@example(([BYTE, BYTE._replace(fires=True), WHOLE], [3]))
@example(([BYTE._replace(fires=True), BYTE, WHOLE], [1, 2, 3]))
@settings(max_examples=500, deadline=None, derandomize=True)
@given(responses())
def test_every_word_that_a_firing_token_touches_is_hidden_whole(response) -> None:
    tokens, ends = response
    text, masked, start = "".join(token.text for token in tokens), [], 0
    spans = []
    for token in tokens:
        spans.append((start, start + max(len(token.text), 1)))
        start += len(token.text)
    words = [match.span() for match in re.finditer(r"\S+", text)]
    fired = [span for span, token in zip(spans, tokens, strict=True) if token.fires]
    hidden = [word for word in words if any(word[0] < end and begin < word[1] for begin, end in fired)]
    position = 0
    for begin, end in hidden:
        masked.append(text[position:begin] + REDACTED_TEXT)
        position = end
    shown = released(tokens, ends)
    assert "".join(token.text for step in shown for token in step) == "".join([*masked, text[position:]])
    withheld = [token.is_withheld for step in shown for token in step]
    assert withheld == [
        token.fires or any(begin < word[1] and word[0] < end for word in hidden)
        for token, (begin, end) in zip(tokens, spans, strict=True)
    ]
    # A token is out only once its word has ended among those that were settled then.
    done = 0
    for end, step in zip(ends, shown, strict=False):
        done += len(step)
        settled = "".join(token.text for token in tokens[:end])
        open_word = len(settled) - len(re.search(r"\S*\Z", settled)[0])
        assert all(span[1] <= open_word for span in spans[:done])


def test_text_without_white_space_is_judged_through_a_window() -> None:
    count = 3 * MAX_WORD_TOKENS
    tokens = [WaitingToken("x", 1, index == 2 * MAX_WORD_TOKENS) for index in range(count)]
    shown = [token for step in released(tokens, list(range(count))) for token in step]
    text = "".join(token.text for token in shown)
    assert text == "x" * MAX_WORD_TOKENS + REDACTED_TEXT
    assert [token.is_withheld for token in shown] == [index >= MAX_WORD_TOKENS for index in range(count)]


@pytest.mark.parametrize("text", ["ab", " ab", ""])
def test_what_fires_without_text_hides_the_word_that_its_character_begins(text) -> None:
    """However long the character takes to come."""
    tokens = [BYTE._replace(fires=True), *[BYTE] * 2 * MAX_WORD_TOKENS, WaitingToken(text, len(text), False)]
    shown = [token for step in released(tokens, list(range(len(tokens)))) for token in step]
    assert "".join(token.text for token in shown) == text.replace("ab", "ab" if text == " ab" else REDACTED_TEXT)
    assert shown[0].is_withheld


@pytest.fixture
def oracle(load_tiny, sae) -> Oracle:
    return Oracle(load_tiny(), sae)


def words_of(oracle: Oracle, **rest: object) -> SamplingParams:
    """Draws tokens of one character each, some of which are spaces."""
    (space,) = oracle.model.tokenizer(" ")["input_ids"]
    return replace(SAMPLED, max_tokens=40, logit_bias=LETTERS | {space: 2.5}, logprobs=2, **rest)


def redacting(x: np.ndarray, position: int, **rest: object) -> Guard:
    return fires_at(x, position, GuardAction.REDACT, **{"phase": Phase.GENERATED} | rest)


@pytest.mark.parametrize("stop", [(), ("Zq Z", "q")])
@pytest.mark.parametrize("index", [0, 9, 20, 39])
def test_a_word_is_hidden_with_its_tokens_and_the_rest_is_as_it_was(index, stop, oracle, load_tiny, make_engine):
    sampling = words_of(oracle, stop=stop)
    unguarded = guarded(ASLEEP, sampling)
    plain = drive(make_engine(load_tiny()), [replace(unguarded, steering=SteeringSpec(BASE))])["r", 0]
    x = activations_behind(oracle, guarded(ASLEEP, sampling))
    at = min(index, len(plain.token_ids) - 1)
    guard = redacting(x, len(PROMPT) + at)
    result = drive(make_engine(load_tiny()), [guarded(guard, sampling)])["r", 0]
    events = [event.position - len(PROMPT) for event in result.guard_events]
    assert at in events
    assert {event.action for event in result.guard_events} == {GuardAction.REDACT}
    characters = [oracle.model.tokenizer.decode([token]) for token in plain.token_ids]
    words = [match.span() for match in re.finditer(r"\S+", "".join(characters))]
    hidden = {i for word in words if any(i in range(*word) for i in events) for i in range(*word)} | set(events)
    assert len({len(character) for character in characters}) == 1
    assert len(words) > 2
    expected = [REDACTED_TOKEN_ID if i in hidden else token for i, token in enumerate(plain.token_ids)]
    assert list(result.token_ids) == expected
    masked = re.sub("\0+", REDACTED_TEXT, "".join(
        "\0" if i in hidden and not c.isspace() else c for i, c in enumerate(characters)
    ))  # fmt: skip
    assert result.text == masked[: len(result.text)]
    assert bool(plain.stop_reason) or result.text == masked
    assert [entry.rank == 0 for entry in result.logprobs] == [i in hidden for i in range(len(expected))]
    assert all(entry == plain.logprobs[i] for i, entry in enumerate(result.logprobs) if i not in hidden)
    assert result.receipt.num_redacted_tokens == len(hidden)
    assert (result.finish_reason, result.stop_reason) == (plain.finish_reason, plain.stop_reason)


def test_nothing_of_the_prompt_is_redacted(oracle, load_tiny, make_engine) -> None:
    x = activations_behind(oracle, guarded(ASLEEP))
    result = drive(make_engine(load_tiny()), [guarded(fires_at(x, 7, GuardAction.REDACT, phase=Phase.PROMPT))])["r", 0]
    assert {event.action for event in result.guard_events} == {GuardAction.FLAG}
    assert REDACTED_TOKEN_ID not in result.token_ids
    assert result.finish_reason is FinishReason.LENGTH


def test_what_a_rewind_could_not_help_may_be_redacted(oracle, load_tiny, make_engine) -> None:
    """One guard that always fires: after its one retry, every token of the response is hidden."""
    vector = ASLEEP.target
    again = Rewind(2, (BASE[0],), otherwise=GuardAction.REDACT)
    guard = Guard(vector, -1e6, GuardAction.REWIND, again, phase=Phase.GENERATED)
    result = drive(make_engine(load_tiny()), [guarded(guard, GREEDY)])["r", 0]
    actions = [event.action for event in result.guard_events]
    assert actions[0] is GuardAction.REWIND
    assert set(actions[1:]) == {GuardAction.REDACT}
    assert set(result.token_ids) == {REDACTED_TOKEN_ID}
    assert len(result.token_ids) == result.receipt.num_redacted_tokens == 16
    assert set(result.text.split()) <= {REDACTED_TEXT}
