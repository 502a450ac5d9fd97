"""The server: what it loads, how it starts and how it stops.

Warm-up first, then health SERVING. On SIGTERM or SIGINT: health NOT_SERVING, new requests refused,
running ones finished, port closed. Health, reflection and the info calls answer until the end.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import Engine
from steerserve.errors import AssetError
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model
from steerserve.sae.registry import load_sae
from steerserve.serving.engine_loop import EngineLoop
from steerserve.serving.service import Service
from steerserve.serving.servicer import GenerationServicer
from steerserve.steering.catalog import ASSETS, Catalog
from steerserve.steering.pack_files import load_pack
from steerserve.types import GenerateRequest, SamplingParams
from steerserve.v1 import generation_pb2, generation_pb2_grpc

_log = logging.getLogger(__name__)

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Time for complete answers to reach their clients after the port has closed.
_FLUSH_S = 1.0


def load_engine(config: ServerConfig, engine_config: EngineConfig) -> Engine:
    """Load the model, pulling it first if need be, and everything that requests may name.

    Raises:
        AssetError: a model, SAE or pack is missing or damaged.
        IncompatibleError: a pack or SAE that was asked for by name does not fit the model.
    """
    model = load_model(resolve_model(config.model), getattr(torch, engine_config.dtype))
    packs = _built_in_packs(model) if config.packs is None else config.packs
    saes = _built_in_saes(model) if config.saes is None else config.saes
    engine = Engine(model, Catalog.load(model, packs, saes), engine_config)
    if engine_config.compile:
        _log.info("compiling %s", model.name)
        _log.info("compiled in %.0f s", engine.warm_up())
    return engine


class Server:
    """One gRPC server around one engine; made, started and stopped in one event loop.

    Attributes:
        address: ``host:port`` as bound.

    Raises:
        AssetError: the address cannot be bound.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self._config = config
        self._server = grpc.aio.server(options=_channel_options(config))
        try:
            port = self._server.add_insecure_port(f"{config.host}:{config.port}")
        except RuntimeError as error:
            raise AssetError(f"cannot listen on {config.host}:{config.port}; is another server using it?") from error
        self.address = f"{config.host}:{port}"
        self._engine_loop = EngineLoop(engine, on_broken=self._report_broken)
        self._health = health.aio.HealthServicer()
        service = Service(self._engine_loop)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(service), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Warm up and serve: health is SERVING when this returns."""
        await self._set_health(_NOT_SERVING)
        await self._server.start()
        await _warm_up(self._engine_loop)
        await self._set_health(_SERVING)

    async def stop(self) -> None:
        """Drain, then close: every running request ends in a reply, or in a status when its time is up."""
        await self._set_health(_NOT_SERVING)
        await self._engine_loop.drain(self._config.drain_timeout_s)
        await self._server.stop(_FLUSH_S)
        await self._engine_loop.stop()

    async def _set_health(self, status: int) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _report_broken(self) -> None:
        await self._set_health(_NOT_SERVING)


async def serve(engine: Engine, config: ServerConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once.

    Args:
        on_ready: called with the bound address once health is SERVING.
    """
    server = Server(engine, config)
    stop = asyncio.Event()
    event_loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        event_loop.add_signal_handler(number, stop.set)
    await server.start()
    on_ready(server.address)
    await stop.wait()
    for number in signals:
        event_loop.remove_signal_handler(number)
    _log.info("draining")
    await server.stop()


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
        # Two servers on one port would share its connections without either noticing.
        ("grpc.so_reuseport", 0),
        # A client host that vanishes without closing its connection keeps its slot until a ping fails.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
