"""Typed errors to gRPC statuses with google.rpc details, and back.

InvalidRequestError    INVALID_ARGUMENT     BadRequest, ErrorInfo
IncompatibleError      FAILED_PRECONDITION  BadRequest, ErrorInfo
CapacityError          RESOURCE_EXHAUSTED   RetryInfo, ErrorInfo
ServiceError           its own code         ErrorInfo
PolicyError            FAILED_PRECONDITION  ErrorInfo
every other one        INTERNAL             ErrorInfo
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc.aio import ServicerContext
from grpc_status import rpc_status

from steerserve.errors import (
    CapacityError,
    FieldError,
    IncompatibleError,
    InvalidRequestError,
    PolicyError,
    ServiceError,
    SteerserveError,
)
from steerserve.serving.fields import AsShown

_log = logging.getLogger(__name__)

DOMAIN = "steerserve"
_FIELD_ERRORS: dict[type[FieldError], tuple[int, str]] = {
    InvalidRequestError: (code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST"),
    IncompatibleError: (code_pb2.FAILED_PRECONDITION, "INCOMPATIBLE"),
}
# Statuses travel in HTTP/2 trailers, which clients cap at 8 KiB; some texts appear in them three times.
_MAX_TEXT = 600


def status_of(error: Exception, locate: Callable[[str], str]) -> status_pb2.Status:
    """The status that ends a call with ``error``.

    Args:
        locate: from a field as the types name it to its path in the caller's message.
    """
    match error:
        case FieldError():
            return _field_status(error, locate(error.field))
        case CapacityError():
            delay = Duration()
            delay.FromNanoseconds(int(error.retry_after_s * 1e9))
            retry = error_details_pb2.RetryInfo(retry_delay=delay)
            return _status(code_pb2.RESOURCE_EXHAUSTED, str(error), "CAPACITY", {}, retry)
        case ServiceError():
            return _status(code_pb2.Code.Value(error.code), str(error), "SERVICE", {})
        case PolicyError():
            return _status(code_pb2.FAILED_PRECONDITION, str(error), "POLICY", {})
        case SteerserveError():
            return _status(code_pb2.INTERNAL, str(error), type(error).__name__.removesuffix("Error").upper(), {})
        case _:
            _log.error("a request ended with an unexpected exception", exc_info=error)
            return _status(code_pb2.INTERNAL, "internal error; the server's log has the details", "INTERNAL", {})


async def end_call(context: ServicerContext[object, object], status: status_pb2.Status) -> NoReturn:
    """End a call with ``status``."""
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
    raise AssertionError("abort raises")


def error_of(call: grpc.Call) -> SteerserveError:
    """The typed error that the server raised, as far as the failed call's status tells; for clients."""
    status = rpc_status.from_call(call)
    if status is None:
        return ServiceError(call.code().name, call.details() or "no details")
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        _ = detail.Unpack(info) or detail.Unpack(retry)
    for error_type, (_, reason) in _FIELD_ERRORS.items():
        if info.reason == reason:
            return error_type(info.metadata["field"], AsShown(info.metadata["value"]), info.metadata["expected"])
    if info.reason == "CAPACITY":
        return CapacityError(status.message, retry.retry_delay.ToNanoseconds() / 1e9)
    if info.reason == "POLICY":
        return PolicyError(status.message.splitlines())
    return ServiceError(code_pb2.Code.Name(status.code), status.message)


def _field_status(error: FieldError, path: str) -> status_pb2.Status:
    code, reason = next(entry for error_type, entry in _FIELD_ERRORS.items() if isinstance(error, error_type))
    expected = _clipped(error.expected)
    problem = f"got {error.value}, expected {expected}"
    violation = error_details_pb2.BadRequest.FieldViolation(field=path, description=problem)
    metadata = {"field": path, "value": error.value, "expected": expected}
    return _status(
        code, f"{path}: {problem}", reason, metadata, error_details_pb2.BadRequest(field_violations=[violation])
    )


def _status(
    code: int, message: str, reason: str, metadata: dict[str, str], *details: ProtoMessage
) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    status = status_pb2.Status(code=code, message=_clipped(message))
    for detail in (*details, info):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _clipped(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
