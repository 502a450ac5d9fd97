"""The RPCs: convert, call the engine loop, translate. Nothing else happens here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any, NoReturn

from grpc.aio import ServicerContext

from steerserve.errors import SteerserveError
from steerserve.serving.convert import request_from_proto
from steerserve.serving.convert_response import model_info_to_proto, response_to_proto, step_to_proto
from steerserve.serving.convert_score import check_score_request, scores_to_proto
from steerserve.serving.fields import RequestMessage, proto_field
from steerserve.serving.scoring import Scorer
from steerserve.serving.service import Caller, Interface, Service
from steerserve.serving.status import end_call, status_of
from steerserve.types import StepOutput
from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import generation_pb2_grpc, score_pb2

Context = ServicerContext[Any, Any]
Authenticate = Callable[[Context], Caller]
"""Finds out who calls; raises what refuses it."""


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Answers ``steerserve.v1.GenerationService``.

    A call that is cancelled, or runs past its deadline, is a cancelled coroutine here; it leaves
    ``Service.generate``, which aborts the request. The engine knows the deadline too and does not wait for that.
    """

    def __init__(self, service: Service, authenticate: Authenticate) -> None:
        self._service = service
        self._authenticate = authenticate
        self._scorer = Scorer(service)
        self._started = time.monotonic()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        try:
            async with self._outputs(request, context) as outputs:
                return response_to_proto([output async for output in outputs])
        except Exception as error:
            await _end_with_status(error, request, context)

    # Writes instead of yielding: a call that ends in the middle of a write must leave this frame at once.
    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> None:
        num_generated_tokens: Counter[int] = Counter()  # by index
        try:
            async with self._outputs(request, context) as outputs:
                async for output in outputs:
                    num_generated_tokens[output.index] += len(output.token_ids)
                    await context.write(step_to_proto(output, num_generated_tokens[output.index]))
        except Exception as error:
            await _end_with_status(error, request, context)

    async def Score(self, request: score_pb2.ScoreRequest, context: Context) -> score_pb2.ScoreResponse:  # noqa: N802
        try:
            caller = self._authenticate(context)
            check_score_request(request)
            scores = await self._scorer.score(
                request.text,
                request.concepts,
                caller,
                Interface.GRPC,
                policies=request.policies,
                timeout_s=context.time_remaining(),
            )
            return scores_to_proto(scores, request.return_tokens)
        except Exception as error:
            await end_call(context, status_of(error, str))

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        await self._check_caller(context)
        engine = self._service.engine_loop.engine
        return pb.GetServerInfoResponse(
            version=version("steerserve"),
            uptime_seconds=time.monotonic() - self._started,
            num_requests_running=engine.num_running,
            num_requests_waiting=engine.num_waiting,
            max_num_seqs=engine.config.max_num_seqs,
        )

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        await self._check_caller(context)
        return model_info_to_proto(self._service.engine_loop.engine)

    def _outputs(
        self, request: RequestMessage, context: Context
    ) -> AbstractAsyncContextManager[AsyncIterator[StepOutput]]:
        caller = self._authenticate(context)
        asked = request_from_proto(request, context.time_remaining())
        return self._service.generate(asked, caller, Interface.GRPC)

    async def _check_caller(self, context: Context) -> None:
        try:
            self._authenticate(context)
        except SteerserveError as error:
            await end_call(context, status_of(error, str))


async def _end_with_status(error: Exception, request: RequestMessage, context: Context) -> NoReturn:
    await end_call(context, status_of(error, lambda field: proto_field(field, request)))
