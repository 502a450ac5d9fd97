"""The official client gets from HTTP what the gRPC client gets: the same text, steering and proof of it."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest
from google.protobuf.json_format import MessageToDict
from openai import AsyncOpenAI

from steerserve import Message, SteerserveClient
from steerserve.serving.convert_response import receipt_to_proto

PROMPT = "The capital of France is"
CHAT = [{"role": "user", "content": "Who are you?"}]
TURNS = [Message("user", "Who are you?")]
MODEL = "tiny-llama"
SITE = "blocks.2.hook_resid_post"


@pytest.fixture
def grpc_client(http_server):
    with SteerserveClient(http_server.address) as client:
        yield client


def text_of(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_a_chat_completion_is_what_grpc_answers(openai_client, grpc_client) -> None:
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    extras = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "policies": ["mood"]}
    expected = grpc_client.generate(TURNS, **options, **extras)
    reply = openai_client.chat.completions.create(model=MODEL, messages=CHAT, **options, extra_body=extras)
    (choice,) = reply.choices
    assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
    assert (reply.object, reply.model, choice.finish_reason) == ("chat.completion", MODEL, "length")
    assert reply.usage.prompt_tokens == expected.num_prompt_tokens
    assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (12, 12 + expected.num_prompt_tokens)


def test_the_receipt_is_the_one_of_grpc(openai_client, grpc_client) -> None:
    extras = {"steering": ["tiny-sae/3=clamp_always:1x"], "policies": ["mood"], "cache_salt": "fresh for each"}
    expected = grpc_client.generate(
        TURNS, steer=extras["steering"], policies=["mood"], temperature=0, max_tokens=4, cache_salt="another"
    )
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=4, extra_body=extras
    )
    report = reply.choices[0].steerserve
    wire = MessageToDict(
        receipt_to_proto(expected.receipt), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    assert report["receipt"] == wire
    assert report["receipt"]["steered"] is True
    assert report["guard_events"] == []
    assert (report["verdict"], len(report["verdicts"])) == ("VERDICT_KIND_MODIFIED", len(expected.verdicts))


def direction_towards(tiny, token_id: int) -> dict[str, object]:
    vector = base64.b64encode(tiny.unembedding[token_id].numpy().astype("<f4").tobytes()).decode()
    return {"direction": {"site": SITE, "vector": vector}}


def test_both_forms_of_steering(openai_client, tiny, tokenizer) -> None:
    def answer(steering: object) -> str:
        reply = openai_client.chat.completions.create(
            model=MODEL, messages=CHAT, temperature=0, max_tokens=3, extra_body={"steering": steering}
        )
        return reply.choices[0].message.content

    forced = tokenizer.decode([tiny.feature_token[9]] * 3)
    feature = {"feature": {"sae": "tiny-sae", "feature": 9}, "op": "OP_CLAMP", "max_activation": 1.0, "always": True}
    assert answer(["tiny-sae/9=clamp_always:1x"]) == forced
    assert answer({"interventions": [feature]}) == forced
    direction = direction_towards(tiny, 500) | {"op": "OP_ADD", "raw": 1000.0}
    assert answer({"interventions": [direction]}) == tokenizer.decode([500] * 3)
    assert answer([]) == answer(None) == answer({})


@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_that_blocks_ends_with_content_filter(openai_client, stream) -> None:
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=5, stream=stream, extra_body={"guards": ["mood>-1000000=block"]}
    )
    chunks = list(reply) if stream else [reply]
    choice = chunks[-1].choices[0]
    assert choice.finish_reason == "content_filter"
    assert text_of(chunks) == "" if stream else choice.message.content == ""
    assert choice.steerserve["finish_reason"] == "FINISH_REASON_BLOCKED"
    assert choice.steerserve["guard_events"][0]["action"] == "GUARD_ACTION_BLOCK"


def test_guards_of_both_keys_count(openai_client, tiny) -> None:
    steering = {"guards": [{"concept": "mood", "threshold": 1e9, "action": "GUARD_ACTION_BLOCK"}]}
    extras = {"steering": steering, "guards": ["mood>-1000000=flag"]}
    reply = openai_client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2, extra_body=extras)
    assert {event["guard"] for event in reply.choices[0].steerserve["guard_events"]} == {1}


def test_a_chat_stream_adds_up_to_the_whole_answer(openai_client) -> None:
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 12, "seed": 3, "n": 2, "logprobs": True}
    options["extra_body"] = {"policies": [], "return_activations": True, "steering": ["mood=monitor"]}
    whole = openai_client.chat.completions.create(**options)
    chunks = list(openai_client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert {chunk.id for chunk in chunks} == {last.id}
    assert (last.choices, last.usage.completion_tokens) == ([], 24)
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == choice.index]
        assert "".join(piece.delta.content for piece in mine) == choice.message.content
        assert [piece.delta.role for piece in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + ["length"]
        logprobs = [entry for piece in mine if piece.logprobs for entry in piece.logprobs.content]
        assert [entry.token for entry in logprobs] == [entry.token for entry in choice.logprobs.content]
        assert len(logprobs) == 12
        scores = [at for piece in mine for at in (piece.model_extra.get("steerserve") or {}).get("scores", [])]
        assert [at["position"] for at in scores] == [at["position"] for at in choice.steerserve["scores"]]
        assert mine[-1].steerserve["num_generated_tokens"] == 12


def test_logprobs_name_tokens_and_their_bytes(openai_client, grpc_client, tokenizer) -> None:
    expected = grpc_client.generate(TURNS, seed=2, max_tokens=6, logprobs=3)
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=CHAT, seed=2, max_tokens=6, logprobs=True, top_logprobs=3
    )
    for token_id, entry, content in zip(
        expected.token_ids, expected.logprobs, reply.choices[0].logprobs.content, strict=True
    ):
        text = tokenizer.decode([token_id])
        assert content.token == text
        assert content.bytes == (None if "�" in text else list(text.encode()))
        assert content.logprob == pytest.approx(entry.logprob, abs=1e-6)
        assert [top.token for top in content.top_logprobs] == [tokenizer.decode([other]) for other, _ in entry.top]


@pytest.mark.parametrize("form", ["text", "list of one", "texts", "ids", "lists of ids"])
def test_every_form_of_prompt_of_a_plain_completion(openai_client, grpc_client, tokenizer, form) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    prompt = {
        "text": PROMPT, "list of one": [PROMPT], "texts": [PROMPT, "Hello"], "ids": ids, "lists of ids": [ids, ids],
    }[form]  # fmt: skip
    reply = openai_client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=4)
    expected = grpc_client.generate(PROMPT, temperature=0, max_tokens=4)
    assert len(reply.choices) == (2 if form in ("texts", "lists of ids") else 1)
    assert reply.choices[0].text == expected.text
    assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
    if form == "lists of ids":
        assert reply.choices[1].text == expected.text
        assert reply.usage.prompt_tokens == 2 * len(ids)


def test_a_stream_of_several_prompts_adds_up(openai_client) -> None:
    options = {"model": MODEL, "prompt": [PROMPT, "Hello", "Once"], "n": 2, "seed": 4, "max_tokens": 5, "logprobs": 2}
    whole = openai_client.completions.create(**options)
    chunks = list(openai_client.completions.create(**options, stream=True))
    assert len(whole.choices) == 6
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason == "length"
        offsets = [offset for piece in mine if piece.logprobs for offset in piece.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset
        assert len(offsets) == 5
    assert whole.usage.completion_tokens == 30


def test_stop_strings_and_logit_bias(openai_client) -> None:
    forced = {"logit_bias": {"1234": 100}, "temperature": 0, "max_tokens": 4}
    free = openai_client.completions.create(model=MODEL, prompt=PROMPT, **forced).choices[0]
    stopped = openai_client.completions.create(model=MODEL, prompt=PROMPT, stop=free.text[1:4], **forced).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (free.text[:1], "stop", free.text[1:4])


def test_a_message_may_come_in_parts_and_carry_empty_keys(openai_client, grpc_client) -> None:
    parts = [{"type": "text", "text": "Who are"}, {"type": "text", "text": "you?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": "I am.", "tool_calls": [], "refusal": None},
        {"role": "user", "content": "Go on."},
    ]
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_completion_tokens=6
    )
    turns = [
        Message("system", "Be brief."), Message("user", "Who are\nyou?"), Message("assistant", "I am."),
        Message("user", "Go on."),
    ]  # fmt: skip
    expected = grpc_client.generate(turns, temperature=0, max_tokens=6)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.prompt_tokens == expected.num_prompt_tokens


def test_keys_that_change_nothing_are_accepted(openai_client) -> None:
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=1, user="me", metadata={"a": "b"}, store=False, n=1, tools=[],
        tool_choice="none", response_format={"type": "text"}, service_tier="auto", logit_bias=None, stop=None,
    )  # fmt: skip
    assert reply.choices[0].finish_reason in ("length", "stop")


def test_the_models_there_are(openai_client) -> None:
    assert [model.id for model in openai_client.models.list()] == [MODEL]
    assert openai_client.models.retrieve(MODEL).owned_by == "steerserve"


def test_many_asynchronous_clients_at_once(base_url) -> None:
    """More than there are slots, streamed and not: each gets its own answer."""

    async def ask(client: AsyncOpenAI, i: int) -> str:
        options = {"model": MODEL, "messages": CHAT, "max_tokens": 6, "temperature": 0}
        options["extra_body"] = {"steering": [f"tiny-sae/{i}=clamp_always:1x"]}
        if i % 2:
            reply = await client.chat.completions.create(**options)
            return reply.choices[0].message.content
        stream = await client.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(10)))

    answers = asyncio.run(all_of_them())
    assert len(set(answers)) == 10
    assert all(answer == answer[: len(answer) // 6] * 6 for answer in answers)


def test_the_id_is_in_the_body_and_in_the_header(openai_client) -> None:
    raw = openai_client.chat.completions.with_raw_response.create(model=MODEL, messages=CHAT, max_tokens=1)
    assert json.loads(raw.text)["id"] == raw.headers["x-request-id"]
    assert raw.headers["x-request-id"].startswith("chatcmpl-")
