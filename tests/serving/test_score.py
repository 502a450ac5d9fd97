"""Scoring a text that the server did not write, by a real client."""

from __future__ import annotations

import json
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from steerserve import SteerserveClient
from steerserve.cli import app
from steerserve.config import PolicyConfig, ServerConfig
from steerserve.errors import InvalidRequestError, ServiceError
from steerserve.types import TextVerdict, VerdictKind
from steerserve.v1 import generation_pb2_grpc, score_pb2

TEXT = "The first text, and then some more of it."
MANY = [" ".join(f"word{index * index * step}" for index in range(12)) for step in range(1, 40)]
"""Some of them show the mood of a random model."""
POLICIES = """
format: steerserve.policy/1
name: {name}
version: 7
rules:
  - {{concept: mood, action: block, name: largest, threshold: {largest}, phase: generated}}
  - {{concept: mood, action: rewind, name: never, threshold: 1.0e+30}}
  - {{concept: mood, action: clamp, name: edits, phase: {phase}}}
"""


def test_scores_are_those_that_a_guard_of_generation_reads(client: SteerserveClient) -> None:
    scores = client.score(TEXT, return_tokens=True).concepts
    reply = client.generate(TEXT, steer=["mood=monitor"], max_tokens=1, return_activations=True)
    read = [float(at.scores[0]) for at in reply.scores[: reply.num_prompt_tokens]]
    assert list(scores) == ["mood"]
    assert [token.score for token in scores["mood"].tokens] == read
    largest = scores["mood"].largest
    assert largest is not None
    assert largest.score == max(read)
    assert scores["mood"].flagged is (max(read) > scores["mood"].threshold)


def test_tokens_are_places_in_the_text(client: SteerserveClient) -> None:
    tokens = client.score("äöü 🙂 abc", return_tokens=True).concepts["mood"].tokens
    assert [token.start for token in tokens] == sorted(token.start for token in tokens)
    assert tokens[-1].end == len("äöü 🙂 abc")


def test_the_largest_alone_unless_asked(client: SteerserveClient) -> None:
    every = client.score(TEXT, ["mood"], return_tokens=True).concepts["mood"]
    assert client.score(TEXT).concepts["mood"].tokens == (every.largest,)


def test_a_text_longer_than_the_context_is_read_to_its_end(start_server) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    with start_server(max_model_len=64) as server, SteerserveClient(server.address) as client:
        read = client.score(text, return_tokens=True)
        tokens = read.concepts["mood"].tokens
    covered = np.zeros(len(text), dtype=bool)
    for token in tokens:
        covered[token.start : token.end] = True
    assert covered.all()
    assert len(read.receipts) > 1


