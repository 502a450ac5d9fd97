"""A server with an audit log: no answer without its record, and no text in it unless it was asked for."""

from __future__ import annotations

import json
import os
import threading
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steerserve import SteerserveClient
from steerserve.errors import InvalidRequestError, ServiceError
from steerserve.serving.audit import files as audit_files
from steerserve.serving.audit.files import log_files
from steerserve.serving.audit.keys import AuditKey, create_keys, load_public_key
from steerserve.serving.audit.verify import Report, verify_log
from steerserve.types import VerdictKind

SECRET = "a prompt that nobody may read"
LONG = {"max_tokens": 30_000, "ignore_eos": True}


def records(root: Path) -> list[dict[str, Any]]:
    lines = [line for path in log_files(root / "log") for line in path.read_text().splitlines()]
    return [json.loads(line)["body"] for line in lines]


def exchanges(root: Path) -> list[dict[str, Any]]:
    return [body for body in records(root) if body["kind"] == "exchange"]


def verify(root: Path) -> Report:
    key, public = AuditKey.load(root / "keys" / "audit.key"), load_public_key(root / "keys" / "heads.pub")
    return verify_log(root / "log", [key], root / "heads.jsonl", public)


@pytest.fixture
def audited(tiny, start_server, tmp_path):
    """Starts a server with a log below ``tmp_path``."""
    mac, signing, _ = create_keys(tmp_path / "keys")

    def start(**changes: object):
        audit = {
            "directory": str(tmp_path / "log"),
            "key": str(mac),
            "heads": str(tmp_path / "heads.jsonl"),
            "signing_key": str(signing),
        }
        return start_server(tiny.config(audit=audit | changes))

    return start


def test_every_exchange_has_its_record_before_its_answer(audited, tmp_path, wait_until) -> None:
    with audited() as server, SteerserveClient(server.address) as client:
        reply = client.generate(SECRET, policies=["mood"], max_tokens=3, ignore_eos=True, n=2, request_id="first")
        (record,) = exchanges(tmp_path)
        assert record["request_id"] == "first"
        assert record["policies"] == ["mood@1"]
        assert record["plan"] == reply.receipt.plan_hash
        assert record["prompt_tokens"] == reply.num_prompt_tokens
        assert [each["tokens"] for each in record["responses"]] == [3, 3]
        assert {each["verdict"] for each in record["responses"]} == {"modified"}
        assert record["responses"][0]["receipt"]["interventions"][0]["covered"] > 0
        assert record["error"] is None
        with pytest.raises(InvalidRequestError):
            client.generate("Hello", policies=["unheard-of"])
        assert exchanges(tmp_path)[1]["error"] == {"code": "INVALID_ARGUMENT", "field": "policies[0]"}
        stream = client.generate_stream("Hello", **LONG)
        next(stream)
        stream.close()
        wait_until(lambda: len(exchanges(tmp_path)) == 3)
        assert exchanges(tmp_path)[2]["error"]["code"] == "CANCELLED"
        assert exchanges(tmp_path)[2]["responses"][0]["tokens"] >= 1
    report = verify(tmp_path)
    assert report.is_sound
    assert report.proved_by is not None
    assert report.proved_by.seq == report.last_seq == 5
    assert [body["kind"] for body in records(tmp_path)] == ["start", *["exchange"] * 3, "stop"]
    assert SECRET not in "".join(path.read_text() for path in log_files(tmp_path / "log"))


def test_texts_hash_alike_and_are_there_only_if_asked_for(audited, tmp_path) -> None:
    with audited(log_text=True) as server, SteerserveClient(server.address) as client:
        replies = [client.generate(SECRET, max_tokens=4, temperature=0.0) for _ in range(2)]
    first, second = exchanges(tmp_path)
    assert first["prompt"] == SECRET
    assert first["responses"][0]["text"] == replies[0].text
    assert first["prompt_hmac"] == second["prompt_hmac"]
    expected = AuditKey.load(tmp_path / "keys" / "audit.key").text_hash()
    expected.update(replies[0].text.encode())
    assert first["responses"][0]["text_hmac"] == expected.hexdigest()


