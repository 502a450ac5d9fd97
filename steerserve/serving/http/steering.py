"""The steering of a body: the JSON form of the proto, or the one-line syntax of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.json_format import ParseDict, ParseError

from steerserve.errors import InvalidRequestError
from steerserve.serving.convert_steering import MAX_GUARDS, MAX_INTERVENTIONS, refuse_large_spec, spec_from_proto
from steerserve.serving.fields import expect, proto_field, refuse_too_many
from steerserve.serving.steer_string import GRAMMAR, parse_guard, parse_intervention
from steerserve.types import Intervention, SteeringSpec
from steerserve.v1 import generation_pb2, steering_pb2

_PART = re.compile(r"steering\.(?P<list>interventions|guards)\[(?P<index>\d+)\]")
_FILE_TARGET = "direction:"


@dataclass(frozen=True)
class Steering:
    """A spec, and the way from its fields, as the types name them, to the keys of the body."""

    spec: SteeringSpec
    locate: Callable[[str], str]


def read_steering(steering: object, guards: Sequence[str]) -> Steering:
    """Read the keys ``steering`` and ``guards``; guards of both count, those of ``steering`` first.

    Raises:
        InvalidRequestError: neither form, or what no loaded model is needed to see.
    """
    refuse_too_many(len(guards), "guards", MAX_GUARDS)
    more_guards = tuple(
        parse_guard(_without_files(text, f"guards[{i}]"), f"guards[{i}]") for i, text in enumerate(guards)
    )
    if isinstance(steering, dict):
        message = _message(steering)
        spec = spec_from_proto(message, "steering")
        sent = generation_pb2.GenerateRequest(steering=message)
    else:
        spec = SteeringSpec(tuple(_interventions([] if steering is None else steering)))
        sent = None
    num_guards = len(spec.guards)

    def locate(field: str) -> str:
        match = _PART.match(field)
        if match is None:
            return field
        if match["list"] == "guards" and int(match["index"]) >= num_guards:
            return f"guards[{int(match['index']) - num_guards}]"
        return f"steering[{match['index']}]" if sent is None else proto_field(field, sent)

    return Steering(SteeringSpec(spec.interventions, spec.guards + more_guards), locate)


def _message(steering: dict[str, object]) -> steering_pb2.SteeringSpec:
    message = steering_pb2.SteeringSpec()
    try:
        ParseDict(steering, message)
    except ParseError as error:
        reason = str(error).partition(" Available Fields")[0]
        expected = f"the JSON form of steerserve.v1.SteeringSpec ({reason})"
        raise InvalidRequestError("steering", steering, expected) from None
    refuse_large_spec(message, "steering")
    return message


def _interventions(steering: object) -> Iterator[Intervention]:
    expected = f"an object as steerserve.v1.SteeringSpec, or a list of strings {GRAMMAR}"
    expect(isinstance(steering, list), "steering", steering, expected)
    assert isinstance(steering, list)
    refuse_too_many(len(steering), "steering", MAX_INTERVENTIONS)
    for i, text in enumerate(steering):
        field = f"steering[{i}]"
        expect(isinstance(text, str), field, text, f"a string {GRAMMAR}")
        yield parse_intervention(_without_files(text, field), field)


def _without_files(text: str, field: str) -> str:
    """``text``, refused if its target is a file: what the command line reads for its user lies on the server here."""
    expect(
        _FILE_TARGET not in text, field, text, "a concept or a feature; a direction's vector goes into the JSON form"
    )
    return text
