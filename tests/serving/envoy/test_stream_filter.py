"""Whatever way a stream is cut, no word that is to be redacted or blocked gets out, and nothing else is changed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve.serving.envoy.bodies import UnreadableError, parse
from steerserve.serving.envoy.judge import Mark, redacted
from steerserve.serving.envoy.stream_filter import StreamFilter
from steerserve.types import REDACTED_TEXT, GuardAction, VerdictKind

ACTIONS = {"wind": GuardAction.FLAG, "rain": GuardAction.REDACT, "storm": GuardAction.BLOCK}
WORDS = ["calm", "sun", "é", "💥", "x" * 30, *ACTIONS]


async def judge(text: str) -> list[Mark]:
    marks = []
    start = 0
    for word in text.split(" "):
        if word in ACTIONS:
            marks.append(Mark(ACTIONS[word], start, start + len(word)))
        start += len(word) + 1
    return marks


def event(text: str) -> bytes:
    body = {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return f"data: {json.dumps(body)}\n\n".encode()


def pieces_of(data: bytes | str, cuts: list[int]) -> list:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def filtered(stream: list[bytes], hold_back: int) -> tuple[bytes, VerdictKind]:
    async def run() -> tuple[bytes, VerdictKind]:
        stream_filter = StreamFilter(judge, hold_back, 1 << 20)
        sent = [await stream_filter.feed(piece) for piece in stream]
        return b"".join([*sent, await stream_filter.finish()]), stream_filter.verdict

    return asyncio.run(run())


def text_of(body: bytes) -> tuple[str, str | None]:
    """The text, and why it ended."""
    events = [block.removeprefix("data: ") for block in body.decode().split("\n\n") if block]
    assert events[-1] == "[DONE]"
    choices = [json.loads(block)["choices"][0] for block in events[:-1]]
    return "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]


@settings(deadline=None, max_examples=200)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=30),
    text_cuts=st.lists(st.integers(0, 500), max_size=20),
    byte_cuts=st.lists(st.integers(0, 10_000), max_size=20),
    hold_back=st.sampled_from([8, 32, 200]),
)
def test_no_cut_lets_a_word_through(words, text_cuts, byte_cuts, hold_back) -> None:
    text = " ".join(words)
    stream = b"".join(event(piece) for piece in pieces_of(text, text_cuts)) + b"data: [DONE]\n\n"
    sent, verdict = filtered(pieces_of(stream, byte_cuts), hold_back)
    got, reason = text_of(sent)
    allowed = " ".join(REDACTED_TEXT if word == "rain" else word for word in words)
    if "storm" in words:
        assert verdict is VerdictKind.BLOCKED
        assert reason == "content_filter"
        assert allowed.startswith(got)
        assert "storm" not in got.split(" ")
    else:
        assert got == allowed
        assert verdict is (
            VerdictKind.REDACTED if "rain" in words else VerdictKind.FLAGGED if "wind" in words else VerdictKind.ALLOW
        )
        if "rain" not in words:
            assert sent == stream


@given(
    text=st.text(max_size=30),
    spans=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4),
    data=st.data(),
)
def test_redaction_in_parts_is_redaction_of_the_whole(text, spans, data) -> None:
    marks = [Mark(GuardAction.REDACT, min(a, b, len(text)), min(max(a, b), len(text))) for a, b in spans]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    edges = [0, *cuts, len(text)]
    parts = [redacted(text, marks, a, b) for a, b in itertools.pairwise(edges) if a < b]
    assert "".join(parts) == redacted(text, [mark for mark in marks if mark.start < mark.end])


@pytest.mark.parametrize("limit", [100, 1000])
def test_what_waits_is_bounded(limit) -> None:
    async def run() -> None:
        stream_filter = StreamFilter(judge, 1 << 20, limit)
        for _ in range(limit):
            await stream_filter.feed(event("word "))

    with pytest.raises(UnreadableError, match=f"more than {limit} bytes"):
        asyncio.run(run())


@settings(max_examples=200)
@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]":,0aN\\u', max_size=60).map(str.encode))
def test_any_bytes_are_a_body_or_unreadable(content) -> None:
    with contextlib.suppress(UnreadableError):
        assert isinstance(parse(content), dict)
