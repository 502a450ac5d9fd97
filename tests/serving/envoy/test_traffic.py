"""Another model's traffic through Envoy: a policy's words are flagged, redacted or blocked, nothing else changes."""

from __future__ import annotations

import gzip
import json

import grpc
import pytest
from data_plane import EVENT_HEADERS, JSON_HEADERS, MODES, DataPlane, Mode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steerserve.types import REDACTED_TEXT

SERVING = health_pb2.HealthCheckResponse.SERVING
CALM = "The sun is out and all is well."
WINDY = "There is some wind today."
RAINY = "There is rain and more rain, raining rain."
STORMY = "A storm comes."


def chat(*texts: str, **more: object) -> bytes:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return json.dumps({"model": "other", "messages": messages, **more}).encode()


def answer(*texts: str, **more: object) -> bytes:
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
        for i, text in enumerate(texts)
    ]
    return json.dumps({"id": "x", "object": "chat.completion", "choices": choices}).encode()


def event(text: str | None, finish: str | None = None, index: int = 0, **more: object) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": index, "delta": delta, "finish_reason": finish, **more}
    return (
        b"data: " + json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"
    )


def stream_of(text: str) -> list[bytes]:
    """An answer in pieces of a few characters, as a model sends it."""
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    return [event("", role="assistant"), *map(event, pieces), event(None, "stop"), b"data: [DONE]\n\n"]


def events_of(body: bytes) -> list[dict[str, object]]:
    blocks = [block for block in body.decode().split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def text_of(body: bytes) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in events_of(body) for choice in chunk["choices"])


@pytest.mark.parametrize("mode", MODES)
def test_calm_traffic_passes_byte_for_byte(plane, mode) -> None:
    outcome = plane.carry([chat(CALM)], [answer(CALM)], mode=mode)
    assert (outcome.request.body, outcome.response.body) == (chat(CALM), answer(CALM))
    assert outcome.metadata["steerserve"]["response_verdict"] == "allow"
    assert outcome.response.headers["x-steerserve-request-verdict"] == "allow"
    stream = stream_of(CALM)
    outcome = plane.carry([chat(CALM)], stream, mode=mode, response_headers=EVENT_HEADERS)
    assert outcome.response.body == b"".join(stream)


def test_verdicts_are_headers_of_what_is_buffered(plane) -> None:
    outcome = plane.carry([chat(WINDY)], [answer(WINDY)])
    assert outcome.request.headers["x-steerserve-verdict"] == "flagged"
    assert outcome.response.headers["x-steerserve-verdict"] == "flagged"
    assert outcome.response.headers["x-steerserve-request-verdict"] == "flagged"
    assert (outcome.request.body, outcome.response.body) == (chat(WINDY), answer(WINDY))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_redacted_never_arrives(plane, mode) -> None:
    outcome = plane.carry([chat(RAINY)], [answer(RAINY, CALM, logprobs={"content": [{"token": " rain"}]})], mode=mode)
    (message,) = json.loads(outcome.request.body)["messages"]
    choices = json.loads(outcome.response.body)["choices"]
    for text in (message["content"], choices[0]["message"]["content"]):
        assert text == f"There is {REDACTED_TEXT} and more {REDACTED_TEXT}, raining {REDACTED_TEXT}."
    assert choices[0]["logprobs"] is None
    assert choices[1]["message"]["content"] == CALM
    assert outcome.metadata["steerserve"]["response_verdict"] == "redacted"


@pytest.mark.parametrize("mode", MODES)
def test_a_blocked_request_never_reaches_the_other_model(plane, mode) -> None:
    outcome = plane.carry([chat(STORMY)], mode=mode)
    assert outcome.immediate.status.code == 400
    error = json.loads(outcome.immediate.body)["error"]
    assert (error["code"], error["type"]) == ("content_filter", "invalid_request_error")
    headers = {option.header.key: option.header.raw_value for option in outcome.immediate.headers.set_headers}
    assert headers == {"content-type": b"application/json", "x-steerserve-verdict": b"blocked"}


