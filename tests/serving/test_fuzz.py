"""Requests, policies and access files that nobody would write: each is served, or refused with an error of its type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerserve.config import EngineConfig
from steerserve.engine.engine import Engine
from steerserve.errors import CapacityError, IncompatibleError, InvalidRequestError, PolicyError, SteerserveError
from steerserve.serving.access import AccessFile
from steerserve.serving.app import load_engine
from steerserve.serving.convert import request_from_proto
from steerserve.serving.fields import proto_field
from steerserve.serving.status import status_of
from steerserve.steering.policies import parse_policy
from steerserve.steering.policy_set import BUILT_IN, PolicySet, problems_of
from steerserve.strict_yaml import parse_yaml
from steerserve.v1 import generation_pb2 as pb

REFUSALS = (InvalidRequestError, IncompatibleError, CapacityError)
REFUSED = {code_pb2.INVALID_ARGUMENT, code_pb2.FAILED_PRECONDITION, code_pb2.RESOURCE_EXHAUSTED}
MAX_TRAILER_BYTES = 8 << 10
D_MODEL = 64
WORDS = (
    "", "mood", "mood@1", "mood@2", "tiny-sae", "blocks.2.hook_resid_post", "blocks.9.hook_resid_post",
    "model.layers.2", "user", "system", "Hello", "\x00", "\ud7ff", "é" * 200, "x" * 5000,
)  # fmt: skip
FLOATS = (0.0, -0.0, 0.5, 1.0, 2.0, -1.0, 100.0, 1e-320, 1e38, 1e308, math.inf, -math.inf, math.nan)
INTEGERS = (0, 1, 2, 3, 16, 31, 32, 64, 1000, 49151, 49152, 2**31 - 1)
VECTORS = (b"", bytes(4 * D_MODEL), b"\x00\x00\x80\x3f" * D_MODEL, b"\x00\x00\xc0\x7f" * D_MODEL, b"\x01" * 7)


def cases(fast: int, slow: int) -> Any:
    """How many to generate: in every run, and in the slow one."""
    marks = [pytest.mark.slow, pytest.mark.timeout(3600)]
    return pytest.mark.parametrize("num_cases", [fast, pytest.param(slow, marks=marks)])


def generated(num_cases: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run a check on ``num_cases`` examples, the same ones in every run."""

    def run(check: Callable[..., None]) -> None:
        settings(
            max_examples=num_cases, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck
        )(given(**strategies)(check))()

    return run


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of a message, each with a value of its type: at its edges, in its range, or known to the server."""
    fields = [field for field in descriptor.fields if depth < 4 or field.message_type is None]
    optional = {field.name: values(field, depth) for field in fields}
    return st.fixed_dictionaries({}, optional=optional).map(lambda chosen: _one_of_each(descriptor, chosen))


def _one_of_each(descriptor: Descriptor, chosen: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in chosen.items():
        oneof = descriptor.fields_by_name[name].containing_oneof
        others = {field.name for field in oneof.fields} if oneof else set()
        if not others & kept.keys():
            kept[name] = value
    return kept


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    one = _single(field, depth)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        return st.dictionaries(_single(key, depth), _single(value, depth), max_size=3)
    return st.lists(one, max_size=3) if field.is_repeated else one


def _single(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kinds = FieldDescriptor
    match field.type:
        case kinds.TYPE_MESSAGE:
            return st.deferred(lambda: messages(field.message_type, depth + 1))
        case kinds.TYPE_ENUM:
            return st.integers(0, len(field.enum_type.values))  # one that does not exist too
        case kinds.TYPE_STRING:
            return st.sampled_from(WORDS) | st.text(max_size=12)
        case kinds.TYPE_BYTES:
            return st.sampled_from(VECTORS) | st.binary(max_size=12)
        case kinds.TYPE_BOOL:
            return st.booleans()
        case kinds.TYPE_DOUBLE | kinds.TYPE_FLOAT:
            return st.sampled_from(FLOATS) | st.floats(width=32)
        case kinds.TYPE_UINT32:
            return st.sampled_from(INTEGERS) | st.integers(0, 2**32 - 1)
        case kinds.TYPE_INT32:
            return st.sampled_from(INTEGERS) | st.integers(-(2**31), 2**31 - 1)
        case _:
            return st.sampled_from(INTEGERS) | st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[Engine]:
    engine = load_engine(
        tiny.config(), EngineConfig(dtype="float32", num_threads=1, max_num_seqs=4, max_model_len=256, max_waiting=8)
    )
    yield engine
    engine.close()


def admit(engine: Engine, message: Message) -> None:
    """Serve a request's admission, and undo it; what refuses it must be a status that names what is wrong."""
    try:
        request = replace(request_from_proto(message, timeout_s=None), request_id="fuzz")
        engine.add_request(request)
    except REFUSALS as error:
        status = status_of(error, lambda path: proto_field(path, message))
        assert status.code in REFUSED
        assert status.ByteSize() < MAX_TRAILER_BYTES
        return
    engine.abort("fuzz")
    engine.step()
    assert not engine.has_unfinished()


