"""What operators see: metrics that add up, spans in the caller's trace, a log that tells no prompt, honest probes."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from steerserve import SteerserveClient
from steerserve.config import TelemetryConfig
from steerserve.errors import ServiceError, SteerserveError
from steerserve.serving import tracing
from steerserve.serving.logs import configure_logs
from steerserve.serving.metrics import MAX_LABEL_VALUES, OTHERS, Metrics
from steerserve.serving.service import Caller, Exchange, Interface
from steerserve.serving.telemetry import Passage
from steerserve.types import GenerateRequest
from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import generation_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG = {"max_tokens": 30_000, "ignore_eos": True}

Scrape = Callable[..., float]


@pytest.fixture(scope="module")
def measured(start_server, tiny) -> Iterator:
    with start_server(tiny.config(telemetry={"metrics_port": 0})) as server:
        yield server


@pytest.fixture
def scrape(measured) -> Scrape:
    """The value of one series; 0 if it is not there yet."""

    def value(name: str, **labels: str) -> float:
        text = urllib.request.urlopen(f"http://{measured.metrics_address}/metrics", timeout=10).read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = [sample.value for sample in samples if sample.name == name and sample.labels == labels]
        return found[0] if found else 0.0

    return value


@pytest.fixture
def client(measured) -> Iterator[SteerserveClient]:
    with SteerserveClient(measured.address) as connected:
        yield connected


def test_tokens_and_latencies_add_up(client, scrape) -> None:
    before = {name: scrape(name) for name in COUNTED}
    replies = [
        client.generate("Hello there", max_tokens=5, ignore_eos=True),
        client.generate("Hello", max_tokens=7, ignore_eos=True),
    ]
    after = {name: scrape(name) for name in COUNTED}
    prompt_tokens = sum(reply.num_prompt_tokens for reply in replies)
    assert {name: after[name] - before[name] for name in COUNTED} == {
        "steerserve_prompt_tokens_total": prompt_tokens,
        "steerserve_generation_tokens_total": 12,
        "steerserve_prefix_cache_queries_total": prompt_tokens,
        "steerserve_time_to_first_token_seconds_count": 2,
        "steerserve_inter_token_latency_seconds_count": 10,
        "steerserve_e2e_request_latency_seconds_count": 2,
        "steerserve_request_generation_tokens_sum": 12,
    }


COUNTED = (
    "steerserve_prompt_tokens_total",
    "steerserve_generation_tokens_total",
    "steerserve_prefix_cache_queries_total",
    "steerserve_time_to_first_token_seconds_count",
    "steerserve_inter_token_latency_seconds_count",
    "steerserve_e2e_request_latency_seconds_count",
    "steerserve_request_generation_tokens_sum",
)


def test_texts_that_are_only_read_are_no_generations(client, scrape) -> None:
    generations = {name: scrape(name) for name in COUNTED}
    read = "steerserve_read_tokens_total", "steerserve_reading_seconds_count"
    before = [scrape(name) for name in read]
    (receipt,) = client.score("Some text of another model").receipts
    assert [scrape(name) for name in read] == [before[0] + receipt.interventions[0].tokens_in_scope, before[1] + 1]
    assert {name: scrape(name) for name in COUNTED if "cache" not in name} == {
        name: value for name, value in generations.items() if "cache" not in name
    }
    assert scrape("steerserve_requests_total", interface="grpc", kind="reading", code="OK") == 1


def test_a_policy_is_counted_by_name_with_its_verdict_edits_and_scores(client, scrape) -> None:
    edited = scrape("steerserve_edited_tokens_total", policy="mood")
    modified = scrape("steerserve_verdicts_total", policy="mood", verdict="modified")
    reply = client.generate("Hello", policies=["mood"], max_tokens=3)
    assert scrape("steerserve_edited_tokens_total", policy="mood") - edited == (
        reply.receipt.interventions[0].tokens_edited
    )
    assert scrape("steerserve_verdicts_total", policy="mood", verdict="modified") - modified == 1
    label = reply.receipt.interventions[0].label
    assert scrape("steerserve_concept_score_count", policy="mood", edit=label) == 1
    assert scrape("steerserve_policy_info", policy="mood", version="1") == 1


def test_refusals_and_cancellations_are_counted_by_status(client, scrape, wait_until) -> None:
    with pytest.raises(SteerserveError):
        client.generate("Hello", policies=["nobody"])
    assert scrape("steerserve_requests_total", interface="grpc", kind="generation", code="INVALID_ARGUMENT") == 1
    stream = client.generate_stream("Hello", **LONG)
    next(stream)
    assert scrape("steerserve_num_requests_running") == 1
    assert 0 < scrape("steerserve_kv_cache_usage_perc") < 1
    stream.close()
    wait_until(lambda: scrape("steerserve_requests_total", interface="grpc", kind="generation", code="CANCELLED") == 1)
    wait_until(lambda: scrape("steerserve_num_requests_running") == 0)
    assert scrape("steerserve_kv_cache_usage_perc") == 0


def test_rewinds_are_counted(client, scrape) -> None:
    before = scrape("steerserve_rewinds_total"), scrape("steerserve_rewound_tokens_total")
    reply = client.generate(
        "Hello", guards=["mood>-1e9=rewind:2@generated with mood=block else flag"], max_tokens=6, ignore_eos=True
    )
    after = scrape("steerserve_rewinds_total"), scrape("steerserve_rewound_tokens_total")
    assert reply.receipt.num_rewinds >= 1
    assert after == (before[0] + reply.receipt.num_rewinds, before[1] + reply.receipt.num_rewound_tokens)


def test_a_caller_cannot_make_labels_grow(measured) -> None:
    metrics = Metrics(measured.engine)
    for number in range(3 * MAX_LABEL_VALUES):
        exchange = Exchange(GenerateRequest("id", "text"), Caller(tenant=f"tenant-{number}"), Interface.GRPC)
        metrics.on_end(Passage(exchange), ServiceError("UNAUTHENTICATED", "no such key"))
    families = {family.name: family for family in metrics.registry.collect()}
    requests = families["steerserve_tenant_requests"].samples
    counts = {s.labels["tenant"]: s.value for s in requests if s.name == "steerserve_tenant_requests_total"}
    assert len(counts) == MAX_LABEL_VALUES + 1
    assert counts[OTHERS] == 2 * MAX_LABEL_VALUES


def test_process_metrics_are_there(scrape) -> None:
    assert scrape("process_resident_memory_bytes") > 0


@pytest.fixture
def traced(start_server, tiny, monkeypatch) -> Iterator[tuple[str, InMemorySpanExporter]]:
    """The address of a server that traces, and where its spans go."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_to_otlp", lambda: SimpleSpanProcessor(exporter))
    with start_server(tiny.config(telemetry={"traces": True})) as server:
        yield server.address, exporter


