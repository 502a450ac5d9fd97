"""The server: what it loads, how it starts and how it stops.

Warm-up first, then health SERVING. On SIGTERM or SIGINT: health NOT_SERVING, new requests refused,
running ones finished, port closed. Health, reflection and the info calls answer until the end.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import torch
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import Engine
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model
from steerserve.sae.registry import load_sae
from steerserve.serving.admin import POLICY_SERVICE, AdminServer
from steerserve.serving.admission import Access
from steerserve.serving.audit.observer import AuditObserver
from steerserve.serving.certificates import Certificates, certified_names
from steerserve.serving.decoding import DecodingInterceptor
from steerserve.serving.engine_loop import EngineLoop
from steerserve.serving.health import Health
from steerserve.serving.instruments import Instruments
from steerserve.serving.listening import bind, check_exposed
from steerserve.serving.policy_files import PolicyFiles
from steerserve.serving.policy_servicer import PolicyServicer
from steerserve.serving.service import Caller, Service
from steerserve.serving.servicer import Context, GenerationServicer
from steerserve.steering.catalog import ASSETS, Catalog
from steerserve.steering.monitors import NO_MONITORS, read_monitors
from steerserve.steering.pack_files import load_pack
from steerserve.types import GenerateRequest, SamplingParams
from steerserve.v1 import generation_pb2, generation_pb2_grpc, policy_pb2_grpc

if TYPE_CHECKING:
    from starlette.requests import Request

    from steerserve.serving.http.server import HttpServer

_log = logging.getLogger(__name__)

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
# Time for complete answers to reach their clients after the port has closed.
_FLUSH_S = 1.0
_LOOK_AT_FILES_S = 2.0
# Of one connection.
_MAX_STREAMS = 1024


def load_engine(config: ServerConfig, engine_config: EngineConfig) -> Engine:
    """Load the model, pulling it first if need be, everything that requests may name, and what to monitor.

    Raises:
        AssetError: a model, SAE, pack or monitor plan is missing or damaged.
        PolicyError: a policy file is wrong.
        IncompatibleError: the monitor plan, or a pack or SAE that was asked for by name, does not fit the model.
        InvalidRequestError: the monitor plan names what is not loaded.
    """
    model = load_model(resolve_model(config.model), getattr(torch, engine_config.dtype))
    packs = _built_in_packs(model) if config.packs is None else config.packs
    saes = _built_in_saes(model) if config.saes is None else config.saes
    catalog = Catalog.load(model, packs, saes)
    monitors = NO_MONITORS if config.monitor_plan is None else read_monitors(Path(config.monitor_plan), catalog)
    engine = Engine(model, catalog, engine_config, monitors=monitors)
    PolicyFiles(engine, config.policies).reload()
    if engine_config.compile:
        _log.info("compiling %s", model.name)
        _log.info("compiled in %.0f s", engine.warm_up())
    return engine


class Server:
    """One gRPC server around one engine; made, started and stopped in one event loop.

    Attributes:
        address: ``host:port`` as bound.
        http_address: that of HTTP, if it is on.
        metrics_address: that of Prometheus' metrics, if they are on.
        admin_address: that of operators, if they have one of their own.
        access: who may call; ``policy_files``: to read policies again.

    Raises:
        AssetError: an address cannot be bound, or a certificate not be read.
        PolicyError: the access file is wrong.
        InvalidRequestError: others could reach an address without a key, or read one on the wire.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        check_exposed("--host", config.host, config.access)
        if config.http.port is not None:
            check_exposed("--http-host", config.http.host, config.access)
        self._config = config
        self._instruments = Instruments(engine, config.telemetry)
        self.metrics_address = self._instruments.metrics_address
        interceptors = (*self._instruments.interceptors, DecodingInterceptor())
        self._server = grpc.aio.server(options=_channel_options(config), interceptors=interceptors)
        self._certificates = None if config.access.certificate is None else Certificates(config.access)
        credentials = None if self._certificates is None else self._certificates.server_credentials()
        self.address = bind(self._server, config.host, config.port, credentials)
        self._engine_loop = EngineLoop(engine, on_broken=self._report_broken)
        self._health = Health(self._server, (SERVICE,))
        self.access = Access(_path(config.access.file), lambda: _policies_of(engine))
        self._audit: AuditObserver | None = None
        if config.audit.directory is not None:
            self._audit = AuditObserver(config.audit, engine.model.fingerprint, self._report_audit)
            if self._instruments.metrics is not None:
                self._instruments.metrics.watch(self._audit)
        audits = () if self._audit is None else (self._audit,)
        service = Service(self._engine_loop, self.access.admit, (self.access, *self._instruments.observers, *audits))
        servicer = GenerationServicer(service, self._caller_of)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, self._server)
        self.policy_files = PolicyFiles(engine, config.policies)
        policies = PolicyServicer(engine, self.policy_files, self.access, self._caller_of)
        services = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._admin: AdminServer | None = None
        if config.access.admin_port is None:
            policy_pb2_grpc.add_PolicyServiceServicer_to_server(policies, self._server)
            services.append(POLICY_SERVICE)
        else:
            credentials = None if self._certificates is None else self._certificates.server_credentials()
            self._admin = AdminServer(config.access.admin_port, config, policies, credentials)
        self.admin_address = None if self._admin is None else self._admin.address
        reflection.enable_server_reflection(services, self._server)
        self._watching: list[asyncio.Task[None]] = []
        if config.envoy.policies:
            from steerserve.serving.envoy.processor import add_external_processor  # needs the extra "sidecar"

            add_external_processor(self._server, service, config, self._caller_of)
        self._http: HttpServer | None = None
        if config.http.port is not None:
            from steerserve.serving.http.server import HttpServer  # needs the extra "sidecar"

            def authenticate(request: Request) -> Caller:
                return self.access.authenticate(request.headers.get("authorization"))

            self._http = HttpServer(service, config, authenticate, self._health, self._certificates)
        self.http_address = None if self._http is None else self._http.address

    async def start(self) -> None:
        """Warm up and serve: health is SERVING when this returns."""
        await self._health.start()
        await self._server.start()
        if self._admin is not None:
            await self._admin.start()
        if self._http is not None:
            await self._http.start()
        hang = self._health.watch(self._engine_loop.seconds_in_step, self._config.telemetry.hang_s)
        watches = [hang, self.policy_files.watch()]
        if self._config.access.file is not None:
            watches.append(self.access.watch(_LOOK_AT_FILES_S))
        if self._certificates is not None:
            watches.append(self._certificates.watch(_LOOK_AT_FILES_S))
        self._watching = [asyncio.create_task(watch) for watch in watches]
        await _warm_up(self._engine_loop)
        await self._health.set_ready(True)

    async def stop(self) -> None:
        """Drain, then close: every running request ends in a reply, or in a status when its time is up."""
        await self._health.set_ready(False)
        for task in self._watching:
            task.cancel()
        self._watching = []
        await self._engine_loop.drain(self._config.drain_timeout_s)
        if self._http is not None:
            await self._http.stop()
        if self._admin is not None:
            await self._admin.stop(0)
        await self._server.stop(_FLUSH_S)
        await self._engine_loop.stop()
        if self._audit is not None:
            await self._audit.close()
        await asyncio.to_thread(self._instruments.stop)

    def _caller_of(self, context: Context) -> Caller:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self.access.authenticate(metadata.get("authorization"), certified_names(context))

    def _report_audit(self, is_written: bool) -> None:
        if self._watching:  # started, and not draining
            self._watching.append(asyncio.create_task(self._health.set_ready(is_written)))

    async def _report_broken(self) -> None:
        await self._health.set_ready(False)
        await self._health.set_alive(False)


