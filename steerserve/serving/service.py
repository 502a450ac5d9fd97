"""What every way into the server shares: who asks, what they may ask, and who is told what came of it.

gRPC, HTTP and Envoy are thin: each turns its messages into the calls of ``Service`` and the errors these raise into
its own statuses. Nothing that decides about a request may live in one of them, or the others would lack it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from steerserve.serving.engine_loop import EngineLoop
from steerserve.types import GenerateRequest, StepOutput

_log = logging.getLogger(__name__)


class Interface(StrEnum):
    """The way by which a request came in."""

    GRPC = "grpc"
    HTTP = "http"
    ENVOY = "envoy"


@dataclass(frozen=True)
class Caller:
    """Who asks, as the interface has found out.

    Attributes:
        tenant: whose policies and quotas count; empty on a server without keys.
        key_id: names the key, never the key itself.
    """

    tenant: str = ""
    key_id: str = ""
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Exchange:
    """One request's passage through the server.

    Attributes:
        request: as admitted: with the policies that the caller must have; as asked if it was refused.
        number: counted from 1 since the process began.
        started_ns: UNIX time.
    """

    request: GenerateRequest
    caller: Caller
    interface: Interface
    number: int = field(default_factory=itertools.count(1).__next__)
    started_ns: int = field(default_factory=time.time_ns)
    started: float = field(default_factory=time.monotonic)

    @property
    def is_reading(self) -> bool:
        """The text of the prompt is to be read, and nothing generated: no policy has anything to edit."""
        return self.request.is_reading


class Observer(Protocol):
    """Told of every exchange, in this order; the client waits, and what the first two raise ends the exchange."""

    async def admitted(self, exchange: Exchange) -> None:
        """The request is the engine's now."""

    async def produced(self, exchange: Exchange, output: StepOutput) -> None:
        """``output`` is about to be handed on; the last one of a response carries its receipt."""

    async def ended(self, exchange: Exchange, error: BaseException | None) -> None:
        """Once for every exchange, refused ones included; ``error`` is what ended it early, if something did."""


Admission = Callable[[Exchange], GenerateRequest]
"""What a caller may ask: the request with what the caller must have, or an error."""


def admit_all(exchange: Exchange) -> GenerateRequest:
    """Anyone may ask anything."""
    return exchange.request


class Service:
    """Answers requests, whichever way they came in."""

    def __init__(
        self, engine_loop: EngineLoop, admission: Admission = admit_all, observers: Sequence[Observer] = ()
    ) -> None:
        self.engine_loop = engine_loop
        self._admission = admission
        self._observers = tuple(observers)

    @asynccontextmanager
    async def generate(
        self, request: GenerateRequest, caller: Caller, interface: Interface
    ) -> AsyncIterator[AsyncIterator[StepOutput]]:
        """Admit ``request`` and yield its outputs; leaving the context early aborts it and frees its slot.

        Raises:
            InvalidRequestError, IncompatibleError, CapacityError: the request is refused.
            ServiceError: the caller may not ask this, or the server is draining or out of order.
        """
        exchange = Exchange(request, caller, interface)
        error: BaseException | None = None
        try:
            exchange = replace(exchange, request=self._admission(exchange))
            async with self.engine_loop.open(exchange.request) as outputs:
                for observer in self._observers:
                    await observer.admitted(exchange)
                yield self._observed(exchange, outputs)
        except BaseException as raised:
            error = raised
            raise
        finally:
            for observer in self._observers:
                try:
                    await observer.ended(exchange, error)
                except Exception:  # the exchange is over: the others must still hear of it
                    _log.exception("%s failed at the end of an exchange", type(observer).__name__)

    async def _observed(self, exchange: Exchange, outputs: AsyncIterator[StepOutput]) -> AsyncIterator[StepOutput]:
        async for output in outputs:
            for observer in self._observers:
                await observer.produced(exchange, output)
            yield output