@pytest.mark.parametrize(
    ("text", "concepts", "problem"),
    [
        ("", [], "text: got '', expected at least one character"),
        ("x", ["moody"], r"concepts\[0\]: got 'moody', expected a loaded concept, each once: mood"),
        ("x", ["mood", "mood"], r"concepts\[1\]: got 'mood'"),
    ],
)
def test_what_cannot_be_scored(client: SteerserveClient, text: str, concepts: list[str], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        client.score(text, concepts)


def test_unknown_fields_are_refused(server) -> None:
    message = score_pb2.ScoreRequest.FromString(score_pb2.ScoreRequest(text="x").SerializeToString() + b"\x98\x06\x01")
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as raised:
        generation_pb2_grpc.GenerationServiceStub(channel).Score(message)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_text_without_policies_on_a_tenant_with_some(start_server, tiny, tmp_path) -> None:
    """What a tenant's policies edit does not change what is read."""
    from steerserve.config import AccessConfig
    from steerserve.serving.keys import key_hash, new_key

    key = new_key()
    file = tmp_path / "access.yaml"
    file.write_text(
        "format: steerserve.access/1\ntenants: {a: {policies: {required: [mood]}, may_steer: false}}\n"
        f"keys: [{{id: k, tenant: a, sha256: {key_hash(key)}}}]\n"
    )
    config: ServerConfig = tiny.config(access=AccessConfig(file=str(file)))
    with start_server(config) as server, SteerserveClient(server.address, api_key=key) as ours:
        guarded = ours.score(TEXT)
    with start_server() as server, SteerserveClient(server.address) as ours:
        assert ours.score(TEXT) == guarded


def test_what_policies_would_do(start_server, tiny, tmp_path) -> None:
    with start_server() as server, SteerserveClient(server.address) as client:
        text = next(text for text in MANY if client.score(text).flagged)
        scores = client.score(text, return_tokens=True).concepts["mood"]
    largest = scores.largest
    assert largest is not None
    flagged = tuple(token for token in scores.tokens if token.score > scores.threshold)
    assert 0 < len(flagged) < len(scores.tokens)
    below = float(np.nextafter(np.float32(largest.score), np.float32(-np.inf)))
    (tmp_path / "a.yaml").write_text(POLICIES.format(name="acts", largest=repr(below), phase="all"))
    (tmp_path / "b.yaml").write_text(POLICIES.format(name="rests", largest=repr(largest.score), phase="prompt"))
    config: ServerConfig = tiny.config(policies=PolicyConfig(directory=str(tmp_path)))
    with start_server(config) as server, SteerserveClient(server.address) as client:
        judged = client.score(text, policies=["rests", "acts@7"])
        assert client.score(text).verdicts == ()
        with pytest.raises(InvalidRequestError, match=r"policies\[1\]: got 'wrong'"):
            client.score(text, policies=["acts", "wrong"])
    resting, acting, flagging = judged.verdicts
    assert resting == TextVerdict(VerdictKind.ALLOW, "rests@7")
    assert (acting.kind, acting.policy, acting.rule, acting.tokens) == (
        VerdictKind.BLOCKED,
        "acts@7",
        "largest",
        (largest,),
    )
    assert flagging == TextVerdict(VerdictKind.FLAGGED, "acts@7", "edits", scores.threshold, flagged)
    assert judged.concepts["mood"].largest == largest, "the clamp edits nothing"


def test_the_receipt_proves_that_every_token_was_read(client: SteerserveClient) -> None:
    read = client.score(TEXT, return_tokens=True)
    (receipt,) = read.receipts
    (line,) = receipt.interventions
    assert line.tokens_in_scope == line.tokens_covered == len(read.concepts["mood"].tokens)
    assert receipt.packs.keys() == {"mood@1"}


def test_the_clients_deadline_ends_the_work(start_server, wait_until) -> None:
    with start_server(max_num_batched_tokens=4) as server, SteerserveClient(server.address) as client:
        with pytest.raises(ServiceError) as raised:
            client.score("word " * 30_000, timeout=0.5)
        assert raised.value.code == "DEADLINE_EXCEEDED"
        began = time.monotonic()
        wait_until(lambda: not server.engine.has_unfinished())
        assert time.monotonic() - began < 5


def test_a_file_of_texts(client: SteerserveClient, server, tmp_path: Path) -> None:
    texts = [f"text number {index}" for index in range(20)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)))
    result = CliRunner().invoke(app, ["score", "--file", str(file), "--policy", "mood", "--target", server.address])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["id"] for line in lines] == list(range(20))
    for text, line in zip(texts, lines, strict=True):
        read = client.score(text, policies=["mood"])
        score = read.concepts["mood"]
        assert line["text"] == text
        assert line["flagged"] is read.flagged
        assert line["scores"]["mood"]["score"] == score.largest.score
        assert line["verdicts"][0]["policy"] == "mood@1"
    assert result.exit_code == int(any(line["flagged"] for line in lines))
    assert "scoring" in result.stderr


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "at least one line"), ('{"text": "a"}\n{"text": ""}\n', "texts.jsonl:2"), ("[1]", "texts.jsonl:1")],
)
def test_a_file_that_is_none(content: str, problem: str, server, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    result = CliRunner().invoke(app, ["score", "--file", str(file), "--target", server.address])
    assert result.exit_code != 0
    assert problem in result.output + str(result.exception)


def test_the_command_shows_where_a_text_is_flagged(server, client: SteerserveClient) -> None:
    result = CliRunner().invoke(app, ["score", TEXT, "--target", server.address])
    assert "mood" in result.stdout
    assert result.exit_code == int(client.score(TEXT).flagged)
    assert CliRunner().invoke(app, ["score", "--target", server.address]).exit_code == 2
