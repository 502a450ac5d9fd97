"""Requests that end early free their slot; servers that stop or break leave no request without an end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steerserve import SteerserveClient
from steerserve.errors import AssetError, ServiceError
from steerserve.serving import engine_loop
from steerserve.serving.app import Server
from steerserve.types import FinishReason, StepOutput

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG = {"max_tokens": 30_000, "ignore_eos": True}
STREAMING_CLIENT = """
import sys
from steerserve import SteerserveClient
for piece in SteerserveClient(sys.argv[1]).generate_stream("Hello", max_tokens=30_000, ignore_eos=True):
    print("streaming", flush=True)
"""


@pytest.fixture
def own_server(start_server):
    """A server that a test may stop or break."""
    with start_server() as server:
        yield server


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status


def load(client: SteerserveClient) -> tuple[int, int]:
    """Requests that run and that wait."""
    info = client.get_server_info()
    return info.num_requests_running, info.num_requests_waiting


def num_running(client: SteerserveClient) -> int:
    return load(client)[0]


def test_health_covers_the_server_and_the_service(server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "steerserve.v1.GenerationService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING


def test_killing_a_streaming_client_frees_its_slot(client, server, wait_until) -> None:
    command = [sys.executable, "-c", STREAMING_CLIENT, server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "streaming\n"
        assert num_running(client) == 1
        process.kill()
    wait_until(lambda: num_running(client) == 0)
    assert client.generate("Hello", max_tokens=2).token_ids


@pytest.mark.parametrize("rpc", ["unary", "stream"])
def test_a_deadline_frees_the_slot(client, wait_until, rpc) -> None:
    with pytest.raises(ServiceError) as raised:
        if rpc == "unary":
            client.generate("Hello", timeout=0.5, **LONG)
        else:
            list(client.generate_stream("Hello", timeout=0.5, **LONG))
    assert raised.value.code == "DEADLINE_EXCEEDED"
    wait_until(lambda: num_running(client) == 0)


@pytest.mark.parametrize("n", [1, 6])
def test_closing_a_stream_frees_its_slots_and_its_id(client, wait_until, n) -> None:
    for _ in range(2):
        stream = client.generate_stream("Hello", request_id="again", n=n, **LONG)
        assert next(stream).finish_reason is None
        wait_until(lambda: load(client) == (min(n, 4), max(n - 4, 0)))
        stream.close()
        wait_until(lambda: load(client) == (0, 0))


def test_a_failing_step_ends_its_requests_and_the_server_goes_on(own_server, monkeypatch, caplog, wait_until) -> None:
    """Five responses of three requests on four slots: running and waiting ones all end, and nothing is left of them."""
    step = own_server.engine.step

    def fail_once() -> None:
        monkeypatch.setattr(own_server.engine, "step", step)
        raise RuntimeError("secret detail")

    def ask(n: int) -> ServiceError:
        with pytest.raises(ServiceError) as raised:
            client.generate("Hello", timeout=60, n=n, **LONG)
        return raised.value

    with SteerserveClient(own_server.address) as client, ThreadPoolExecutor(6) as pool:
        errors = pool.map(ask, (2, 2, 1))
        wait_until(lambda: load(client) == (4, 1))
        monkeypatch.setattr(own_server.engine, "step", fail_once)
        for error in errors:
            assert (error.code, "secret" in str(error)) == ("INTERNAL", False)
        assert "secret detail" in caplog.text
        assert load(client) == (0, 0)
        assert len(client.generate("Hello", max_tokens=2, ignore_eos=True).token_ids) == 2
        assert health(own_server.address) == SERVING


def test_an_engine_that_keeps_failing_is_reported_and_answers_with_a_status(
    own_server, monkeypatch, wait_until
) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(own_server.engine, "step", fail)
    with SteerserveClient(own_server.address) as client:
        with pytest.raises(ServiceError):
            client.generate("Hello", max_tokens=2)
        wait_until(lambda: health(own_server.address) == NOT_SERVING)
        with pytest.raises(ServiceError) as raised:
            client.generate("Hello", max_tokens=2)
        assert raised.value.code == "UNAVAILABLE"


def test_a_step_that_hangs_does_not_hold_up_the_end(tiny, start_server, monkeypatch, caplog) -> None:
    hangs, let_go = threading.Event(), threading.Event()

    def hang() -> list[StepOutput]:
        hangs.set()
        let_go.wait(60)
        return []

    monkeypatch.setattr(engine_loop, "_LAST_STEP_S", 0.2)
    with start_server(tiny.config(drain_timeout_s=0.2)) as server, SteerserveClient(server.address) as client:
        monkeypatch.setattr(server.engine, "step", hang)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.generate, "Hello", max_tokens=2)
            assert hangs.wait(60)
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < 20
            with pytest.raises(ServiceError, match="the server stopped before"):
                asked.result(60)
        let_go.set()
    assert "is left behind" in caplog.text


def test_an_unexpected_exception_at_admission_is_internal_and_leaks_nothing(own_server, monkeypatch) -> None:
    def fail(request: object) -> None:
        raise RuntimeError("secret detail")

    with SteerserveClient(own_server.address) as client:
        with monkeypatch.context() as patched:
            patched.setattr(own_server.engine, "add_request", fail)
            with pytest.raises(ServiceError) as raised:
                client.generate("Hello", max_tokens=2)
        assert (raised.value.code, "secret" in str(raised.value)) == ("INTERNAL", False)
        assert client.generate("Hello", max_tokens=2).token_ids


def test_sigterm_finishes_running_streams_and_refuses_new_ones(spawn_server, tiny, wait_until) -> None:
    with spawn_server(tiny.arguments()) as (process, address), SteerserveClient(address) as client:
        assert health(address) == SERVING
        stream = client.generate_stream("Hello", max_tokens=200, ignore_eos=True)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(list, stream)
            wait_until(lambda: health(address) == NOT_SERVING)
            with pytest.raises(ServiceError) as raised:
                client.generate("Hello", max_tokens=1)
            pieces += rest.result(120)
        assert raised.value.code == "UNAVAILABLE"
        assert sum(len(piece.token_ids) for piece in pieces) == 200
        assert pieces[-1].finish_reason is FinishReason.LENGTH
        assert pieces[-1].receipt is not None
        assert process.wait(20) == 0


def test_a_drain_that_takes_too_long_ends_streams_with_a_status(spawn_server, tiny) -> None:
    arguments = [*tiny.arguments(), "--drain-timeout-s", "0.2"]
    with spawn_server(arguments) as (process, address), SteerserveClient(address) as client:
        stream = client.generate_stream("Hello", **LONG)
        next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises(ServiceError) as raised:
            list(stream)
        assert raised.value.code == "UNAVAILABLE"
        assert process.wait(20) == 0


def test_a_port_in_use_is_refused(server, tiny) -> None:
    port = int(server.address.rpartition(":")[2])

    async def start_another() -> None:
        Server(server.engine, tiny.config(port=port))

    with pytest.raises(AssetError, match=str(port)):
        asyncio.run(start_another())