def test_no_last_piece_before_the_disk_has_the_record(audited, monkeypatch) -> None:
    with audited() as server, SteerserveClient(server.address) as client:
        may_sync = threading.Event()
        real = os.fsync
        with monkeypatch.context() as slow:
            slow.setattr(audit_files.os, "fsync", lambda file: (may_sync.wait(20), real(file))[1])
            stream = client.generate_stream("Hello", max_tokens=3, ignore_eos=True)
            pieces = [next(stream), next(stream)]
            last: list = []
            reader = threading.Thread(target=lambda: last.extend(stream))
            reader.start()
            reader.join(0.3)
            assert not last
            assert all(piece.finish_reason is None for piece in pieces)
            # The event loop does not wait with it.
            assert client.get_server_info().num_requests_running == 0
            may_sync.set()
            reader.join(20)
        assert last[-1].finish_reason is not None


def test_metrics_tell_how_far_the_log_is_behind(tiny, start_server, tmp_path, monkeypatch, wait_until) -> None:
    mac, _, _ = create_keys(tmp_path / "keys")
    config = tiny.config(audit={"directory": str(tmp_path / "log"), "key": str(mac)}, telemetry={"metrics_port": 0})
    with start_server(config) as server, SteerserveClient(server.address) as client:

        def gauge(name: str) -> float:
            text = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10).read().decode()
            return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

        client.generate("Hello", max_tokens=2)
        assert [gauge(name) for name in LAG] == [0, 0, 2, 0]  # unproved: this one and the record of the start
        may_sync = threading.Event()
        real = os.fsync
        with monkeypatch.context() as slow:
            slow.setattr(audit_files.os, "fsync", lambda file: (may_sync.wait(20), real(file))[1])
            asking = threading.Thread(target=lambda: client.generate("Hello", max_tokens=2))
            asking.start()
            wait_until(lambda: gauge("steerserve_audit_records_waiting") == 1)
            wait_until(lambda: gauge("steerserve_audit_lag_seconds") > 0.1)
            may_sync.set()
            asking.join(20)
        assert [gauge(name) for name in LAG] == [0, 0, 3, 0]


LAG = (
    "steerserve_audit_records_waiting",
    "steerserve_audit_lag_seconds",
    "steerserve_audit_records_unproved",
    "steerserve_audit_failing",
)


def test_a_disk_that_fails_ends_answers_and_readiness_until_it_works(
    audited, tmp_path, monkeypatch, wait_until
) -> None:
    def fail(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with (
        audited() as server,
        SteerserveClient(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        probe = health_pb2_grpc.HealthStub(channel)

        def is_ready() -> bool:
            status = probe.Check(health_pb2.HealthCheckRequest()).status
            return status == health_pb2.HealthCheckResponse.SERVING

        with monkeypatch.context() as broken:
            broken.setattr(audit_files.os, "write", fail)
            for _ in range(2):
                with pytest.raises(ServiceError) as raised:
                    client.generate("Hello", max_tokens=2)
                assert raised.value.code == "UNAVAILABLE"
            wait_until(lambda: not is_ready())
        wait_until(is_ready)
        assert client.generate("Hello", max_tokens=2).token_ids
    assert verify(tmp_path).is_sound


def test_verdicts_reach_the_client(server, client) -> None:
    reply = client.generate("Hello", policies=["mood"], guards=["mood>-1000000=flag"], max_tokens=2, ignore_eos=True)
    assert [(each.source, each.kind) for each in reply.verdicts] == [
        ("policy:mood@1", VerdictKind.MODIFIED),
        ("request", VerdictKind.FLAGGED),
    ]
    assert len(reply.verdicts[1].positions) == len(reply.verdicts[1].scores) == reply.num_prompt_tokens + 2
    assert reply.verdicts[1].threshold == -1_000_000
