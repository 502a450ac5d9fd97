"""Bytes that are no message of the called method are refused as any other wrong request is.

gRPC by itself would answer UNKNOWN, and write a traceback to the log for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from steerserve.errors import InvalidRequestError
from steerserve.serving.status import status_of

Handler = Any  # of grpc.RpcMethodHandler, whose fields its type does not show


@dataclass(frozen=True)
class _Undecodable:
    num_bytes: int


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Refuses them with INVALID_ARGUMENT, for every method that is a coroutine of one request."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        name = "unary_stream" if handler.response_streaming else "unary_unary"
        answer = getattr(handler, name)
        if not inspect.iscoroutinefunction(answer) or handler.request_deserializer is None:
            return handler
        changed = {"request_deserializer": _decoding(handler.request_deserializer), name: _answering(answer)}
        return handler._replace(**changed)


def _decoding(decode: Callable[[bytes], object]) -> Callable[[bytes], object]:
    def decode_or_tell(data: bytes) -> object:
        try:
            return decode(data)
        except DecodeError:
            return _Undecodable(len(data))

    return decode_or_tell


def _answering(answer: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def answer_or_refuse(request: object, context: Any) -> Any:
        if isinstance(request, _Undecodable):
            error = InvalidRequestError("request", f"{request.num_bytes} bytes", "a message of the method's type")
            status = rpc_status.to_status(status_of(error, lambda field: field))
            await context.abort(status.code, status.details, status.trailing_metadata)
        return await answer(request, context)

    return answer_or_refuse
