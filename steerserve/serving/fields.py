"""Paths of fields in the caller's message.

Types name a field by its place in the dataclasses, callers by its place in the message they sent:
``proto_field`` turns the first into the second, so that every error a caller sees names a field of the proto.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from steerserve.errors import InvalidRequestError
from steerserve.v1 import generation_pb2

RequestMessage = generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest

_TARGET_OR_VALUE = re.compile(r"(?P<path>steering\..+)\.(?P<name>target|value|unit)(?:\.(?P<leaf>\w+))?")
_STEP = re.compile(r"(?P<name>\w+)(?:\[(?P<index>\d+)\])?")
_PROMPT_FIELD = re.compile(r"prompt(?:\.\w+)?(?P<element>\[\d+\])?")
_ELEMENTS = {"text": "text", "token_ids": "token_ids.ids", "messages": "messages.messages"}


class AsShown(str):
    """A value of which only its repr is left."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def proto_field(field: str, message: RequestMessage) -> str:
    """The path in ``message`` of what the types call ``field``, e.g. ``steering.interventions[0].target.site``."""
    match = _TARGET_OR_VALUE.fullmatch(field)
    if match is not None:
        sent = _part_at(match["path"], message)
        chosen = sent.WhichOneof("target" if match["name"] == "target" else "value")
        leaf = match["leaf"]
        path = f"{match['path']}.{chosen or match['name']}"
        return path if leaf is None or chosen == "concept" else f"{path}.{leaf}"
    match = _PROMPT_FIELD.fullmatch(field)
    form = message.WhichOneof("prompt")
    if match is not None and form is not None:
        return _ELEMENTS[form] + match["element"] if match["element"] else form
    return field


def _part_at(path: str, message: ProtoMessage) -> ProtoMessage:
    """The part of ``message`` at ``path``, e.g. ``steering.guards[0].rewind.edits[1]``."""
    for match in _STEP.finditer(path):
        part = getattr(message, match["name"])
        message = part if match["index"] is None else part[int(match["index"])]
    return message


@contextmanager
def rooted_at(path: str) -> Iterator[None]:
    """Errors of a type that was read at ``path`` name a field of the message, not ``<type>.<field>``."""
    try:
        yield
    except InvalidRequestError as error:
        field = error.field.partition(".")[2]
        raise InvalidRequestError(f"{path}.{field}", AsShown(error.value), error.expected) from None


def refuse_unknown_fields(message: ProtoMessage, path: str = "") -> None:
    """A field this server does not know may ask for steering that it would not do: refuse, never ignore.

    Raises:
        InvalidRequestError: at ``path`` or below it is such a field.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise InvalidRequestError(path or "request", f"field number {number}", "only fields this server knows")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        name = f"{path}.{descriptor.name}" if path else descriptor.name
        if descriptor.is_repeated:
            for i, element in enumerate(value):
                refuse_unknown_fields(element, f"{name}[{i}]")
        else:
            refuse_unknown_fields(value, name)


def bounded(value: int, field: str, low: int, high: int) -> int:
    """``value``, refused outside ``[low, high]``."""
    expect(low <= value <= high, field, value, f"an integer in [{low}, {high}]")
    return value


def expect(valid: bool, field: str, value: object, expected: str) -> None:
    """Raise InvalidRequestError unless ``valid``."""
    if not valid:
        raise InvalidRequestError(field, value, expected)


def refuse_no_tokens(max_tokens: int) -> None:
    """Refuse to generate nothing: a text that is only to be read has a call of its own, and is admitted as such."""
    expect(max_tokens != 0, "sampling.max_tokens", max_tokens, "an integer >= 1")


def refuse_too_many(count: int, field: str, limit: int) -> None:
    """Conversion runs in the event loop: a message of a million small parts must not hold it up."""
    expect(count <= limit, field, f"{count} elements", f"at most {limit}")
