"""The RPC that Envoy opens for each HTTP exchange."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from grpc.aio import ServicerContext

from steerserve.config import EnvoyConfig, ServerConfig
from steerserve.errors import SteerserveError
from steerserve.serving.envoy.judge import Judge
from steerserve.serving.envoy.traffic import Traffic
from steerserve.serving.service import Caller, Service
from steerserve.serving.status import end_call, status_of

Context = ServicerContext[Any, Any]


class ExternalProcessor(external_processor_pb2_grpc.ExternalProcessorServicer):  # type: ignore[misc]
    """Answers ``envoy.service.ext_proc.v3.ExternalProcessor``.

    Args:
        max_bytes: of a body, or of the part of a stream that waits.
        authenticate: who Envoy is.

    Raises:
        InvalidRequestError: a policy is not loaded.
    """

    def __init__(
        self, service: Service, config: EnvoyConfig, max_bytes: int, authenticate: Callable[[Context], Caller]
    ) -> None:
        self._engine_loop = service.engine_loop
        self._judge = Judge(service, config.policies)
        self._config = config
        self._max_bytes = max_bytes
        self._authenticate = authenticate

    # Writes instead of yielding: a call that ends in the middle of a write must leave this frame at once.
    async def Process(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ProcessingRequest], context: Context
    ) -> None:
        try:
            caller = self._authenticate(context)
        except SteerserveError as error:
            await end_call(context, status_of(error, str))
        traffic = Traffic(self._judge, self._config, self._max_bytes, caller)
        try:
            with self._engine_loop.dialogue():  # an answer that is on its way is judged to its end, through a drain
                await _answer(traffic, request_iterator, context)
        except SteerserveError as error:
            await end_call(context, status_of(error, str))


async def _answer(traffic: Traffic, messages: AsyncIterator[pb.ProcessingRequest], context: Context) -> None:
    async for message in messages:
        for reply in await traffic.replies(message):
            if message.observability_mode:
                continue  # told, not asked
            await context.write(reply)
            if reply.HasField("immediate_response"):
                return


def add_external_processor(
    server: grpc.aio.Server, service: Service, config: ServerConfig, authenticate: Callable[[Context], Caller]
) -> None:
    """Have ``server`` answer Envoy.

    Raises:
        InvalidRequestError: a policy is not loaded.
    """
    processor = ExternalProcessor(service, config.envoy, config.max_message_bytes, authenticate)
    external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(processor, server)
