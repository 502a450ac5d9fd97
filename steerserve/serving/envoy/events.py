"""Server-sent events, as they come in pieces of any size."""

from __future__ import annotations

import re
from collections.abc import Iterator

_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_END_OF_LINE = re.compile(rb"\r\n|\n|\r")
DONE = b"[DONE]"


class EventReader:
    """Cuts a stream into events."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that are complete with ``data``, each as it came, with the empty line behind it."""
        searched = max(0, len(self._buffer) - 3)
        self._buffer += data
        start = 0
        while (match := _END_OF_EVENT.search(self._buffer, max(start, searched))) is not None:
            yield bytes(self._buffer[start : match.end()])
            start = match.end()
        del self._buffer[:start]

    def rest(self) -> bytes:
        """What no empty line ended."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


def data_of(event: bytes) -> bytes | None:
    """The data of an event; None if it has none, as a comment."""
    lines = [line for line in _END_OF_LINE.split(event) if line == b"data" or line.startswith(b"data:")]
    if not lines:
        return None
    return b"\n".join(line.removeprefix(b"data").removeprefix(b":").removeprefix(b" ") for line in lines)


def with_data(event: bytes, data: bytes) -> bytes:
    """``event`` with other data; its other fields stay."""
    others = [
        line
        for line in _END_OF_LINE.split(event)
        if line and line != b"data" and not line.startswith((b"data:", b"\xef\xbb\xbfdata:"))
    ]
    return b"\n".join([*others, b"data: " + data]) + b"\n\n"