def one_span(exporter: InMemorySpanExporter, wait_until) -> ReadableSpan:
    wait_until(lambda: len(exporter.get_finished_spans()) == 1)
    return exporter.get_finished_spans()[0]


def test_a_span_joins_the_callers_trace_and_says_what_was_asked_and_done(traced, wait_until) -> None:
    address, exporter = traced
    trace_id, parent_id = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
    with grpc.insecure_channel(address) as channel:
        request = pb.GenerateRequest(request_id="r1", text="Hello", policies=["mood"])
        request.sampling.max_tokens = 3
        metadata = (("traceparent", f"00-{trace_id:032x}-{parent_id:016x}-01"),)
        generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, metadata=metadata, timeout=60)
    span = one_span(exporter, wait_until)
    assert (span.context.trace_id, span.parent.span_id) == (trace_id, parent_id)
    assert span.name == "text_completion tiny-llama"
    assert span.attributes["gen_ai.operation.name"] == "text_completion"
    assert span.attributes["gen_ai.response.id"] == "r1"
    assert span.attributes["gen_ai.request.max_tokens"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert span.attributes["steerserve.verdicts"] == ("mood: modified",)
    assert [event.name for event in span.events] == ["first token"]
    assert span.start_time < span.events[0].timestamp < span.end_time
    assert not any("Hello" in str(value) for value in span.attributes.values())


def test_a_refused_request_has_a_span_too(traced, wait_until) -> None:
    address, exporter = traced
    with SteerserveClient(address) as client, pytest.raises(SteerserveError):
        client.generate("Hello", policies=["nobody"])
    assert one_span(exporter, wait_until).attributes["error.type"] == "INVALID_ARGUMENT"


@pytest.fixture
def log_as(monkeypatch) -> Iterator[Callable[[str], io.StringIO]]:
    """Sets up the log in a format; where it goes. Called by the test: pytest takes standard error anew before it."""
    root = logging.getLogger()
    level = root.level

    def start(log_format: str) -> io.StringIO:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(root, "handlers", [])
        configure_logs(TelemetryConfig(log_format=log_format))
        return stream

    yield start
    logging.captureWarnings(False)
    root.setLevel(level)


def entries(log: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_a_request_is_one_line_with_its_id_and_without_its_text(server, log_as, wait_until) -> None:
    log = log_as("json")
    with SteerserveClient(server.address) as client:
        client.generate("SECRET PROMPT", request_id="ours", policies=["mood"], max_tokens=2)
        with pytest.raises(SteerserveError):
            client.generate("SECRET PROMPT " * 20_000, request_id="too-long", max_tokens=2)
    wait_until(lambda: sum(line["event"] == "request" for line in entries(log)) == 2)
    done, refused = (line for line in entries(log) if line["event"] == "request")
    assert (done["request_id"], done["code"], done["generated_tokens"]) == ("ours", "OK", 2)
    assert done["verdicts"] == ["mood: modified"]
    assert (refused["request_id"], refused["code"]) == ("too-long", "INVALID_ARGUMENT")
    assert "SECRET" not in json.dumps(entries(log))


def test_what_goes_wrong_inside_a_request_is_logged_with_its_id_and_no_locals(
    start_server, monkeypatch, log_as
) -> None:
    def fail(request: GenerateRequest) -> None:
        raise RuntimeError("a bug")

    log = log_as("json")
    with start_server() as server, SteerserveClient(server.address) as client:
        monkeypatch.setattr(server.engine, "add_request", fail)
        with pytest.raises(ServiceError):
            client.generate("SECRET PROMPT", request_id="ours", max_tokens=2)
        (line,) = (line for line in entries(log) if line["level"] == "error")
    assert line["request_id"] == "ours"
    assert "a bug" in json.dumps(line["exception"])
    assert "SECRET" not in json.dumps(line)


def test_a_request_id_cannot_forge_a_line_of_the_console_log(log_as) -> None:
    log = log_as("console")
    logging.getLogger("test").info("request", extra={"request_id": "a\n2026-01-01 [error] forged"})
    assert len(log.getvalue().splitlines()) == 1


def probe(address: str, service: str) -> int:
    with grpc.insecure_channel(address) as channel:
        return (
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        )


def test_a_drain_is_not_ready_but_alive(spawn_server, tiny, wait_until) -> None:
    with spawn_server(tiny.arguments()) as (process, address), SteerserveClient(address) as client:
        assert [probe(address, name) for name in ("liveness", "readiness", "")] == [SERVING] * 3
        stream = client.generate_stream("Hello", **LONG)
        next(stream)
        process.terminate()
        wait_until(lambda: probe(address, "readiness") == NOT_SERVING)
        assert probe(address, "liveness") == SERVING
        stream.close()
        assert process.wait(60) == 0


def test_an_engine_that_is_given_up_asks_for_a_restart(start_server, monkeypatch, wait_until) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with start_server() as server, SteerserveClient(server.address) as client:
        assert probe(server.address, "liveness") == SERVING
        monkeypatch.setattr(server.engine, "step", fail)
        with pytest.raises(ServiceError):
            client.generate("Hello", max_tokens=2)
        wait_until(lambda: probe(server.address, "liveness") == NOT_SERVING)


def test_a_step_that_hangs_asks_for_a_restart(start_server, tiny, monkeypatch, wait_until) -> None:
    released = threading.Event()
    with start_server(tiny.config(telemetry={"hang_s": 0.2})) as server, SteerserveClient(server.address) as client:
        step = server.engine.step

        def hang() -> object:
            released.wait(30)
            return step()

        monkeypatch.setattr(server.engine, "step", hang)
        stream = client.generate_stream("Hello", max_tokens=2)
        reading = threading.Thread(target=list, args=(stream,))
        reading.start()
        wait_until(lambda: probe(server.address, "liveness") == NOT_SERVING)
        released.set()
        wait_until(lambda: probe(server.address, "liveness") == SERVING)
        reading.join(30)


def test_the_cli_serves_metrics_and_logs_json(tiny) -> None:
    arguments = [*tiny.arguments(), "--num-threads", "1", "--metrics-port", "0", "--log-format", "json"]
    command = [sys.executable, "-m", "steerserve", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            url = process.stdout.readline().split()[-1]
            assert b"steerserve_model_info" in urllib.request.urlopen(url, timeout=10).read()
            process.terminate()
            assert all(json.loads(line) for line in process.stderr.read().splitlines())
            assert process.wait(30) == 0
        finally:
            process.kill()
