"""The HTTP server's life: its port is bound when it is made, and it runs in the event loop of the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from steerserve.config import ServerConfig
from steerserve.errors import AssetError
from steerserve.serving.certificates import Certificates
from steerserve.serving.health import Health
from steerserve.serving.http.backend import Authenticate, Backend
from steerserve.serving.http.endpoints import openai_app
from steerserve.serving.http.protocol import protocol
from steerserve.serving.service import Service

_MAX_CONNECTIONS = 1024
# Longer than clients keep one without requests (httpx and openai 5 s, proxies 60 s): were the server first to close it,
# a request that is on its way at that moment would be lost.
_KEEP_ALIVE_S = 75


class HttpServer:
    """Serves the OpenAI API from ``start`` to ``stop``.

    Attributes:
        address: ``host:port`` as bound.

    Raises:
        AssetError: the address cannot be bound.
    """

    def __init__(
        self,
        service: Service,
        config: ServerConfig,
        authenticate: Authenticate,
        health: Health,
        certificates: Certificates | None = None,
    ) -> None:
        http = config.http
        assert http.port is not None, "without a port there is no HTTP"
        self._socket = _bound(http.host, http.port)
        shown = f"[{http.host}]" if ":" in http.host else http.host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        backend = Backend(
            service,
            authenticate,
            health,
            config.max_message_bytes,
            http.read_timeout_s,
            http.write_timeout_s,
            http.default_max_tokens,
        )
        app: ASGIApp = openai_app(backend)
        if config.telemetry.traces:
            from steerserve.serving.tracing import with_trace_context

            app = with_trace_context(app)
        uvicorn_config = uvicorn.Config(
            app,
            http=protocol(http.read_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ssl_context_factory=None if certificates is None else lambda *_: certificates.ssl_context(),
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,  # after a drain: time for last bytes, not for answers
        )
        self._server = _Server(uvicorn_config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept connections."""
        self._serving = asyncio.create_task(self._server.serve([self._socket]))
        await self._server.has_started.wait()

    async def stop(self) -> None:
        """Accept no more, and close every connection once what is being sent has been."""
        self._server.should_exit = True
        if self._serving is None:
            self._socket.close()
        else:
            await self._serving


class _Server(uvicorn.Server):
    """Leaves signals to the process, and says when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_started.set()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise AssetError(f"cannot listen on {host}:{port} ({error.strerror}); is another server using it?") from error
