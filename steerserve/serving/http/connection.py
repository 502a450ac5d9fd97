"""One client's connection: its body within limits, its going away, and its pace of reading."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from steerserve.serving.http.errors import HttpError

T = TypeVar("T")


async def read_json_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body, which must call itself JSON: web pages cannot send that to another site unasked.

    Raises:
        HttpError: another type, too large, or too slow.
        ClientDisconnect: the client went away.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if content_type != "application/json" or encoding != "identity":
        got = f"{content_type or 'no type'}, encoding {encoding}"
        message = f"Content-Type: got {got}, expected application/json, not compressed"
        raise HttpError(415, "unsupported_media_type", message)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise HttpError(
                        413, "body_too_large", f"body: got more than {max_bytes} bytes, expected at most that"
                    )
    except TimeoutError:
        raise HttpError(408, "timeout", f"body: not complete after {timeout_s:g} s") from None
    return bytes(body)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work``, cancelled as soon as the client closes the connection; its body must have been read.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        # What was cancelled has left the engine when this returns.
        for started in (task, watch):
            started.cancel()
        await asyncio.wait({task, watch})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventWriter:
    """Writes a stream of server-sent events.

    A write waits while the client's buffers are full: nothing piles up for a client that does not read.

    Args:
        timeout_s: how long one write may wait.
    """

    def __init__(self, send: Send, headers: Mapping[str, str], timeout_s: float) -> None:
        self._send = send
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"} | dict(
            headers
        )
        self._timeout_s = timeout_s
        self.has_begun = False

    async def write(self, event: Mapping[str, Any] | str) -> None:
        """Send one event.

        Raises:
            ClientDisconnect: the client has read nothing for too long.
        """
        if not self.has_begun:
            self.has_begun = True
            headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        await self._write(f"data: {data}\n\n".encode(), more=True)

    async def end_with(self, error: Mapping[str, Any]) -> None:
        """Send an error as the last event, if the client still reads."""
        with contextlib.suppress(ClientDisconnect):
            await self.write(error)
            await self.close()

    async def close(self) -> None:
        """End the stream; a client that sees no such end knows that something is missing."""
        await self._write(b"", more=False)

    async def _write(self, body: bytes, more: bool) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise ClientDisconnect from None
