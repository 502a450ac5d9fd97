"""What all endpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from steerserve.serving.health import Health
from steerserve.serving.http.errors import HttpError
from steerserve.serving.service import Caller, Service


class Authenticate(Protocol):
    """Finds out who sends a request; raises what refuses it."""

    def __call__(self, request: Request) -> Caller: ...


@dataclass(frozen=True)
class Backend:
    """The service behind the endpoints, and what limits them.

    Attributes:
        health: what probes are told, as over gRPC.
        read_timeout_s: for a body to arrive.
        write_timeout_s: for a client to read on.
    """

    service: Service
    authenticate: Authenticate
    health: Health
    max_body_bytes: int
    read_timeout_s: float
    write_timeout_s: float
    default_max_tokens: int

    @property
    def model_name(self) -> str:
        """The one model there is."""
        return self.service.engine_loop.engine.model.name

    def check_model(self, name: str | None) -> None:
        """Refuse to answer for another model.

        Raises:
            HttpError: 404.
        """
        if name not in (None, self.model_name):
            message = f"model: got {name!r:.120}, expected {self.model_name!r}, which this server serves"
            raise HttpError(404, "model_not_found", message, "model")
