"""What every interface shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from steerserve.errors import CapacityError
from steerserve.serving.service import Caller, Exchange, Interface, Service
from steerserve.types import FinishReason, GenerateRequest, StepOutput


class Loop:
    """Stands for an engine loop that answers with one token."""

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[StepOutput]]:
        async def outputs() -> AsyncIterator[StepOutput]:
            yield StepOutput(request.request_id, (1,), "x", finish_reason=FinishReason.STOP)

        yield outputs()


class Notes:
    """Remembers what it is told; fails at the end if asked to."""

    def __init__(self, fails: bool = False) -> None:
        self.told: list[str] = []
        self._fails = fails

    async def admitted(self, exchange: Exchange) -> None:
        self.told.append("admitted")

    async def produced(self, exchange: Exchange, output: StepOutput) -> None:
        self.told.append(output.text)

    async def ended(self, exchange: Exchange, error: BaseException | None) -> None:
        self.told.append(type(error).__name__)
        if self._fails:
            raise OSError("disk")


async def answered(service: Service) -> list[str]:
    request = GenerateRequest("a", "prompt")
    async with service.generate(request, Caller(), Interface.GRPC) as outputs:
        return [output.text async for output in outputs]


def test_an_observer_that_fails_at_the_end_keeps_nobody_from_hearing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Notes(fails=True), Notes()
    assert asyncio.run(answered(Service(Loop(), observers=(first, second)))) == ["x"]
    assert first.told == second.told == ["admitted", "x", "NoneType"]
    assert "Notes failed at the end of an exchange" in caplog.text


def test_a_refusal_is_told_too() -> None:
    def full(exchange: Exchange) -> GenerateRequest:
        raise CapacityError("full")

    notes = Notes()
    with pytest.raises(CapacityError):
        asyncio.run(answered(Service(Loop(), full, (notes,))))
    assert notes.told == ["CapacityError"]