@cases(fast=500, slow=60_000)
def test_any_message_is_admitted_or_refused(engine, num_cases) -> None:
    @generated(num_cases, fields=messages(pb.GenerateRequest.DESCRIPTOR))
    def _(fields: dict[str, Any]) -> None:
        admit(engine, pb.GenerateRequest(**fields))


@cases(fast=300, slow=20_000)
def test_any_bytes_are_admitted_or_refused(engine, num_cases) -> None:
    """A good request with some of its bytes replaced."""
    whole = pb.GenerateRequest(text="Hello", policies=["mood"], request_id="r")
    whole.sampling.max_tokens = 5
    whole.steering.interventions.add(concept="mood", op=1, raw=2.0).gate.concept = "mood"
    data = whole.SerializeToString()
    changes = st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), min_size=1, max_size=6)

    @generated(num_cases, changes=changes, length=st.integers(1, len(data)))
    def _(changes: list[tuple[int, int]], length: int) -> None:
        changed = bytearray(data)
        for position, byte in changes:
            changed[position] = byte
        with suppress(DecodeError):
            admit(engine, pb.GenerateRequest.FromString(bytes(changed[:length])))


KEYS = (
    "format", "name", "version", "description", "rules", "limits", "concept", "action", "phase", "rewind", "tokens",
    "retries", "otherwise", "edits", "op", "value", "unit", "always", "fail", "threshold", "interventions", "guards",
    "max_tokens", "n", "priority", "concepts", "start",
)  # fmt: skip
SCALARS = (
    st.sampled_from(("steerserve.policy/1", "mood", "1", "clamp", "flag", "rewind", "redact", "block", "all", "open"))
    | st.sampled_from(FLOATS)
    | st.integers(-3, 2**70)
    | st.none()
    | st.booleans()
    | st.dates()
    | st.text(max_size=8)
)


def trees(keys: tuple[str, ...], scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner, max_size=4),
        max_leaves=8,
    )


TREES = trees(KEYS, SCALARS)
RULES = st.tuples(
    st.dictionaries(st.sampled_from(KEYS), TREES, max_size=3),
    st.fixed_dictionaries(
        {
            "concept": st.just("mood") | SCALARS,
            "action": st.sampled_from(("clamp", "flag", "rewind", "redact", "block")),
        }
    ),
).map(lambda parts: parts[0] | parts[1])
NEAR_POLICIES = st.fixed_dictionaries(
    {
        "format": st.just("steerserve.policy/1"),
        "name": st.just("fuzzed"),
        "version": st.just("1"),
        "rules": st.lists(RULES, max_size=3),
    },
    optional={"limits": TREES, "description": SCALARS},
)


def read(engine: Engine, data: bytes) -> None:
    """Read a policy as a reload does; what is wrong with it must be said."""
    try:
        policy = parse_policy(data, "fuzz.yaml")
    except PolicyError as refusal:
        said = refusal.problems
    else:
        said = tuple(f"fuzz.yaml: {problem}" for problem in problems_of(policy, engine.catalog.packs))
        if not said:
            with suppress(PolicyError, CapacityError):
                engine.replace_policies(PolicySet({policy.name: policy}))
            engine.replace_policies(PolicySet())
            return
    assert said
    assert all(problem.startswith("fuzz.yaml") for problem in said)


@cases(fast=150, slow=15_000)
def test_any_tree_is_a_policy_or_refused(engine, num_cases) -> None:
    @generated(num_cases, tree=NEAR_POLICIES | TREES)
    def _(tree: Any) -> None:
        read(engine, yaml.safe_dump(tree).encode())


