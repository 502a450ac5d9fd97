"""Scoring a text that the server did not write, by a real client."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from steerserve import SteerserveClient
from steerserve.config import ServerConfig
from steerserve.errors import InvalidRequestError
from steerserve.v1 import generation_pb2_grpc, score_pb2

TEXT = "The first text, and then some more of it."


def test_scores_are_those_that_a_guard_of_generation_reads(client: SteerserveClient) -> None:
    scores = client.score(TEXT, return_tokens=True)
    reply = client.generate(TEXT, steer=["mood=monitor"], max_tokens=1, return_activations=True)
    read = [float(at.scores[0]) for at in reply.scores[: reply.num_prompt_tokens]]
    assert list(scores) == ["mood"]
    assert [token.score for token in scores["mood"].tokens] == read
    largest = scores["mood"].largest
    assert largest is not None
    assert largest.score == max(read)
    assert scores["mood"].flagged is (max(read) > scores["mood"].threshold)


def test_tokens_are_places_in_the_text(client: SteerserveClient) -> None:
    tokens = client.score("äöü 🙂 abc", return_tokens=True)["mood"].tokens
    assert [token.start for token in tokens] == sorted(token.start for token in tokens)
    assert tokens[-1].end == len("äöü 🙂 abc")


def test_the_largest_alone_unless_asked(client: SteerserveClient) -> None:
    every = client.score(TEXT, ["mood"], return_tokens=True)["mood"]
    assert client.score(TEXT)["mood"].tokens == (every.largest,)


def test_a_text_longer_than_the_context_is_read_to_its_end(start_server) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    with start_server(max_model_len=64) as server, SteerserveClient(server.address) as client:
        tokens = client.score(text, return_tokens=True)["mood"].tokens
    covered = np.zeros(len(text), dtype=bool)
    for token in tokens:
        covered[token.start : token.end] = True
    assert covered.all()


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
