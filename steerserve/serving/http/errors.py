"""Typed errors as HTTP answers in OpenAI's shape, made from the statuses that gRPC calls end with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from steerserve.errors import SteerserveError
from steerserve.serving.status import status_of

_HTTP_STATUS: dict[int, int] = {
    code_pb2.CANCELLED: 499,
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.FAILED_PRECONDITION: 400,
    code_pb2.OUT_OF_RANGE: 400,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.ABORTED: 409,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_RETRY_UNAVAILABLE_S = 1.0


class HttpError(SteerserveError):
    """What HTTP alone can get wrong.

    Args:
        code: machine-readable reason.
        param: the key of the body it is about.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        self.status = status
        self.code = code
        self.param = param
        super().__init__(message)


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as it is sent."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def error_answer(error: Exception) -> ErrorAnswer:
    """The answer that ``error`` ends a request with; its field is a key of the body already."""
    if isinstance(error, HttpError):
        return ErrorAnswer(error.status, _body(error.status, str(error), error.param, error.code), {})
    status = status_of(error, lambda field: field)
    http_status = _HTTP_STATUS.get(status.code, 500)
    info = _detail(status, error_details_pb2.ErrorInfo())
    headers = _retry_headers(_detail(status, error_details_pb2.RetryInfo()), http_status)
    if http_status == 401:
        headers["www-authenticate"] = "Bearer"
    param = info.metadata.get("field")
    return ErrorAnswer(http_status, _body(http_status, status.message, param, info.reason.lower()), headers)


def _body(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    error_type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def _retry_headers(retry: error_details_pb2.RetryInfo, http_status: int) -> dict[str, str]:
    delay_s = retry.retry_delay.ToNanoseconds() / 1e9
    if not delay_s and http_status != 503:
        return {}
    delay_s = delay_s or _RETRY_UNAVAILABLE_S
    # Clients of OpenAI read the milliseconds, everyone else whole seconds.
    return {"retry-after": str(math.ceil(delay_s)), "retry-after-ms": str(math.ceil(delay_s * 1e3))}


def _detail(status: status_pb2.Status, detail: Any) -> Any:
    """``detail`` filled from the first of its type in ``status``; empty if there is none."""
    for packed in status.details:
        if packed.Unpack(detail):
            break
    return detail