YAML_PIECES = (
    b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"[" * 2000, b"{a: ", b"---\n", b"\t", b"'", b"? ",
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 12), st.binary(max_size=4) | st.sampled_from(YAML_PIECES)),
    min_size=1,
    max_size=3,
)


@cases(fast=150, slow=15_000)
def test_any_edit_of_a_policy_file_is_a_policy_or_refused(engine, num_cases) -> None:
    texts = [path.read_bytes().replace(b"profanity", b"mood") for path in sorted(BUILT_IN.glob("*.yaml"))]

    @generated(num_cases, text=st.sampled_from(texts), edits=EDITS)
    def _(text: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        read(engine, edited(text, edits))


def edited(text: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Each edit is where, how many bytes go, and which come in their place."""
    for place, removed, inserted in edits:
        place %= len(text) or 1
        text = text[:place] + inserted + text[place + removed :]
    return text


ACCESS = b"""\
format: steerserve.access/1
tenants:
  acme:
    policies: {required: [mood], default: [mood@1], allowed: [mood, calm]}
    quotas: {requests_per_minute: 600, tokens_per_minute: 100000, concurrent: 8}
    may_steer: false
    first_priority: -3
  guests: {}
keys:
  - id: acme-1
    tenant: acme
    roles: [user, admin]
    sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    expires: 2027-01-01T00:00:00Z
  - id: mesh
    tenant: guests
    certificate: spiffe://cluster/app
    quotas: {concurrent: 1}
"""
SECRET = "sk-" + "secret" * 6
ACCESS_KEYS = (
    "format", "tenants", "keys", "acme", "guests", "policies", "quotas", "required", "default", "allowed",
    "requests_per_minute", "tokens_per_minute", "concurrent", "may_steer", "first_priority", "id", "tenant", "roles",
    "certificate", "expires",
)  # fmt: skip
ACCESS_TREES = trees(ACCESS_KEYS, st.sampled_from(("acme", "mood@1", "user", "admin", "2027-01-01")) | SCALARS)
NEAR_ACCESS = st.fixed_dictionaries(
    {
        "format": st.just("steerserve.access/1"),
        "tenants": st.dictionaries(st.sampled_from(("acme", "guests")) | st.text(max_size=4), ACCESS_TREES, max_size=3),
    },
    optional={
        "keys": st.lists(
            st.fixed_dictionaries(
                {"id": st.sampled_from(("a", "b")), "tenant": st.sampled_from(("acme", "guests"))},
                optional={
                    "sha256": st.just(SECRET) | st.sampled_from(("0" * 64, "f" * 64)) | SCALARS,
                    "roles": ACCESS_TREES,
                    "quotas": ACCESS_TREES,
                    "expires": SCALARS | st.datetimes(),
                },
            ),
            max_size=3,
        )
    },
)


def read_keys(data: bytes) -> None:
    """Read an access file as a server does; what is wrong must be said, and a key in the wrong place must not."""
    try:
        parse_yaml(data, "fuzz.yaml", AccessFile)
    except PolicyError as refusal:
        said = refusal.problems
    else:
        return
    assert said
    assert all(problem.startswith("fuzz.yaml:") for problem in said)
    assert not any(SECRET in problem for problem in said)


@cases(fast=150, slow=15_000)
def test_any_tree_is_an_access_file_or_refused(num_cases) -> None:
    @generated(num_cases, tree=NEAR_ACCESS | ACCESS_TREES)
    def _(tree: Any) -> None:
        read_keys(yaml.safe_dump(tree).encode())


@cases(fast=150, slow=15_000)
def test_any_edit_of_an_access_file_is_one_or_refused(num_cases) -> None:
    parse_yaml(ACCESS, "whole", AccessFile)

    @generated(num_cases, edits=EDITS)
    def _(edits: list[tuple[int, int, bytes]]) -> None:
        read_keys(edited(ACCESS, edits))


def test_what_is_refused_leaves_nothing_behind(engine) -> None:
    """After all that the engine serves as it did."""
    assert not engine.has_unfinished()
    with pytest.raises(SteerserveError):
        admit_strictly(engine, pb.GenerateRequest(text="Hello", policies=["nobody"]))
    admit_strictly(engine, pb.GenerateRequest(text="Hello", policies=["mood"]))


def admit_strictly(engine: Engine, message: Message) -> None:
    engine.add_request(replace(request_from_proto(message, timeout_s=None), request_id="after"))
    engine.abort("after")
    engine.step()
