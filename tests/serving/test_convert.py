"""Everything that crosses the wire arrives as it was sent."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    Guard,
    GuardAction,
    HeadTarget,
    Intervention,
    Message,
    Op,
    Phase,
    Receipt,
    Rewind,
    SamplingParams,
    Site,
    SteeringSpec,
    Unit,
)
from steerserve.client import GenerateOptions
from steerserve.errors import InvalidRequestError
from steerserve.serving.convert import request_from_proto, request_to_proto
from steerserve.serving.convert_response import outputs_from_proto, piece_from_proto, response_to_proto, step_to_proto
from steerserve.serving.fields import proto_field
from steerserve.types import (
    FinishReason,
    GenerateRequest,
    GuardEvent,
    InterventionReceipt,
    MonitorReceipt,
    PositionScores,
    StepOutput,
    Stream,
    TokenLogprobs,
    Verdict,
    VerdictKind,
)
from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import steering_pb2

names = st.text(max_size=20)
uint32 = st.integers(0, 2**32 - 1)
floats = st.floats(allow_nan=False)
float32s = st.floats(width=32)
sites = st.builds(Site, st.integers(0, 200), st.sampled_from(Stream))
vectors = st.lists(float32s, min_size=1, max_size=8).map(lambda values: np.array(values, dtype=np.float32))
targets = st.one_of(
    st.builds(FeatureTarget, names, uint32),
    st.builds(ConceptTarget, names),
    st.builds(DirectionTarget, sites, vectors, st.none() | uint32),
)
operands = st.one_of(st.just({}), st.fixed_dictionaries({"value": floats, "unit": st.sampled_from(Unit)}))
interventions = st.builds(
    lambda operand, **fields: Intervention(**fields, **operand),
    operands,
    target=targets | st.builds(HeadTarget, uint32, uint32),
    op=st.sampled_from(Op),
    always=st.booleans(),
    phase=st.sampled_from(Phase),
    gate=st.none() | st.builds(Gate, targets, floats),
)
rewinds = st.builds(
    Rewind,
    num_tokens=st.integers(1, 64),
    edits=st.lists(interventions, min_size=1, max_size=2).map(tuple),
    max_retries=st.integers(1, 4),
    otherwise=st.sampled_from([GuardAction.FLAG, GuardAction.BLOCK]),
)
guards = st.builds(
    lambda rewind, action, **fields: Guard(action=GuardAction.REWIND if rewind else action, rewind=rewind, **fields),
    st.none() | rewinds,
    st.sampled_from([GuardAction.FLAG, GuardAction.BLOCK]),
    target=targets,
    threshold=floats,
    phase=st.sampled_from(Phase),
    fail_open=st.booleans(),
)
specs = st.builds(SteeringSpec, st.lists(interventions, max_size=3).map(tuple), st.lists(guards, max_size=2).map(tuple))
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    n=st.integers(1, 64),
    temperature=st.floats(0, allow_nan=False, allow_infinity=False),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.none() | st.integers(0, 2**63 - 1),
    ignore_eos=st.booleans(),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(uint32, st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(uint32, max_size=3).map(tuple),
    include_stop_str_in_output=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
prompts = st.one_of(
    st.text(),
    st.lists(uint32).map(tuple),
    st.lists(st.builds(Message, names, names), min_size=1).map(tuple),
)
requests = st.builds(
    GenerateRequest,
    request_id=st.text(min_size=1, max_size=128),
    prompt=prompts,
    sampling=samplings,
    steering=specs,
    policies=st.lists(names, max_size=3).map(tuple),
    return_activations=st.booleans(),
    priority=st.integers(-(2**31), 2**31 - 1),
    cache_salt=st.text(max_size=128),
)
receipts = st.builds(
    Receipt,
    plan_hash=names,
    model_fingerprint=names,
    policies=st.lists(names).map(tuple),
    packs=st.dictionaries(names, names),
    interventions=st.lists(
        st.builds(
            InterventionReceipt,
            source=names,
            label=names,
            site=sites,
            tokens_in_scope=uint32,
            tokens_covered=uint32,
            tokens_edited=uint32,
            mean_relative_edit=floats,
            max_activation=floats,
            overridden_by=st.lists(names, max_size=2).map(tuple),
        )
    ).map(tuple),
    steered=st.booleans(),
    num_rewinds=uint32,
    num_rewound_tokens=uint32,
    num_cached_tokens=uint32,
    num_redacted_tokens=uint32,
    monitors=st.lists(
        st.builds(MonitorReceipt, names, names, sites, uint32, uint32, max_score=floats, mean_score=floats), max_size=2
    ).map(tuple),
)
logprobs = st.builds(TokenLogprobs, float32s, uint32, st.lists(st.tuples(uint32, float32s), max_size=3).map(tuple))
piece_fields = {
    "request_id": names,
    "token_ids": st.lists(uint32).map(tuple),
    "text": st.text(),
    "scores": st.lists(st.builds(PositionScores, uint32, vectors, vectors), max_size=3).map(tuple),
    "logprobs": st.lists(logprobs, max_size=3).map(tuple),
    "index": st.integers(0, 63),
}
pieces = st.builds(StepOutput, **piece_fields)
last_pieces = st.builds(
    StepOutput,
    **piece_fields,
    finish_reason=st.sampled_from(FinishReason),
    stop_reason=st.none() | st.text() | uint32,
    num_prompt_tokens=uint32,
    receipt=receipts,
    verdicts=st.lists(
        st.builds(
            Verdict,
            st.sampled_from(VerdictKind),
            names,
            names,
            st.lists(uint32, max_size=3).map(tuple),
            st.lists(floats, max_size=3).map(tuple),
            st.none() | floats,
        ),
        max_size=3,
    ).map(tuple),
    guard_events=st.lists(
        st.builds(GuardEvent, uint32, st.sampled_from(GuardAction), uint32, st.floats(), names, names), max_size=3
    ).map(tuple),
)


def comparable(value: object) -> object:
    """Nested tuples that compare by value: arrays by their bytes, so that NaN equals itself."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tobytes())
    if dataclasses.is_dataclass(value):
        return (type(value), *(comparable(getattr(value, field.name)) for field in dataclasses.fields(value)))
    if isinstance(value, float):
        return np.float64(value).tobytes()
    if isinstance(value, tuple):
        return tuple(comparable(item) for item in value)
    return value


