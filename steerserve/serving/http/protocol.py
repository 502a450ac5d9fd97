"""HTTP/1.1 connections on which no request arrives do not stay."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(head_timeout_s: float) -> type[H11Protocol]:
    """uvicorn's, which waits without end for the head of a request, with ``head_timeout_s`` for that."""

    class Impatient(H11Protocol):
        _giving_up: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._got_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._got_head()
            elif self._giving_up is None:  # the first bytes of another request
                self._wait_for_head()

        def _wait_for_head(self) -> None:
            self._giving_up = self.loop.call_later(head_timeout_s, self.timeout_keep_alive_handler)

        def _got_head(self) -> None:
            if self._giving_up is not None:
                self._giving_up.cancel()
                self._giving_up = None

    return Impatient
