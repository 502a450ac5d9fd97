"""Requests: wire messages to plain types and back."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.serving.fields import RequestMessage, bounded, expect, refuse_unknown_fields
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    GenerateRequest,
    Intervention,
    Message,
    Op,
    Phase,
    Prompt,
    SamplingParams,
    Site,
    SteeringSpec,
    Target,
    Unit,
)
from steerserve.v1 import generation_pb2, steering_pb2

RequestT = TypeVar("RequestT", generation_pb2.GenerateRequest, generation_pb2.GenerateStreamRequest)

_OPS = {steering_pb2.Op.Value(f"OP_{op.name}"): op for op in Op}
_PHASES = {steering_pb2.PHASE_UNSPECIFIED: Phase.ALL} | {
    steering_pb2.Phase.Value(f"PHASE_{phase.name}"): phase for phase in Phase
}
_INT32, _UINT32, _INT64 = (-(2**31), 2**31 - 1), (0, 2**32 - 1), (-(2**63), 2**63 - 1)
MAX_REQUEST_ID_LENGTH = 128
MAX_ELEMENTS = 4096


def request_from_proto(message: RequestMessage) -> GenerateRequest:
    """Read a request; one without an id gets a fresh one.

    Raises:
        InvalidRequestError: what no loaded model is needed to see; the rest is the engine's to check.
    """
    _refuse_too_many(len(message.steering.interventions), "steering.interventions")
    _refuse_too_many(len(message.messages.messages), "messages.messages")
    for name in ("logit_bias", "stop", "stop_token_ids"):
        _refuse_too_many(len(getattr(message.sampling, name)), f"sampling.{name}")
    refuse_unknown_fields(message)
    # Every piece of a stream repeats the id.
    expected = f"at most {MAX_REQUEST_ID_LENGTH} characters"
    expect(len(message.request_id) <= MAX_REQUEST_ID_LENGTH, "request_id", message.request_id, expected)
    return GenerateRequest(
        request_id=message.request_id or uuid.uuid4().hex,
        prompt=_prompt_from_proto(message),
        sampling=_sampling_from_proto(message.sampling),
        steering=SteeringSpec(
            tuple(
                intervention_from_proto(intervention, f"steering.interventions[{i}]")
                for i, intervention in enumerate(message.steering.interventions)
            )
        ),
        policies=tuple(message.policies),
        return_activations=message.return_activations,
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


def intervention_from_proto(message: steering_pb2.Intervention, path: str) -> Intervention:
    """Read one intervention; ``path`` is where it stands in the request."""
    expect(message.op in _OPS, f"{path}.op", message.op, f"one of {', '.join(f'OP_{op.name}' for op in Op)}")
    expect(
        message.phase in _PHASES,
        f"{path}.phase",
        message.phase,
        f"one of {', '.join(f'PHASE_{p.name}' for p in Phase)}",
    )
    value_field = message.WhichOneof("value")
    return Intervention(
        target=_target_from_proto(message, path),
        op=_OPS[message.op],
        value=None if value_field is None else getattr(message, value_field),
        unit=Unit.RAW if value_field is None else Unit(value_field),
        always=message.always,
        phase=_PHASES[message.phase],
    )


def intervention_to_proto(intervention: Intervention, path: str) -> steering_pb2.Intervention:
    """Write one intervention; ``path`` is where it stands in the request."""
    message = steering_pb2.Intervention(
        op=steering_pb2.Op.Value(f"OP_{intervention.op.name}"),
        always=intervention.always,
        phase=steering_pb2.Phase.Value(f"PHASE_{intervention.phase.name}"),
    )
    if intervention.value is not None:
        setattr(message, intervention.unit.value, intervention.value)
    match intervention.target:
        case FeatureTarget(sae, feature):
            message.feature.sae = sae
            message.feature.feature = bounded(feature, f"{path}.feature.feature", *_UINT32)
        case ConceptTarget(concept):
            message.concept = concept
        case DirectionTarget(site, vector):
            message.direction.site = str(site)
            message.direction.vector = np.asarray(vector, dtype="<f4").tobytes()
    return message


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
        steering=steering_pb2.SteeringSpec(
            interventions=[
                intervention_to_proto(intervention, f"steering.interventions[{i}]")
                for i, intervention in enumerate(request.steering.interventions)
            ]
        ),
        policies=request.policies,
        return_activations=request.return_activations,
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
    return SamplingParams(**given)


def _target_from_proto(message: steering_pb2.Intervention, path: str) -> Target:
    match message.WhichOneof("target"):
        case "feature":
            feature = message.feature
            expect(feature.HasField("feature"), f"{path}.feature.feature", None, "the index of a feature")
            return FeatureTarget(feature.sae, feature.feature)
        case "concept":
            return ConceptTarget(message.concept)
        case "direction":
            site = Site.parse(message.direction.site, f"{path}.direction.site")
            num_bytes = len(message.direction.vector)
            expect(
                num_bytes > 0 and num_bytes % 4 == 0,
                f"{path}.direction.vector",
                f"{num_bytes} bytes",
                "little-endian float32 values, 4 bytes each",
            )
            return DirectionTarget(site, np.frombuffer(message.direction.vector, dtype="<f4").astype(np.float32))
        case _:
            raise InvalidRequestError(f"{path}.target", None, "one of feature, concept or direction")


def _refuse_too_many(count: int, field: str) -> None:
    """Conversion runs in the event loop: a message of a million small parts must not hold it up."""
    expect(count <= MAX_ELEMENTS, field, f"{count} elements", f"at most {MAX_ELEMENTS}")
