"""The metrics, the log and the traces of one server; what its configuration leaves off costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio

from steerserve.config import TelemetryConfig
from steerserve.engine.engine import Engine
from steerserve.serving.logs import RequestIds, log_access
from steerserve.serving.metrics import Metrics, MetricsServer
from steerserve.serving.service import Observer
from steerserve.serving.telemetry import OnEnd, OnTokens, Telemetry

if TYPE_CHECKING:
    from steerserve.serving.tracing import Tracing


class Instruments:
    """What a server reads itself with.

    Attributes:
        metrics: what is counted; None without a port for them.
        observers: for ``Service``.
        interceptors: for the gRPC server.
        metrics_address: ``host:port`` as bound; None without metrics.

    Raises:
        AssetError: the address of the metrics cannot be bound.
    """

    def __init__(self, engine: Engine, config: TelemetryConfig) -> None:
        on_tokens: list[OnTokens] = []
        on_end: list[OnEnd] = [log_access]
        self.interceptors: tuple[grpc.aio.ServerInterceptor, ...] = ()
        self._tracing: Tracing | None = None
        if config.traces:
            from steerserve.serving.tracing import TraceContextInterceptor, Tracing  # needs the extra "sidecar"

            self._tracing = Tracing(engine.model.name)
            self.interceptors = (TraceContextInterceptor(),)
            on_end.append(self._tracing.on_end)
        self.metrics: Metrics | None = None
        self._metrics_server: MetricsServer | None = None
        if config.metrics_port is not None:
            self.metrics = Metrics(engine)
            on_tokens.append(self.metrics.on_tokens)
            on_end.append(self.metrics.on_end)
            self._metrics_server = MetricsServer(self.metrics, config.metrics_host, config.metrics_port)
        self.metrics_address = None if self._metrics_server is None else self._metrics_server.address
        self.observers: tuple[Observer, ...] = (RequestIds(), Telemetry(on_tokens, on_end))

    def stop(self) -> None:
        """Close the metrics' port, and send the last spans; may take seconds."""
        if self._metrics_server is not None:
            self._metrics_server.stop()
        if self._tracing is not None:
            self._tracing.stop()