@settings(deadline=None, derandomize=True)
@given(requests)
@pytest.mark.parametrize("message_type", [pb.GenerateRequest, pb.GenerateStreamRequest])
def test_a_request_arrives_as_it_was_sent(message_type, request_) -> None:
    sent = message_type.FromString(request_to_proto(request_, message_type).SerializeToString())
    assert comparable(request_from_proto(sent)) == comparable(request_)


@settings(deadline=None, derandomize=True)
@given(st.one_of(pieces, last_pieces))
def test_a_piece_arrives_as_it_was_sent(piece) -> None:
    sent = pb.GenerateStreamResponse.FromString(step_to_proto(piece, 7).SerializeToString())
    assert comparable(piece_from_proto(sent)) == comparable(piece)
    assert sent.HasField("finish_info") == (piece.finish_reason is not None)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.tuples(st.lists(pieces, max_size=3), last_pieces), min_size=1, max_size=3), st.randoms())
def test_responses_are_their_pieces_joined(responses, random) -> None:
    """Pieces of several responses in any order that keeps each response's own."""
    queues = [
        [dataclasses.replace(piece, index=index, request_id="r") for piece in (*some, last)]
        for index, (some, last) in enumerate(responses)
    ]
    order = [index for index, queue in enumerate(queues) for _ in queue]
    random.shuffle(order)
    arrivals = [iter(queue) for queue in queues]
    message = response_to_proto([next(arrivals[index]) for index in order])
    wholes = outputs_from_proto(message)
    assert [whole.index for whole in wholes] == list(range(len(queues)))
    for whole, queue, completion in zip(wholes, queues, message.completions, strict=True):
        joined = dataclasses.replace(
            queue[-1],
            text="".join(piece.text for piece in queue),
            token_ids=tuple(token for piece in queue for token in piece.token_ids),
            scores=tuple(at for piece in queue for at in piece.scores),
            logprobs=tuple(entry for piece in queue for entry in piece.logprobs),
        )
        assert comparable(whole) == comparable(joined)
        assert completion.finish_info.num_generated_tokens == len(whole.token_ids)


def test_defaults_are_those_of_the_types() -> None:
    read = request_from_proto(pb.GenerateRequest(text="x"))
    assert (read.sampling, read.steering, read.policies) == (SamplingParams(), SteeringSpec(), ())
    assert (read.priority, read.timeout_s, read.cache_salt) == (0, None, "")
    assert read.request_id
    assert read.request_id != request_from_proto(pb.GenerateRequest(text="x")).request_id


def test_the_documented_defaults_are_those_of_the_types() -> None:
    """generation.proto states them in words."""
    assert (SamplingParams().max_tokens, SamplingParams().temperature, SamplingParams().top_p) == (64, 1.0, 1.0)
    assert (SamplingParams().top_k, SamplingParams().seed, SamplingParams().ignore_eos) == (0, None, False)
    assert (SamplingParams().min_p, SamplingParams().repetition_penalty) == (0.0, 1.0)
    assert (SamplingParams().frequency_penalty, SamplingParams().presence_penalty) == (0.0, 0.0)
    assert (SamplingParams().logit_bias, SamplingParams().stop, SamplingParams().stop_token_ids) == ({}, (), ())
    assert (SamplingParams().include_stop_str_in_output, SamplingParams().logprobs) == (False, None)
    assert SamplingParams().n == 1


def test_the_documented_defaults_of_guards() -> None:
    """steering.proto states them in words."""
    edit = steering_pb2.Intervention(concept="c", op=steering_pb2.OP_BLOCK)
    sent = steering_pb2.Guard(
        concept="c",
        threshold=0.5,
        action=steering_pb2.GUARD_ACTION_REWIND,
        rewind=steering_pb2.Rewind(num_tokens=3, edits=[edit]),
    )
    (read,) = request_from_proto(
        pb.GenerateRequest(text="x", steering=steering_pb2.SteeringSpec(guards=[sent]))
    ).steering.guards
    target = ConceptTarget("c")
    rewind = Rewind(3, (Intervention(target, Op.BLOCK),), max_retries=1, otherwise=GuardAction.BLOCK)
    assert read == Guard(target, 0.5, GuardAction.REWIND, rewind, phase=Phase.ALL, fail_open=False)