async def serve(engine: Engine, config: ServerConfig, on_ready: Callable[[Server], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once. SIGHUP has policy files read again.

    Args:
        on_ready: called once health is SERVING; the server tells the addresses that were bound.
    """
    server = Server(engine, config)
    stop = asyncio.Event()
    event_loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        event_loop.add_signal_handler(number, stop.set)
    event_loop.add_signal_handler(signal.SIGHUP, server.policy_files.ask)
    await server.start()
    on_ready(server)
    await stop.wait()
    for number in (*signals, signal.SIGHUP):
        event_loop.remove_signal_handler(number)
    _log.info("draining")
    await server.stop()


def _policies_of(engine: Engine) -> frozenset[str]:
    """Names, with and without their versions, of all policies in force."""
    policies = engine.catalog.policies
    return frozenset(policies) | {policy.tag for policy in policies.values()}


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _built_in_packs(model: LoadedModel) -> list[str]:
    chosen: list[str] = []
    for path in sorted(path.parent for path in ASSETS.glob("packs/*/card.json")):
        made_on = load_pack(path).card.model
        if made_on.fingerprint == model.fingerprint:
            chosen.append(str(path))
        elif made_on.name == model.name:
            _log.warning("pack %s is not loaded: it was made on other weights than this %s", path.name, model.name)
    return chosen


def _built_in_saes(model: LoadedModel) -> list[str]:
    directories = sorted(path.parent for path in ASSETS.glob("saes/*/cfg.json"))
    return [str(path) for path in directories if load_sae(path).metadata.get("model_fingerprint") == model.fingerprint]


async def _warm_up(engine_loop: EngineLoop) -> None:
    """One short response under every policy that can act: allocations and first-call costs happen before SERVING."""
    engine = engine_loop.engine
    num_tokens = min(2, engine.config.max_model_len - 1)
    request = GenerateRequest(
        request_id="warm-up",
        prompt=(0,),
        sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        policies=tuple(pack.tag for pack in engine.catalog.packs.values() if engine.sites.issuperset(pack.sites)),
    )
    async with engine_loop.open(request) as outputs:
        async for _ in outputs:
            pass


def _channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        # Two servers on one port would share its connections without either noticing.
        ("grpc.so_reuseport", 0),
        # A client host that vanishes without closing its connection keeps its slot until a ping fails.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
