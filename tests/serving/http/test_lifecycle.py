"""Clients that go away or stop reading free their slot; a server that stops leaves no answer without an end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from steerserve.errors import AssetError
from steerserve.serving.app import Server

CHAT = [{"role": "user", "content": "Hello"}]
ENDLESS = {"model": None, "messages": CHAT, "max_tokens": 30_000, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def own_server(start_server, tiny):
    """A server that a test may stop or break."""
    with start_server(tiny.config(http={"port": 0})) as server:
        yield server


def connected(address: str) -> OpenAI:
    return OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


def raw_request(address: str, body: dict[str, object], announced: int | None = None) -> socket.socket:
    """A connection on which a chat was asked for; ``announced`` is the length that it claims to have."""
    content = json.dumps(body).encode()
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {announced or len(content)}\r\n\r\n".encode() + content)
    return connection


def test_closing_a_stream_in_the_middle_frees_its_slot(openai_client, http_server, wait_until) -> None:
    stream = openai_client.chat.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    assert http_server.engine.num_running == 1
    stream.close()
    wait_until(lambda: http_server.engine.num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_an_asynchronous_call_frees_its_slot(base_url, http_server, wait_until, stream) -> None:
    async def ask() -> None:
        async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            reply = await client.chat.completions.create(**ENDLESS, stream=stream)
            async for _ in reply:
                pass

    async def ask_and_cancel() -> None:
        asking = asyncio.create_task(ask())
        while http_server.engine.num_running == 0:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(ask_and_cancel())
    wait_until(lambda: http_server.engine.num_running == 0)


def test_a_client_that_dies_while_it_waits_leaves_the_queue(own_server, wait_until) -> None:
    body = {"messages": CHAT, "max_tokens": 30_000, "ignore_eos": True, "n": 5}  # on four slots
    with raw_request(own_server.http_address, body):
        wait_until(lambda: (own_server.engine.num_running, own_server.engine.num_waiting) == (4, 1))
    wait_until(lambda: (own_server.engine.num_running, own_server.engine.num_waiting) == (0, 0))


def test_a_client_that_reads_no_more_is_hung_up_on(start_server, tiny, wait_until, monkeypatch) -> None:
    def with_small_buffers(*args: object, **options: object) -> socket.socket:
        listening = create_server(*args, **options)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # those it accepts take after it
        return listening

    create_server = socket.create_server
    monkeypatch.setattr(socket, "create_server", with_small_buffers)
    body = {"messages": CHAT, "max_tokens": 30_000, "ignore_eos": True, "stream": True, "n": 4}
    with (
        start_server(tiny.config(http={"port": 0, "write_timeout_s": 0.2})) as server,
        raw_request(server.http_address, body | {"logprobs": True, "top_logprobs": 20}),
    ):
        wait_until(lambda: server.engine.num_running == 4)
        wait_until(lambda: server.engine.num_running == 0)


def test_a_body_that_does_not_arrive_is_given_up(start_server, tiny) -> None:
    with (
        start_server(tiny.config(http={"port": 0, "read_timeout_s": 0.2})) as server,
        raw_request(server.http_address, {"messages": CHAT}, announced=10_000) as connection,
    ):
        connection.settimeout(20)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_a_head_that_does_not_arrive_is_given_up(start_server, tiny) -> None:
    health = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"

    def answer(connection: socket.socket) -> bytes:
        received = connection.recv(1 << 16)
        while not received.endswith(b"}"):
            received += connection.recv(1 << 16)
        return received

    with start_server(tiny.config(http={"port": 0, "read_timeout_s": 2})) as server, ExitStack() as stack:
        host, _, port = server.http_address.rpartition(":")
        silent, partial, idle = (
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(3)
        )
        partial.sendall(health[:-2])
        idle.sendall(health)
        assert answer(idle).startswith(b"HTTP/1.1 200")
        assert [connection.recv(1 << 16) for connection in (silent, partial)] == [b"", b""]
        idle.sendall(health)
        assert answer(idle).startswith(b"HTTP/1.1 200"), "an idle connection stays"
        idle.sendall(health[:-2])
        assert idle.recv(1 << 16) == b"", "a later request"


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(own_server, monkeypatch, caplog) -> None:
    def fail() -> None:
        monkeypatch.undo()
        raise RuntimeError("secret detail")

    with connected(own_server.http_address) as client:
        stream = iter(client.chat.completions.create(**ENDLESS, stream=True))
        next(stream)
        monkeypatch.setattr(own_server.engine, "step", fail)
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        assert raised.value.body["type"] == "server_error"
        assert "secret" not in str(raised.value.body)
        reply = client.chat.completions.create(model=None, messages=CHAT, max_tokens=1)
        assert reply.usage.completion_tokens == 1


def test_an_engine_that_is_given_up_is_not_ready(own_server, monkeypatch, caplog, wait_until) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    def get(path: str) -> int:
        return httpx2.get(f"http://{own_server.http_address}{path}").status_code

    assert (get("/healthz"), get("/readyz")) == (200, 200)
    monkeypatch.setattr(own_server.engine, "step", fail)
    with connected(own_server.http_address) as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=None, messages=CHAT)
        wait_until(lambda: get("/readyz") == 503)
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model=None, messages=CHAT)
    assert raised.value.status_code == 503
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert get("/healthz") == 503, "only a restart helps"


def test_stopping_finishes_running_streams_and_refuses_new_ones(start_server, tiny, wait_until) -> None:
    running = ExitStack()
    server = running.enter_context(start_server(tiny.config(http={"port": 0})))
    with running, connected(server.http_address) as client, ThreadPoolExecutor(1) as pool:
        asked = {"model": None, "messages": CHAT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
        stream = iter(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        next(stream)
        stopped = pool.submit(running.close)
        wait_until(lambda: httpx2.get(f"http://{server.http_address}/readyz").status_code == 503)
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(**asked)
        assert raised.value.status_code == 503
        chunks = list(stream)
        assert chunks[-1].usage.completion_tokens == 200
        assert chunks[-2].choices[0].finish_reason == "length"
        stopped.result(60)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_a_port_in_use_is_refused(http_server, tiny) -> None:
    port = int(http_server.http_address.rpartition(":")[2])

    async def start_another() -> None:
        Server(http_server.engine, tiny.config(http={"port": port}))

    with pytest.raises(AssetError, match=str(port)):
        asyncio.run(start_another())


def test_the_command_says_where_http_is_and_drains_it(spawn_server, tiny, wait_until) -> None:
    with spawn_server([*tiny.arguments(), "--http-port", "0"]) as (process, _):
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked = {"model": None, "messages": CHAT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
            stream = iter(client.chat.completions.create(**asked, stream=True))
            chunks = [next(stream)]
            process.send_signal(signal.SIGTERM)
            chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 0
