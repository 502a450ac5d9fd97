"""What probes are told, through grpc.health.v1.

The services ``""``, ``readiness`` and every one that the server has are SERVING while requests are taken: not before
the warm-up, nor from the first moment of a drain. ``liveness`` is SERVING from the first moment, through warm-up and
drain, until only a restart helps: the engine is given up, or has hung.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

LIVENESS, READINESS = "liveness", "readiness"
_LOOKS_PER_HANG = 4


class Health:
    """Answers the probes of ``server``.

    Args:
        services: names that are ready with it.

    Attributes:
        is_ready: requests are taken.
        is_alive: only a restart would help where this is false.
    """

    def __init__(self, server: grpc.aio.Server, services: Sequence[str]) -> None:
        self.is_ready = self.is_alive = False
        self._names = ("", READINESS, *services)
        self._servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Alive, and not ready."""
        await self.set_alive(True)
        await self.set_ready(False)

    async def set_ready(self, is_ready: bool) -> None:
        """Take requests, or no more."""
        self.is_ready = is_ready
        for name in self._names:
            await self._servicer.set(name, _status(is_ready))

    async def set_alive(self, is_alive: bool) -> None:
        """Go on, or ask to be restarted."""
        self.is_alive = is_alive
        await self._servicer.set(LIVENESS, _status(is_alive))

    async def watch(self, seconds_in_step: Callable[[], float], hang_s: float) -> None:
        """Until cancelled, not alive while a step of the engine takes more than ``hang_s`` seconds."""
        is_alive = True
        while True:
            await asyncio.sleep(hang_s / _LOOKS_PER_HANG)
            if (seconds_in_step() < hang_s) is not is_alive:
                is_alive = not is_alive
                await self.set_alive(is_alive)


def _status(is_good: bool) -> int:
    return health_pb2.HealthCheckResponse.SERVING if is_good else health_pb2.HealthCheckResponse.NOT_SERVING