def test_what_is_left_of_the_deadline_is_the_timeout() -> None:
    assert request_from_proto(pb.GenerateRequest(text="x"), 2.5).timeout_s == 2.5


def test_every_sampling_parameter_is_on_the_wire_and_in_the_client() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} == names
    assert names <= GenerateOptions.__annotations__.keys()


def test_a_bias_on_the_wire_is_known_and_a_field_beside_it_is_not() -> None:
    sent = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(logit_bias={5: 1.5}))
    assert request_from_proto(sent).sampling.logit_bias == {5: 1.5}
    unknown = pb.SamplingParams.FromString(sent.sampling.SerializeToString() + b"\xf8\x01\x01")  # field 31
    sent.sampling.CopyFrom(unknown)
    with pytest.raises(InvalidRequestError, match=r"^sampling: got 'field number 31'"):
        request_from_proto(sent)


@pytest.mark.parametrize(
    ("field", "sent", "path"),
    [
        ("prompt", pb.GenerateRequest(text=""), "text"),
        ("prompt", pb.GenerateRequest(), "prompt"),
        ("prompt.token_ids[3]", pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids[3]"),
        ("prompt.messages", pb.GenerateRequest(messages=pb.ChatMessages()), "messages"),
        ("sampling.top_p", pb.GenerateRequest(), "sampling.top_p"),
        ("policies[1]", pb.GenerateRequest(), "policies[1]"),
    ],
)
def test_paths_of_the_request(field, sent, path) -> None:
    assert proto_field(field, sent) == path


FEATURE = {"feature": steering_pb2.FeatureTarget()}
DIRECTION = {"direction": steering_pb2.DirectionTarget()}


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("[0].target.sae", "[0].feature.sae"),
        ("[0].target.feature", "[0].feature.feature"),
        ("[0].target", "[0].feature"),
        ("[0].value", "[0].raw"),
        ("[0].unit", "[0].raw"),
        ("[0].op", "[0].op"),
        ("[1].target.concept", "[1].concept"),
        ("[1].target", "[1].concept"),
        ("[1].value", "[1].value"),
        ("[2].target.vector", "[2].direction.vector"),
        ("[2].target.site", "[2].direction.site"),
        ("[2].unit", "[2].max_activation"),
        ("[3].target", "[3].target"),
        ("[3].gate.target", "[3].gate.target"),
    ],
)
def test_paths_of_interventions(field, path) -> None:
    sent = pb.GenerateStreamRequest(
        steering=steering_pb2.SteeringSpec(
            interventions=[
                steering_pb2.Intervention(**FEATURE, raw=1.0),
                steering_pb2.Intervention(concept="c"),
                steering_pb2.Intervention(**DIRECTION, max_activation=2.0),
                steering_pb2.Intervention(gate=steering_pb2.Gate()),
            ]
        )
    )
    assert proto_field(f"steering.interventions{field}", sent) == f"steering.interventions{path}"


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("interventions[0].gate.target.site", "interventions[0].gate.direction.site"),
        ("interventions[0].gate.threshold", "interventions[0].gate.threshold"),
        ("interventions[0].target.sae", "interventions[0].feature.sae"),
        ("guards[1].target.feature", "guards[1].feature.feature"),
        ("guards[1].threshold", "guards[1].threshold"),
        ("guards[0].target.concept", "guards[0].concept"),
        ("guards[0].rewind.num_tokens", "guards[0].rewind.num_tokens"),
        ("guards[0].rewind.edits[1].target.sae", "guards[0].rewind.edits[1].feature.sae"),
        ("guards[0].rewind.edits[1].value", "guards[0].rewind.edits[1].max_activation"),
        ("guards[0].rewind.edits[1].gate.target.concept", "guards[0].rewind.edits[1].gate.concept"),
        ("guards[0].rewind.edits[0].target.vector", "guards[0].rewind.edits[0].direction.vector"),
    ],
)
def test_paths_of_gates_and_guards(field, path) -> None:
    edits = [
        steering_pb2.Intervention(**DIRECTION, raw=1.0),
        steering_pb2.Intervention(**FEATURE, max_activation=1.0, gate=steering_pb2.Gate(concept="c")),
    ]
    sent = pb.GenerateRequest(
        steering=steering_pb2.SteeringSpec(
            interventions=[steering_pb2.Intervention(**FEATURE, gate=steering_pb2.Gate(**DIRECTION))],
            guards=[
                steering_pb2.Guard(concept="c", rewind=steering_pb2.Rewind(edits=edits)),
                steering_pb2.Guard(**FEATURE),
            ],
        )
    )
    assert proto_field(f"steering.{field}", sent) == f"steering.{path}"
