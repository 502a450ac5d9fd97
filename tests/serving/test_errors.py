"""Every wrong request gets a precise status that names the field of its proto, and the server goes on serving."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from steerserve import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    Intervention,
    Op,
    Site,
    SteerserveClient,
)
from steerserve.errors import CapacityError, IncompatibleError, InvalidRequestError, ServiceError
from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import generation_pb2_grpc
from steerserve.v1 import steering_pb2 as steering

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
SITE = "blocks.2.hook_resid_post"


def vector(values: object) -> bytes:
    return np.asarray(values, dtype="<f4").tobytes()


def spec(op: int = steering.OP_ADD, raw: float | None = 1.0, **fields: object) -> dict[str, object]:
    intervention = steering.Intervention(op=op, **fields)
    if raw is not None:
        intervention.raw = raw
    return {"steering": steering.SteeringSpec(interventions=[intervention])}


def direction(site: str = SITE, values: object = (1.0,) * 64) -> dict[str, object]:
    return {"direction": steering.DirectionTarget(site=site, vector=vector(values))}


def feature(index: int | None, sae: str = "tiny-sae") -> dict[str, object]:
    return {"feature": steering.FeatureTarget(sae=sae, feature=index)}


def gated(**fields: object) -> dict[str, object]:
    return spec(op=steering.OP_BLOCK, raw=None, gate=steering.Gate(**({"threshold": 1.0} | fields)), **feature(1))


def guarded(**changes: object) -> dict[str, object]:
    """One guard, by default a valid one; a change to None leaves a field out."""
    values = {"concept": "mood", "threshold": 1.0, "action": steering.GUARD_ACTION_BLOCK} | changes
    return {"steering": steering.SteeringSpec(guards=[steering.Guard(**values)])}


def rewinding(**changes: object) -> dict[str, object]:
    """One guard that rewinds; the changes are to its rewind."""
    values = {"num_tokens": 3, "edits": [steering.Intervention(concept="mood", op=steering.OP_BLOCK)]} | changes
    return guarded(action=steering.GUARD_ACTION_REWIND, rewind=steering.Rewind(**values))


BLOCK_AND_REWIND = guarded(rewind=rewinding()["steering"].guards[0].rewind)
CASES = {
    "no prompt": ({"prompt": None}, INVALID, "prompt"),
    "empty text": ({"prompt": {"text": ""}}, INVALID, "text"),
    "no token ids": ({"prompt": {"token_ids": pb.TokenIds()}}, INVALID, "token_ids"),
    "unknown token": ({"prompt": {"token_ids": pb.TokenIds(ids=[5, 10**6])}}, INVALID, "token_ids.ids[1]"),
    "overlong prompt": ({"prompt": {"token_ids": pb.TokenIds(ids=[5] * 32769)}}, INVALID, "token_ids"),
    "no room for max_tokens": ({"sampling": pb.SamplingParams(max_tokens=32768)}, INVALID, "sampling.max_tokens"),
    "negative max_tokens": ({"sampling": pb.SamplingParams(max_tokens=-1)}, INVALID, "sampling.max_tokens"),
    "explicit zero max_tokens": ({"sampling": pb.SamplingParams(max_tokens=0)}, INVALID, "sampling.max_tokens"),
    "NaN temperature": ({"sampling": pb.SamplingParams(temperature=np.nan)}, INVALID, "sampling.temperature"),
    "negative temperature": ({"sampling": pb.SamplingParams(temperature=-0.5)}, INVALID, "sampling.temperature"),
    "top_p above 1": ({"sampling": pb.SamplingParams(top_p=1.5)}, INVALID, "sampling.top_p"),
    "negative top_k": ({"sampling": pb.SamplingParams(top_k=-1)}, INVALID, "sampling.top_k"),
    "negative seed": ({"sampling": pb.SamplingParams(seed=-1)}, INVALID, "sampling.seed"),
    "min_p above 1": ({"sampling": pb.SamplingParams(min_p=1.5)}, INVALID, "sampling.min_p"),
    "explicit zero repetition_penalty": (
        {"sampling": pb.SamplingParams(repetition_penalty=0)}, INVALID, "sampling.repetition_penalty",
    ),
    "NaN penalty": ({"sampling": pb.SamplingParams(frequency_penalty=np.nan)}, INVALID, "sampling.frequency_penalty"),
    "presence_penalty below -2": (
        {"sampling": pb.SamplingParams(presence_penalty=-3)}, INVALID, "sampling.presence_penalty",
    ),
    "bias out of range": (
        {"sampling": pb.SamplingParams(max_tokens=1, logit_bias={3: 1, 7: 101})}, INVALID, "sampling.logit_bias[7]",
    ),
    "bias for an unknown token": (
        {"sampling": pb.SamplingParams(max_tokens=1, logit_bias={10**6: 1})}, INVALID, "sampling.logit_bias[1000000]",
    ),
    "too many biases": (
        {"sampling": pb.SamplingParams(logit_bias=dict.fromkeys(range(4097), 1.0))}, INVALID, "sampling.logit_bias",
    ),
    "empty stop string": ({"sampling": pb.SamplingParams(stop=["a", ""])}, INVALID, "sampling.stop[1]"),
    "overlong stop string": ({"sampling": pb.SamplingParams(stop=["x" * 1025])}, INVALID, "sampling.stop[0]"),
    "too many stop strings": ({"sampling": pb.SamplingParams(stop=["x"] * 65)}, INVALID, "sampling.stop"),
    "unknown stop token": (
        {"sampling": pb.SamplingParams(max_tokens=1, stop_token_ids=[2, 10**6])}, INVALID, "sampling.stop_token_ids[1]",
    ),
    "too many logprobs": ({"sampling": pb.SamplingParams(logprobs=21)}, INVALID, "sampling.logprobs"),
    "negative logprobs": ({"sampling": pb.SamplingParams(logprobs=-1)}, INVALID, "sampling.logprobs"),
    "no responses": ({"sampling": pb.SamplingParams(n=0)}, INVALID, "sampling.n"),
    "too many responses": ({"sampling": pb.SamplingParams(n=65)}, INVALID, "sampling.n"),
    "overlong salt": ({"cache_salt": "x" * 129}, INVALID, "cache_salt"),
    "overlong id": ({"request_id": "x" * 129}, INVALID, "request_id"),
    "unknown policy": ({"policies": ["mood", "nope"]}, INVALID, "policies[1]"),
    "unknown version": ({"policies": ["mood@2"]}, INVALID, "policies[0]"),
    "no target": (spec(), INVALID, "steering.interventions[0].target"),
    "unknown concept": (spec(concept="nope"), INVALID, "steering.interventions[0].concept"),
    "a name too long to repeat": (spec(concept="💥" * 10_000), INVALID, "steering.interventions[0].concept"),
    "unknown SAE": (spec(**feature(1, sae="nope")), INVALID, "steering.interventions[0].feature.sae"),
    "unknown feature": (spec(**feature(32)), INVALID, "steering.interventions[0].feature.feature"),
    "feature left out": (spec(**feature(None)), INVALID, "steering.interventions[0].feature.feature"),
    "malformed site": (spec(**direction(site="layer 3")), INVALID, "steering.interventions[0].direction.site"),
    "site outside the model": (
        spec(**direction(site="blocks.3.hook_resid_post")), PRECONDITION, "steering.interventions[0].direction.site",
    ),
    "wrong d": (spec(**direction(values=[1.0] * 63)), PRECONDITION, "steering.interventions[0].direction.vector"),
    "odd bytes": (
        spec(direction=steering.DirectionTarget(site=SITE, vector=b"12345")),
        INVALID,
        "steering.interventions[0].direction.vector",
    ),
    "NaN in a vector": (
        spec(**direction(values=[np.nan] * 64)), INVALID, "steering.interventions[0].direction.vector",
    ),
    "zero vector": (spec(**direction(values=[0.0] * 64)), INVALID, "steering.interventions[0].direction.vector"),
    "NaN value": (spec(raw=np.nan, **feature(1)), INVALID, "steering.interventions[0].raw"),
    "infinite value": (spec(raw=np.inf, **feature(1)), INVALID, "steering.interventions[0].raw"),
    "value missing": (spec(raw=None, **feature(1)), INVALID, "steering.interventions[0].value"),
    "value refused": (spec(op=steering.OP_BLOCK, **feature(1)), INVALID, "steering.interventions[0].raw"),
    "multiple for a direction": (
        spec(raw=None, max_activation=2.0, **direction()), INVALID, "steering.interventions[0].max_activation",
    ),
    "too many interventions": (
        {"steering": steering.SteeringSpec(interventions=[steering.Intervention()] * 4097)},
        INVALID,
        "steering.interventions",
    ),
    "too many messages": (
        {"prompt": {"messages": pb.ChatMessages(messages=[pb.ChatMessage(role="user")] * 4097)}},
        INVALID,
        "messages.messages",
    ),
    "no op": (spec(op=steering.OP_UNSPECIFIED, **feature(1)), INVALID, "steering.interventions[0].op"),
    "op of the future": (spec(op=99, **feature(1)), INVALID, "steering.interventions[0].op"),
    "phase of the future": (spec(phase=9, **feature(1)), INVALID, "steering.interventions[0].phase"),
    "always without clamp": (spec(always=True, **feature(1)), INVALID, "steering.interventions[0].always"),
    "same feature twice": (
        {"steering": steering.SteeringSpec(interventions=[spec(**feature(1))["steering"].interventions[0]] * 2)},
        INVALID,
        "steering.interventions[1].feature",
    ),
    "no gate target": (gated(), INVALID, "steering.interventions[0].gate.target"),
    "no gate threshold": (gated(threshold=None, **feature(2)), INVALID, "steering.interventions[0].gate.threshold"),
    "NaN gate threshold": (gated(threshold=np.nan, **feature(2)), INVALID, "steering.interventions[0].gate.threshold"),
    "unknown gate concept": (gated(concept="nope"), INVALID, "steering.interventions[0].gate.concept"),
    "unknown gate feature": (gated(**feature(32)), INVALID, "steering.interventions[0].gate.feature.feature"),
    "wrong d in a gate": (
        gated(**direction(values=[1.0] * 63)), PRECONDITION, "steering.interventions[0].gate.direction.vector",
    ),
    "no guard target": (guarded(concept=None), INVALID, "steering.guards[0].target"),
    "unknown guard concept": (guarded(concept="nope"), INVALID, "steering.guards[0].concept"),
    "unknown guard SAE": (guarded(concept=None, **feature(1, sae="nope")), INVALID, "steering.guards[0].feature.sae"),
    "no guard threshold": (guarded(threshold=None), INVALID, "steering.guards[0].threshold"),
    "infinite guard threshold": (guarded(threshold=np.inf), INVALID, "steering.guards[0].threshold"),
    "no guard action": (guarded(action=None), INVALID, "steering.guards[0].action"),
    "guard action of the future": (guarded(action=9), INVALID, "steering.guards[0].action"),
    "guard phase of the future": (guarded(phase=9), INVALID, "steering.guards[0].phase"),
    "no rewind": (guarded(action=steering.GUARD_ACTION_REWIND), INVALID, "steering.guards[0].rewind"),
    "block and rewind": (BLOCK_AND_REWIND, INVALID, "steering.guards[0].rewind"),
    "rewind of nothing": (rewinding(num_tokens=None), INVALID, "steering.guards[0].rewind.num_tokens"),
    "long rewind": (rewinding(num_tokens=65), INVALID, "steering.guards[0].rewind.num_tokens"),
    "rewind without edits": (rewinding(edits=[]), INVALID, "steering.guards[0].rewind.edits"),
    "explicit zero retries": (rewinding(max_retries=0), INVALID, "steering.guards[0].rewind.max_retries"),
    "too many retries": (rewinding(max_retries=5), INVALID, "steering.guards[0].rewind.max_retries"),
    "rewind without end": (
        rewinding(otherwise=steering.GUARD_ACTION_REWIND), INVALID, "steering.guards[0].rewind.otherwise",
    ),
    "wrong edit of a rewind": (
        rewinding(edits=[spec(**feature(32))["steering"].interventions[0]]),
        INVALID,
        "steering.guards[0].rewind.edits[0].feature.feature",
    ),
    "phase of an edit in a rewind": (
        rewinding(edits=[steering.Intervention(concept="mood", op=steering.OP_BLOCK, phase=steering.PHASE_PROMPT)]),
        INVALID,
        "steering.guards[0].rewind.edits[0].phase",
    ),
    "no op in a rewind": (
        rewinding(edits=[steering.Intervention(concept="mood")]), INVALID, "steering.guards[0].rewind.edits[0].op",
    ),
    "too many guards": (
        {"steering": steering.SteeringSpec(guards=[steering.Guard()] * 65)}, INVALID, "steering.guards",
    ),
    "too many edits of a rewind": (
        rewinding(edits=[steering.Intervention()] * 65), INVALID, "steering.guards[0].rewind.edits",
    ),
}  # fmt: skip


def message(changes: dict[str, object], message_type: type = pb.GenerateRequest) -> pb.GenerateRequest:
    values = {"prompt": {"text": "Hello"}, "sampling": pb.SamplingParams(max_tokens=2)} | changes
    return message_type(**(values.pop("prompt") or {}), **values)


@pytest.fixture(scope="module")
def stub(server) -> generation_pb2_grpc.GenerationServiceStub:
    with grpc.insecure_channel(server.address) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


def details_of(error: grpc.RpcError) -> tuple[error_details_pb2.BadRequest, error_details_pb2.ErrorInfo]:
    bad_request, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    for detail in rpc_status.from_call(error).details:
        assert detail.Unpack(bad_request) or detail.Unpack(info)
    return bad_request, info


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("case", CASES)
def test_wrong_request_is_refused_with_its_field(stub, case, rpc) -> None:
    changes, code, field = CASES[case]
    with pytest.raises(grpc.RpcError) as raised:
        if rpc == "Generate":
            stub.Generate(message(changes))
        else:
            list(stub.GenerateStream(message(changes, pb.GenerateStreamRequest)))
    bad_request, info = details_of(raised.value)
    assert raised.value.code() is code
    assert [violation.field for violation in bad_request.field_violations] == [field]
    assert "expected" in bad_request.field_violations[0].description
    assert (info.domain, info.metadata["field"]) == ("steerserve", field)
    (completion,) = stub.Generate(message({})).completions
    assert len(completion.token_ids.ids) == 2


def test_a_field_that_the_server_does_not_know_is_refused_not_ignored(stub) -> None:
    """A client of a later version may ask for a condition; steering without it would be silently wrong."""
    known = message(spec(**feature(1)))
    unknown_field_15_in_the_intervention = steering.Intervention.FromString(
        known.steering.interventions[0].SerializeToString() + b"\x78\x01"
    )
    known.steering.interventions[0].CopyFrom(unknown_field_15_in_the_intervention)
    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(known)
    bad_request, _ = details_of(raised.value)
    assert raised.value.code() is INVALID
    assert bad_request.field_violations[0].field == "steering.interventions[0]"


def test_an_id_in_flight_cannot_be_used_twice(client) -> None:
    stream = client.generate_stream("Hello", max_tokens=30000, ignore_eos=True, request_id="twin")
    next(stream)
    with pytest.raises(InvalidRequestError) as raised:
        client.generate("Hello", max_tokens=1, request_id="twin")
    assert raised.value.field == "request_id"
    stream.close()


def test_a_full_queue_says_when_to_retry(start_server, wait_until) -> None:
    long = {"max_tokens": 30000, "ignore_eos": True}
    with start_server(max_num_seqs=1, max_waiting=1) as server, SteerserveClient(server.address) as client:
        running, waiting = client.generate_stream("Hello", **long), client.generate_stream("Hello", **long)
        next(running)
        with ThreadPoolExecutor(1) as pool:
            first_piece = pool.submit(next, waiting)
            wait_until(lambda: client.get_server_info().num_requests_waiting == 1)
            with pytest.raises(CapacityError) as raised:
                client.generate("Hello", max_tokens=1)
            assert raised.value.retry_after_s > 0
            running.close()
            assert first_piece.result(20).token_ids
        waiting.close()


@pytest.mark.parametrize(
    ("steer", "expected", "field"),
    [
        (Intervention(ConceptTarget("nope"), Op.BLOCK), InvalidRequestError, "steering.interventions[0].concept"),
        (
            Intervention(DirectionTarget(Site.parse(SITE), np.ones(3, np.float32)), Op.BLOCK),
            IncompatibleError,
            "steering.interventions[0].direction.vector",
        ),
        (
            Intervention(FeatureTarget("tiny-sae", 1), Op.BLOCK, gate=Gate(ConceptTarget("nope"), 1.0)),
            InvalidRequestError,
            "steering.interventions[0].gate.concept",
        ),
        ("nope=explode", InvalidRequestError, "steer[0] (operation)"),
    ],
)
def test_the_client_raises_what_the_server_raised(client, steer, expected, field) -> None:
    with pytest.raises(expected) as raised:
        client.generate("Hello", steer=[steer])
    assert raised.value.field == field
    assert str(raised.value) == f"{field}: got {raised.value.value}, expected {raised.value.expected}"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 2**63}, "sampling.seed"),
        ({"max_tokens": 2**31}, "sampling.max_tokens"),
        ({"logit_bias": {-1: 2.0}}, "sampling.logit_bias[-1]"),
        ({"stop_token_ids": [2, 2**32]}, "sampling.stop_token_ids[1]"),
        ({"request_id": "\ud800"}, "request"),
        ({"priority": 2**31}, "priority"),
        ({"guards": ["mood>1=explode"]}, "guards[0] (action)"),
    ],
)
def test_the_client_refuses_what_the_wire_cannot_carry(client, options, field) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        client.generate("Hello", **options)
    assert raised.value.field == field


def test_a_server_out_of_reach_is_a_service_error() -> None:
    with SteerserveClient("127.0.0.1:1") as client, pytest.raises(ServiceError) as raised:
        client.generate("Hello")
    assert raised.value.code == "UNAVAILABLE"
