"""Every error of the tree has a status of its own, and a client gets the error back."""

from __future__ import annotations

import logging

import grpc
import pytest
from google.rpc import error_details_pb2

from steerserve.errors import (
    AssetError,
    CapacityError,
    DetectorError,
    IncompatibleError,
    InvalidRequestError,
    ServiceError,
    SteerserveError,
)
from steerserve.serving.status import error_of, status_of

Code = grpc.StatusCode


class FailedCall(grpc.Call):
    """The part of a failed call that carries its status."""

    def __init__(self, code: Code, details: str, metadata: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._status = (code, details, metadata)

    def code(self) -> Code:
        return self._status[0]

    def details(self) -> str:
        return self._status[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._status[2]

    initial_metadata = is_active = time_remaining = cancel = add_callback = None


def over_the_wire(error: Exception) -> SteerserveError:
    status = status_of(error, lambda field: field)
    code = next(code for code in Code if code.value[0] == status.code)
    return error_of(FailedCall(code, status.message, (("grpc-status-details-bin", status.SerializeToString()),)))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError("prompt", "", "text"), Code.INVALID_ARGUMENT),
        (IncompatibleError("pack", {"d": 3}, "another"), Code.FAILED_PRECONDITION),
        (CapacityError("full", retry_after_s=2.5), Code.RESOURCE_EXHAUSTED),
        (ServiceError("UNAVAILABLE", "draining"), Code.UNAVAILABLE),
        (ServiceError("DEADLINE_EXCEEDED", "late"), Code.DEADLINE_EXCEEDED),
        (DetectorError("not finite"), Code.INTERNAL),
        (AssetError("damaged"), Code.INTERNAL),
        (KeyError("bug"), Code.INTERNAL),
    ],
)
def test_codes(error: Exception, code: Code) -> None:
    status = status_of(error, lambda field: field)
    info = error_details_pb2.ErrorInfo()
    assert status.code == code.value[0]
    assert status.details[-1].Unpack(info)
    assert (info.domain, bool(info.reason)) == ("steerserve", True)


@pytest.mark.parametrize("error_type", [InvalidRequestError, IncompatibleError])
@pytest.mark.parametrize("value", ["it's", 3, None, "x" * 1000])
def test_field_errors_come_back_as_they_were(error_type, value) -> None:
    error = error_type("steering.interventions[0].raw", value, "a number")
    back = over_the_wire(error)
    assert type(back) is error_type
    assert (back.field, back.value, back.expected, str(back)) == (error.field, error.value, error.expected, str(error))


def test_capacity_errors_come_back_with_their_delay() -> None:
    back = over_the_wire(CapacityError("full", retry_after_s=2.5))
    assert isinstance(back, CapacityError)
    assert (str(back), back.retry_after_s) == ("full", 2.5)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceError("UNAVAILABLE", "draining"), "UNAVAILABLE"),
        (ServiceError("DEADLINE_EXCEEDED", "late"), "DEADLINE_EXCEEDED"),
        (DetectorError("not finite"), "INTERNAL"),
    ],
)
def test_other_errors_come_back_as_service_errors(error, code) -> None:
    back = over_the_wire(error)
    assert isinstance(back, ServiceError)
    assert (back.code, str(back)) == (code, str(error))


def test_a_status_of_grpc_itself_is_a_service_error() -> None:
    back = error_of(FailedCall(Code.DEADLINE_EXCEEDED, "late"))
    assert isinstance(back, ServiceError)
    assert (back.code, str(back)) == ("DEADLINE_EXCEEDED", "late")


def test_unexpected_exceptions_are_logged_and_not_told(caplog) -> None:
    with caplog.at_level(logging.ERROR):
        status = status_of(KeyError("secret"), lambda field: field)
    assert "secret" not in str(status)
    assert "secret" in caplog.text