@pytest.mark.parametrize("mode", MODES)
def test_a_blocked_choice_is_emptied_and_says_so(plane, mode) -> None:
    outcome = plane.carry([chat(CALM)], [answer(STORMY, CALM)], mode=mode)
    first, second = json.loads(outcome.response.body)["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("", "content_filter")
    assert (second["message"]["content"], second["finish_reason"]) == (CALM, "stop")


def test_only_what_the_user_said_last_is_judged(plane) -> None:
    body = chat(STORMY, STORMY, CALM)
    assert plane.carry([body], [answer(CALM)]).request.body == body
    assert plane.carry([chat(CALM, CALM, STORMY)]).immediate is not None


@pytest.mark.parametrize("prompt", [STORMY, [CALM, STORMY]])
def test_plain_completions_are_judged_too(plane, prompt) -> None:
    body = json.dumps({"prompt": prompt}).encode()
    assert plane.carry([body], path="/v1/completions?x=1").immediate.status.code == 400
    calm = json.dumps({"prompt": CALM}).encode()
    reply = json.dumps({"choices": [{"index": 0, "text": STORMY, "finish_reason": "stop"}]}).encode()
    outcome = plane.carry([calm], [reply], path="/v1/completions")
    assert json.loads(outcome.response.body)["choices"][0]["text"] == ""


def test_words_in_parts_and_in_tool_calls_are_found(plane) -> None:
    parts = [{"type": "text", "text": CALM}, {"type": "text", "text": STORMY}]
    body = json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
    assert plane.carry([body]).immediate is not None
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"q": "the storm"})}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}).encode()
    outcome = plane.carry([chat(CALM)], [reply])
    assert b"storm" not in outcome.response.body


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_is_redacted_across_its_pieces(plane, mode) -> None:
    text = "The forecast for the day: first some rain in the north, then sun, and rain at the end: rain"
    outcome = plane.carry([chat(CALM)], stream_of(text), mode=mode, response_headers=EVENT_HEADERS)
    assert text_of(outcome.response.body) == text.replace("rain", REDACTED_TEXT)
    assert events_of(outcome.response.body)[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("mode", MODES)
def test_a_blocked_stream_ends_cleanly_before_the_word(plane, mode) -> None:
    text = "It is calm at first, and it stays so for a good while, but then a storm comes and nothing is as it was."
    outcome = plane.carry([chat(CALM)], stream_of(text), mode=mode, response_headers=EVENT_HEADERS)
    seen = text_of(outcome.response.body)
    assert text.startswith(seen)
    assert "storm" not in seen
    assert len(seen) > 20 or mode == Mode.BUFFERED
    assert events_of(outcome.response.body)[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert outcome.metadata["steerserve"]["response_verdict"] == "blocked"


@pytest.mark.parametrize("mode", [Mode.STREAMED, Mode.FULL_DUPLEX_STREAMED])
def test_a_stream_flows_while_it_is_judged(plane, mode) -> None:
    """What is held back is bounded: most of a long answer is out before its end."""
    text = "one two three four five six seven eight nine ten " * 8
    outcome = plane.carry([chat(CALM)], stream_of(text), mode=mode, response_headers=EVENT_HEADERS)
    assert outcome.response.body == b"".join(stream_of(text))
    assert len([piece for piece in outcome.response.pieces if piece]) > 5


@pytest.mark.parametrize("cut", [5, 71, 1000])
def test_events_may_be_cut_anywhere(plane, cut) -> None:
    whole = b": ping\n\n" + b"".join(stream_of("There is rain in the north today.")).replace(b"\n\n", b"\r\n\r\n")
    pieces = [whole[i : i + cut] for i in range(0, len(whole), cut)]
    outcome = plane.carry([chat(CALM)], pieces, mode=Mode.STREAMED, response_headers=EVENT_HEADERS)
    assert outcome.response.body.startswith(b": ping\n\n")
    body = outcome.response.body.removeprefix(b": ping\n\n").replace(b"\r\n", b"\n")
    assert text_of(body) == "There is █ in the north today."


def test_choices_of_one_stream_are_judged_apart(plane) -> None:
    texts = {0: ["It is", " calm ", "here."], 1: ["Oh a st", "orm ", "there."]}
    pieces = [event(texts[i][k], index=i) for k in range(3) for i in (0, 1)]
    ends = [event(None, "stop", index=i) for i in (0, 1)]
    body = [*pieces, *ends, b"data: [DONE]\n\n"]
    outcome = plane.carry([chat(CALM)], body, mode=Mode.STREAMED, response_headers=EVENT_HEADERS)
    reasons = [choice["finish_reason"] for chunk in events_of(outcome.response.body) for choice in chunk["choices"]]
    assert "storm" not in text_of(outcome.response.body)
    assert reasons[-1] == "content_filter"


@pytest.mark.parametrize("mode", [Mode.STREAMED, Mode.FULL_DUPLEX_STREAMED])
def test_trailers_may_end_a_body(plane, mode) -> None:
    stream = stream_of(RAINY)
    outcome = plane.carry([], stream, mode=mode, response_headers=EVENT_HEADERS, trailers=True)
    assert outcome.response.body == b"".join(stream), "a request without a body was not judged, nor is its answer"
    if mode == Mode.FULL_DUPLEX_STREAMED:
        outcome = plane.carry([chat(CALM)], stream, mode=mode, response_headers=EVENT_HEADERS, trailers=True)
        assert "rain " not in text_of(outcome.response.body)


UNREADABLE = {
    "not JSON": {"request": [b"hello"]},
    "a key that stands twice": {"request": [b'{"messages": [], "messages": []}']},
    "deep": {"request": [b'{"messages": ' + b"[" * 100_000]},
    "token ids": {"request": [b'{"prompt": [1, 2]}'], "path": "/v1/completions"},
    "an image": {
        "request": [json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode()]
    },
    "another path": {"request": [chat(CALM)], "path": "/v1/embeddings"},
    "a compressed request": {
        "request": [gzip.compress(chat(CALM))], "request_headers": JSON_HEADERS | {"content-encoding": "gzip"},
    },
    "a compressed answer": {
        "request": [chat(CALM)], "response": [gzip.compress(answer(CALM))],
        "response_headers": JSON_HEADERS | {"content-encoding": "gzip"},
    },
    "an answer of another form": {"request": [chat(CALM)], "response": [b'{"output": "storm"}']},
    "an answer of another type": {
        "request": [chat(CALM)], "response": [b"storm"], "response_headers": {"content-type": "text/plain"},
    },
    "a stream of another form": {
        "request": [chat(CALM)], "response": [event(CALM), b"data: storm\n\n"], "response_headers": EVENT_HEADERS,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused(plane, case) -> None:
    outcome = plane.carry(**UNREADABLE[case])
    assert outcome.immediate.status.code in (400, 502)
    assert json.loads(outcome.immediate.body)["error"]["code"] == "unreadable"


def test_what_cannot_be_read_passes_where_the_policy_is_open(start_server, tiny, weather) -> None:
    config = tiny.config(**weather | {"envoy": {"policies": ("weather",), "fail_open": True}})
    with start_server(config, max_model_len=256) as server, DataPlane(server.address) as plane:
        for case in UNREADABLE.values():
            outcome = plane.carry(**case)
            assert outcome.immediate is None
            assert outcome.request.body == b"".join(case["request"])
            assert outcome.response.body == b"".join(case.get("response", ()))
        assert plane.carry([chat(STORMY)]).immediate.status.code == 400


def test_a_stream_that_becomes_unreadable_ends_with_an_error(plane) -> None:
    pieces = [event("It is calm here, and it will be so. "), b"data: {\n\n", event(STORMY)]
    outcome = plane.carry([chat(CALM)], pieces, mode=Mode.STREAMED, response_headers=EVENT_HEADERS)
    *_, last = events_of(outcome.response.body)
    assert last["error"]["code"] == "unreadable"
    assert b"storm" not in outcome.response.body


def test_errors_of_the_other_model_pass(plane) -> None:
    error = b'{"error": {"message": "overloaded"}}'
    outcome = plane.carry([chat(CALM)], [error], response_headers=JSON_HEADERS | {":status": "529"})
    assert outcome.response.body == error


def test_nobody_else_sets_the_verdict_and_nothing_is_compressed(plane) -> None:
    headers = JSON_HEADERS | {"x-steerserve-verdict": "allow", "accept-encoding": "gzip"}
    outcome = plane.carry([chat(WINDY)], [answer(CALM)], request_headers=headers)
    assert outcome.request.headers["x-steerserve-verdict"] == "flagged"
    assert "accept-encoding" not in outcome.request.headers


def test_observation_changes_nothing_and_is_not_answered(plane, envoy_server, caplog) -> None:
    with caplog.at_level("INFO", logger="steerserve.serving.envoy.traffic"):
        outcome = plane.carry([chat(RAINY)], [answer(RAINY)], observe=True)
    assert (outcome.request.body, outcome.response.body) == (chat(RAINY), answer(RAINY))
    assert "was redacted" in caplog.text


def test_a_judgement_that_fails_is_refused_and_leaks_nothing(start_server, tiny, weather, monkeypatch) -> None:
    def fail(request: object) -> None:
        raise RuntimeError("secret detail")

    with start_server(tiny.config(**weather), max_model_len=256) as server, DataPlane(server.address) as plane:
        monkeypatch.setattr(server.engine, "add_request", fail)
        outcome = plane.carry([chat(CALM)])
        assert (outcome.immediate.status.code, b"secret" in outcome.immediate.body) == (503, False)
        monkeypatch.undo()
        assert plane.carry([chat(CALM)], [answer(CALM)]).response.body == answer(CALM)


def test_an_answer_that_is_on_its_way_is_judged_through_a_drain(start_server, tiny, weather, wait_until) -> None:
    def late():
        """What the other model says after the server was told to stop."""
        server.begin_stop()
        wait_until(lambda: stub.Check(health_pb2.HealthCheckRequest()).status != SERVING)
        with pytest.raises(grpc.RpcError, match="shutting down"):
            plane.carry([chat(CALM)])
        yield answer(RAINY)

    with start_server(tiny.config(**weather), max_model_len=256) as server, DataPlane(server.address) as plane:
        with grpc.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            outcome = plane.carry([chat(CALM)], late())
        assert REDACTED_TEXT in json.loads(outcome.response.body)["choices"][0]["message"]["content"]
