"""Holds back a streamed answer until its words have been judged.

The pieces of each channel add up to a text. It is judged up to the end of its last whole word, as soon as enough of
it is new; an event is let go when all of its words have been judged, in the order in which the events came. What was
let go cannot be taken back: a later judgement of words that are out already can only flag.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from steerserve.serving.envoy.bodies import (
    Json,
    UnreadableError,
    Words,
    choice_words,
    choices_of,
    dump,
    parse,
    without_other_texts,
)
from steerserve.serving.envoy.events import DONE, EventReader, data_of, with_data
from steerserve.serving.envoy.judge import Mark, redacted, worst
from steerserve.types import VerdictKind

JudgeText = Callable[[str], Awaitable[list[Mark]]]

_WINDOW = 8192
"""Characters in front of new ones that are judged with them, or up to twice as many."""
_NO_SPACE_FACTOR = 4
"""Languages without spaces: this many times the usual hold-back, and a word is taken to have ended."""


@dataclass
class _Channel:
    """One text, and how far it has come."""

    text: str = ""
    num_judged: int = 0
    is_complete: bool = False
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class _Held:
    """An event that waits.

    Attributes:
        pieces: its words, each with its channel and the characters ``[start, end)`` that it is of its text.
    """

    raw: bytes
    body: Json | None = None
    pieces: tuple[tuple[_Channel, Words, int, int], ...] = ()


class StreamFilter:
    """Filters one stream; ``verdict`` is what came of it so far.

    Args:
        hold_back: new characters of a channel that are worth a judgement.
        max_bytes: that may wait.
    """

    def __init__(self, judge: JudgeText, hold_back: int, max_bytes: int) -> None:
        self._judge = judge
        self._hold_back = hold_back
        self._max_bytes = max_bytes
        self._reader = EventReader()
        self._channels: dict[str, _Channel] = {}
        self._held: deque[_Held] = deque()
        self._unsent = bytearray()
        self._open: dict[object, bool] = {}  # index of each choice that has not ended → it is a chat's
        self._envelope: Json = {}
        self._ended = False
        self.verdict = VerdictKind.ALLOW

    @property
    def is_waiting(self) -> bool:
        """Something was held back."""
        return bool(self._unsent)

    async def feed(self, data: bytes) -> bytes:
        """What may be sent on, after ``data`` came.

        Raises:
            UnreadableError: words that cannot be found for certain.
            SteerserveError: the text cannot be judged now.
        """
        if self._ended:
            return b""
        self._unsent += data
        if len(self._unsent) > self._max_bytes:
            raise UnreadableError(f"more than {self._max_bytes} bytes wait for a judgement")
        is_last = sum(self._hold(event) for event in self._reader.feed(data)) > 0
        return await self._judged(is_last)

    async def finish(self) -> bytes:
        """What may be sent on at the end of the stream.

        Raises:
            As ``feed``.
        """
        if self._ended:
            return b""
        rest = self._reader.rest()
        if rest.strip():
            self._hold(rest)
        return await self._judged(is_last=True)

    def end_with(self, event: Json | None = None) -> bytes:
        """The end of a stream that is not let go on: a last event, or that the choices were filtered."""
        self._ended = True
        self._held.clear()
        self._unsent.clear()
        last = [event] if event is not None else [self._filtered(index, chat) for index, chat in self._open.items()]
        return b"".join(b"data: " + data + b"\n\n" for data in [*map(dump, last), DONE])

    def let_go(self) -> bytes:
        """Everything that waits, as it came; what comes later is not judged either."""
        self._ended = True
        self._held.clear()
        unsent = bytes(self._unsent)
        self._unsent.clear()
        return unsent

    def _hold(self, event: bytes) -> bool:
        """Queue an event; whether it is the last one."""
        data = data_of(event)
        if data is None or data.strip() == DONE:
            self._held.append(_Held(event))
            return data is not None
        body = parse(data)
        if "error" in body and "choices" not in body:
            self._held.append(_Held(event))
            return False
        pieces = []
        for choice in choices_of(body):
            for words in choice_words(choice):
                channel = self._channels.setdefault(words.channel, _Channel())
                start = len(channel.text)
                channel.text += words.text
                pieces.append((channel, words, start, len(channel.text)))
            self._note_end(choice)
        self._envelope = {key: value for key, value in body.items() if key not in ("choices", "usage")}
        self._held.append(_Held(event, body, tuple(pieces)))
        return False

    def _note_end(self, choice: Json) -> None:
        index = choice.get("index", 0)
        if choice.get("finish_reason") is None:
            self._open[index] = "delta" in choice
            return
        self._open.setdefault(index, "delta" in choice)
        for name, channel in self._channels.items():
            if name.startswith(f"{index}."):
                channel.is_complete = True

    async def _judged(self, is_last: bool) -> bytes:
        for channel in self._channels.values():
            boundary = self._boundary(channel, is_last)
            if boundary > channel.num_judged:
                await self._judge_up_to(boundary, channel)
        if self.verdict is VerdictKind.BLOCKED:
            return self.end_with()
        sent = []
        while self._held and all(end <= channel.num_judged for channel, _, _, end in self._held[0].pieces):
            sent.append(self._release(self._held.popleft()))
        return b"".join(sent)

    def _boundary(self, channel: _Channel, is_last: bool) -> int:
        if channel.is_complete or is_last:
            return len(channel.text)
        new = channel.text[channel.num_judged :]
        last_space = max((i for i, character in enumerate(new) if character.isspace()), default=-1)
        if last_space < 0:
            return len(channel.text) if len(new) >= _NO_SPACE_FACTOR * self._hold_back else channel.num_judged
        return channel.num_judged + (last_space + 1 if len(new) >= self._hold_back else 0)

    async def _judge_up_to(self, boundary: int, channel: _Channel) -> None:
        # Windows begin at multiples of their size, so that what is judged again is in the prefix cache.
        start = max(0, (boundary - _WINDOW) // _WINDOW * _WINDOW)
        found = await self._judge(channel.text[start:boundary])
        for mark in found:
            at = Mark(mark.action, mark.start + start, mark.end + start)
            if at.end > channel.num_judged:
                channel.marks.append(at)
                self.verdict = worst([self.verdict, at.verdict])
        channel.num_judged = boundary

    def _release(self, held: _Held) -> bytes:
        del self._unsent[: len(held.raw)]
        if held.body is None:
            return held.raw
        is_modified = False
        for channel, words, start, end in held.pieces:
            text = redacted(channel.text, channel.marks, start, end)
            if text != words.text:
                words.write(text)
                is_modified = True
        for choice in choices_of(held.body):
            if is_modified:
                without_other_texts(choice)
            if choice.get("finish_reason") is not None:
                self._open.pop(choice.get("index", 0), None)
        return with_data(held.raw, dump(held.body)) if is_modified else held.raw

    def _filtered(self, index: object, is_chat: bool) -> Json:
        text: Json = {"delta": {}} if is_chat else {"text": ""}
        choice = {"index": index, **text, "logprobs": None, "finish_reason": "content_filter"}
        return self._envelope | {"choices": [choice]}
