"""Requests: wire messages to plain types and back."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TypeVar

from steerserve.errors import InvalidRequestError
from steerserve.serving.convert_steering import refuse_large_spec, spec_from_proto, spec_to_proto
from steerserve.serving.fields import (
    RequestMessage,
    bounded,
    expect,
    refuse_no_tokens,
    refuse_too_many,
    refuse_unknown_fields,
)
from steerserve.types import GenerateRequest, Message, Prompt, SamplingParams
from steerserve.v1 import generation_pb2

RequestT = TypeVar("RequestT", generation_pb2.GenerateRequest, generation_pb2.GenerateStreamRequest)

_INT32, _UINT32, _INT64 = (-(2**31), 2**31 - 1), (0, 2**32 - 1), (-(2**63), 2**63 - 1)
MAX_REQUEST_ID_LENGTH = 128
MAX_CACHE_SALT_LENGTH = 128
MAX_ELEMENTS = 4096


def request_from_proto(message: RequestMessage, timeout_s: float | None = None) -> GenerateRequest:
    """Read a request; one without an id gets a fresh one.

    Args:
        timeout_s: what is left of the call's deadline.

    Raises:
        InvalidRequestError: what no loaded model is needed to see; the rest is the engine's to check.
    """
    refuse_too_many(len(message.messages.messages), "messages.messages", MAX_ELEMENTS)
    for name in ("logit_bias", "stop", "stop_token_ids"):
        refuse_too_many(len(getattr(message.sampling, name)), f"sampling.{name}", MAX_ELEMENTS)
    refuse_large_spec(message.steering, "steering")
    refuse_unknown_fields(message)
    # Every piece of a stream repeats the id.
    _refuse_too_long(message.request_id, "request_id", MAX_REQUEST_ID_LENGTH)
    _refuse_too_long(message.cache_salt, "cache_salt", MAX_CACHE_SALT_LENGTH)
    return GenerateRequest(
        request_id=message.request_id or uuid.uuid4().hex,
        prompt=_prompt_from_proto(message),
        sampling=_sampling_from_proto(message.sampling),
        steering=spec_from_proto(message.steering, "steering"),
        policies=tuple(message.policies),
        return_activations=message.return_activations,
        priority=message.priority,
        timeout_s=timeout_s,
        cache_salt=message.cache_salt,
    )


def request_to_proto(request: GenerateRequest, message_type: type[RequestT]) -> RequestT:
    """Write a request as the message of either RPC.

    Raises:
        InvalidRequestError: a number or a text that its field cannot hold.
    """
    try:
        return _request_to_proto(request, message_type)
    except UnicodeEncodeError as error:
        raise InvalidRequestError("request", error.object, "text that UTF-8 can encode") from None


def _prompt_from_proto(message: RequestMessage) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "messages":
            return tuple(Message(turn.role, turn.content) for turn in message.messages.messages)
        case _:
            raise InvalidRequestError("prompt", None, "one of text, token_ids or messages")


def _request_to_proto(request: GenerateRequest, message_type: type[RequestT]) -> RequestT:
    message = message_type(
        request_id=request.request_id,
        sampling=_sampling_to_proto(request.sampling),
        steering=spec_to_proto(request.steering, "steering"),
        policies=request.policies,
        return_activations=request.return_activations,
        priority=bounded(request.priority, "priority", *_INT32),
        cache_salt=request.cache_salt,
    )
    _write_prompt(request.prompt, message)
    return message


def _write_prompt(prompt: Prompt, message: RequestMessage) -> None:
    if isinstance(prompt, str):
        message.text = prompt
        return
    token_ids, turns = generation_pb2.TokenIds(), generation_pb2.ChatMessages()
    elements: Sequence[int | Message] = prompt
    for i, element in enumerate(elements):
        if isinstance(element, Message):
            turns.messages.add(role=element.role, content=element.content)
        else:
            token_ids.ids.append(bounded(element, f"token_ids.ids[{i}]", *_UINT32))
    if turns.messages:
        message.messages.CopyFrom(turns)
    else:
        message.token_ids.CopyFrom(token_ids)


def _sampling_to_proto(sampling: SamplingParams) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        max_tokens=bounded(sampling.max_tokens, "sampling.max_tokens", *_INT32),
        n=sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=bounded(sampling.top_k, "sampling.top_k", *_INT32),
        seed=sampling.seed if sampling.seed is None else bounded(sampling.seed, "sampling.seed", *_INT64),
        ignore_eos=sampling.ignore_eos,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias={
            bounded(token_id, f"sampling.logit_bias[{token_id}]", *_UINT32): bias
            for token_id, bias in sampling.logit_bias.items()
        },
        stop=sampling.stop,
        stop_token_ids=[
            bounded(token_id, f"sampling.stop_token_ids[{i}]", *_UINT32)
            for i, token_id in enumerate(sampling.stop_token_ids)
        ],
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        logprobs=sampling.logprobs,
    )


def _sampling_from_proto(message: generation_pb2.SamplingParams) -> SamplingParams:
    # Both sides use the same names; what was left out is not listed and takes the default of the types.
    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    for name, plain in (("logit_bias", dict), ("stop", tuple), ("stop_token_ids", tuple)):
        if name in given:
            given[name] = plain(given[name])
    refuse_no_tokens(given.get("max_tokens", 1))
    return SamplingParams(**given)


def _refuse_too_long(text: str, field: str, limit: int) -> None:
    expect(len(text) <= limit, field, text, f"at most {limit} characters")
