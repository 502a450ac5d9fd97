"""Whatever is sent, the answer is JSON in OpenAI's shape that names the key; nothing is passed over in silence."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from steerserve.errors import ServiceError
from steerserve.serving.http.bodies import NEUTRAL, ChatBody, CompletionBody

CHAT = [{"role": "user", "content": "Hello"}]
JSON = {"content-type": "application/json"}
SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def http(base_url):
    with httpx2.Client(base_url=base_url) as client:
        yield client


CHAT_CASES = {
    "a misspelt guard": ({"polices": ["mood"]}, "polices", "such as policies"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "does not support"),
    "structured output": ({"response_format": {"type": "json_object"}}, "response_format", "does not support"),
    "a tool that must be called": ({"tool_choice": "required"}, "tool_choice", "does not support"),
    "reasoning": ({"reasoning_effort": "high"}, "reasoning_effort", "does not support"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text",
    ),
    "a speaker's name": ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name", "role"),
    "a speaker of no template": ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role", "system"),
    "no content": ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "valid array"),
    "no messages": ({"messages": []}, "messages", "at least one"),
    "messages left out": ({"messages": None}, "messages", "valid array"),
    "a number as text": ({"temperature": "1"}, "temperature", "number"),
    "temperature": ({"temperature": -1}, "temperature", ">= 0"),
    "top_p": ({"top_p": 2}, "top_p", "(0, 1]"),
    "n": ({"n": 65}, "n", "[1, 64]"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", ">= 1"),
    "no room": ({"max_tokens": 32_768}, "max_tokens", "at most"),
    "no room, by the newer name": ({"max_completion_tokens": 32_768}, "max_completion_tokens", "at most"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "4"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "[0, 20]"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    "seed": ({"seed": -1}, "seed", ">= 0"),
    "a seed beyond 64 bits": ({"seed": 2**63}, "seed", "less"),
    "an empty stop string": ({"stop": ["a", ""]}, "stop[1]", "characters"),
    "a bias": ({"logit_bias": {"5": 101}}, "logit_bias[5]", "[-100, 100]"),
    "a bias on no token": ({"logit_bias": {"x": 1}}, "logit_bias.x", "integer"),
    "a bias on an unknown token": ({"logit_bias": {"1000000": 1}}, "logit_bias[1000000]", "token id"),
    "an unknown policy": ({"policies": ["mood", "nope"]}, "policies[1]", "mood"),
    "steering as text": ({"steering": "mood=block"}, "steering", "list of strings"),
    "steering with a wrong operation": ({"steering": ["mood=explode"]}, "steering[0] (operation)", "clamp"),
    "an unknown concept on a line": ({"steering": ["mood=block", "nope=block"]}, "steering[1]", "mood"),
    "a file of the server": ({"steering": [f"direction:/etc/passwd@{SITE}=add:1"]}, "steering[0]", "JSON form"),
    "a file in a guard": (
        {"guards": [f"mood>1=rewind:3 with direction:x.npy@{SITE}=block"]}, "guards[0]", "JSON form",
    ),
    "an unknown concept in a guard": ({"guards": ["nope>1=block"]}, "guards[0]", "mood"),
    "an unknown concept in JSON": (
        {"steering": {"interventions": [{"concept": "nope", "op": "OP_BLOCK"}]}},
        "steering.interventions[0].concept", "mood",
    ),
    "a wrong feature in JSON": (
        {"steering": {"interventions": [{"feature": {"sae": "tiny-sae", "feature": 99}, "op": "OP_BLOCK"}]}},
        "steering.interventions[0].feature.feature", "31",
    ),
    "an unknown key in JSON": ({"steering": {"interventions": [{"concpet": "mood"}]}}, "steering", "concpet"),
    "a guard without threshold": (
        {"steering": {"guards": [{"concept": "mood", "action": "GUARD_ACTION_BLOCK"}]}},
        "steering.guards[0].threshold", "finite",
    ),
    "a priority beyond 32 bits": ({"priority": 2**31}, "priority", "less"),
    "a long salt": ({"cache_salt": "x" * 129}, "cache_salt", "128"),
    "usage of what": ({"stream_options": {"usage": True}}, "stream_options.usage", "permitted"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAT_CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_chat_is_refused_with_its_key(openai_client, case, stream) -> None:
    changes, param, hint = CHAT_CASES[case]
    body = {"model": None, "messages": CHAT, "stream": stream, "max_tokens": 1} | changes
    if "max_completion_tokens" in changes and "max_tokens" not in changes:
        del body["max_tokens"]
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.post("/chat/completions", body=body, cast_to=object)
    assert (raised.value.param, raised.value.type) == (param, "invalid_request_error")
    assert hint in raised.value.body["message"]
    assert raised.value.request_id.startswith("chatcmpl-")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [5, 10**6]}, "prompt[1]"),
        ({"prompt": [[5], [5, -1]]}, "prompt[1][1]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt"),
        ({"prompt": [[5] * 40_000]}, "prompt[0]"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_a_wrong_completion_is_refused_with_its_key(openai_client, changes, param) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.post("/completions", body={"prompt": "Hello", "max_tokens": 1} | changes, cast_to=object)
    assert raised.value.param == param


def test_another_model_is_not_found(openai_client) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        openai_client.chat.completions.create(model="gpt-4o", messages=CHAT)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    assert "tiny-llama" in raised.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("POST", "/nothing", JSON, b"{}", 404),
        ("GET", "/chat/completions", {}, b"", 405),
        ("POST", "/chat/completions", {"content-type": "text/plain"}, b"{}", 415),
        ("POST", "/chat/completions", JSON | {"content-encoding": "gzip"}, b"{}", 415),
        ("POST", "/chat/completions", JSON, b" " * (5 << 20), 413),
        ("POST", "/chat/completions", JSON, b"", 400),
        ("POST", "/chat/completions", JSON, b"\xff\xfe", 400),
        ("POST", "/chat/completions", JSON, b"[]", 400),
        ("POST", "/chat/completions", JSON, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("POST", "/chat/completions", JSON, b'{"messages": [], "temperature": NaN}', 400),
        ("POST", "/chat/completions", JSON, b'{"steering": ' + b"[" * 100_000, 400),
        ("POST", "/chat/completions", JSON, b'{"steering": ' + b"[" * 190 + b"]" * 190 + b"}", 400),
        ("POST", "/chat/completions", JSON, b'{"seed": ' + b"9" * 100_000 + b"}", 400),
        ("POST", "/completions", JSON, b'{"prompt": "x", "temperature": 1e999}', 400),
    ],
)
def test_what_is_no_request_is_refused_in_the_same_shape(http, method, path, headers, content, status) -> None:
    reply = http.request(method, path, headers=headers, content=content)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 2000
    assert http.post("/completions", json={"prompt": "Hello", "max_tokens": 1}).status_code == 200


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
INTERVENTION = st.fixed_dictionaries(
    {},
    optional={
        "concept": st.sampled_from(["mood", "nope"]),
        "op": st.sampled_from(["OP_BLOCK", "OP_ADD", "OP_CLAMP", "", 3, 99]),
        "raw": st.floats() | st.integers(),
        "direction": st.fixed_dictionaries({"site": st.just(SITE), "vector": st.text(max_size=8)}),
        "phase": ANYTHING,
    },
)
STEERING = st.fixed_dictionaries(
    {}, optional={"interventions": st.lists(INTERVENTION, max_size=2), "guards": st.lists(ANYTHING, max_size=2)}
)
PLAUSIBLE = {
    "max_tokens": st.just(1),
    "messages": st.just(CHAT),
    "prompt": st.sampled_from(["Hello", ["a", "b"], [5, 6]]),
    "steering": STEERING | st.just(["mood=monitor"]),
    "model": st.none(),
    "stream_options": st.just({"include_usage": True}),
}
KEYS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *NEUTRAL})
BODIES = st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=3).flatmap(
    lambda odd: st.fixed_dictionaries({}, optional=PLAUSIBLE).map(lambda plausible: {"max_tokens": 1} | plausible | odd)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/chat/completions", "/completions"]), body=BODIES)
def test_no_body_is_answered_with_an_error_of_the_server(http, path, body) -> None:
    with http.stream("POST", path, headers=JSON, content=json.dumps(body)) as reply:
        content = reply.read()
    assert reply.status_code in (200, 400, 404)
    if reply.status_code != 200:
        assert json.loads(content)["error"]["message"]


def test_a_full_queue_says_when_to_retry(start_server, tiny, wait_until) -> None:
    with (
        start_server(tiny.config(http={"port": 0}), max_num_seqs=1, max_waiting=1) as server,
        OpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        options = {"model": None, "messages": CHAT, "max_tokens": 30_000, "extra_body": {"ignore_eos": True}}
        running = client.chat.completions.create(**options, stream=True)
        waiting = pool.submit(client.chat.completions.create, **options, stream=True)
        wait_until(lambda: server.engine.num_waiting == 1)
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(**options)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        assert (raised.value.type, raised.value.code) == ("rate_limit_error", "capacity")
        running.close()
        waiting.result(20).close()


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (RuntimeError("secret detail"), 500, "internal error"),
        (ServiceError("UNAUTHENTICATED", "no key"), 401, "no key"),
        (ServiceError("PERMISSION_DENIED", "not yours"), 403, "not yours"),
        (ServiceError("DEADLINE_EXCEEDED", "too slow"), 504, "too slow"),
    ],
)
def test_what_the_service_raises_becomes_a_status(
    openai_client, http_server, monkeypatch, caplog, error, status, shown
) -> None:
    def fail(request: object) -> None:
        raise error

    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(http_server.engine, "add_request", fail)
    with pytest.raises(openai.APIStatusError) as raised:
        openai_client.chat.completions.create(model=None, messages=CHAT)
    assert raised.value.status_code == status
    assert shown in raised.value.body["message"]
    assert "secret" not in raised.value.response.text
