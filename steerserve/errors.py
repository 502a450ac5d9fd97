"""Every error steerserve raises on purpose.

    SteerserveError
    ├── InvalidRequestError      the caller's input is wrong            INVALID_ARGUMENT
    ├── IncompatibleError        right in itself, wrong for what is loaded  FAILED_PRECONDITION
    ├── CapacityError            no room now, try again                 RESOURCE_EXHAUSTED
    ├── DetectorError            a guard could not read its activation  INTERNAL
    ├── ServiceError             the server cannot answer, or not be reached  its own code
    ├── PolicyError              policy or access files are wrong; nothing changes  FAILED_PRECONDITION
    └── AssetError               a model, SAE or pack file is missing or damaged

The status names are what the gRPC server answers. `assert` is for our own bugs.
"""

from __future__ import annotations

from collections.abc import Sequence


class SteerserveError(Exception):
    """Base of the tree; catch this to catch everything steerserve raises on purpose."""


class FieldError(SteerserveError):
    """An error at one field: says which, what was given, and what would be valid.

    Args:
        field: path in the request, e.g. ``steering.interventions[0].target.feature``.
        value: what was given; shown through ``repr``, shortened.
        expected: what would be valid, as a phrase that completes "expected ...".
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = _shortened(value)
        self.expected = expected
        super().__init__(f"{field}: got {self.value}, expected {expected}")


class InvalidRequestError(FieldError):
    """The input is malformed, out of range, or names something that does not exist."""


class IncompatibleError(FieldError):
    """The input is well formed but made for another model, SAE or site than the loaded one."""


class CapacityError(SteerserveError):
    """Nothing is wrong with the request; there is no room for it now.

    Args:
        retry_after_s: seconds after which a retry is sensible.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DetectorError(SteerserveError):
    """A guard read a non-finite activation; the request ends, fail-closed."""


class ServiceError(SteerserveError):
    """The server is draining, out of order, out of time or out of reach; the request may be fine.

    Args:
        code: canonical status name, e.g. ``UNAVAILABLE`` or ``DEADLINE_EXCEEDED``.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class PolicyError(SteerserveError):
    """Policy files, or the access file, are wrong; what is in force stays so.

    Args:
        problems: one for each thing that is wrong: file, line, field, and what would be valid.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class AssetError(SteerserveError):
    """A model, SAE or concept pack on disk is missing, damaged or not what it claims to be."""


def _shortened(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
