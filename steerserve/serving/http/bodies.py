"""Request bodies of the OpenAI API, with vLLM's and our own extras, as pydantic models.

Wrong types and unknown keys are refused here; ranges are checked where gRPC's are, in ``SamplingParams`` and the
engine. A key that is known and would change the answer is refused too unless its value asks for nothing: what the
server cannot do is never passed over.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from steerserve.errors import InvalidRequestError
from steerserve.serving.convert import MAX_CACHE_SALT_LENGTH, MAX_ELEMENTS
from steerserve.serving.fields import AsShown

IGNORED = frozenset(
    {
        "inference_geo", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    }
)  # fmt: skip
"""Keys that do not change the answer of a server like this one."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Keys of the API that this server does not support → the values, besides null, that ask for nothing."""

MAX_INPUTS = 64
"""Texts of one moderation."""

BodyT = TypeVar("BodyT", bound=BaseModel)

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list):
        return parts
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatTurn(BaseModel):
    """One message; keys of other kinds of messages may be there if they are empty."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(max_length=MAX_ELEMENTS)]

    @property
    def text(self) -> str:
        """Its parts, a line each."""
        return "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted and not done: padding against observers who see the sizes of encrypted packets."""


class Body(BaseModel):
    """What chat and plain completions have in common; null is the same as leaving a key out."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: Int32 | None = None
    n: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Int64 | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[UInt32, float], Field(max_length=MAX_ELEMENTS)] | None = None

    # vLLM's.
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[UInt32], Field(max_length=MAX_ELEMENTS)] | None = None
    include_stop_str_in_output: bool | None = None
    priority: Int32 | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_CACHE_SALT_LENGTH)] | None = None

    # Ours.
    steering: Any = None
    """The JSON form of ``steerserve.v1.SteeringSpec``, or a list of interventions on one line each."""
    guards: Annotated[list[str], Field(max_length=MAX_ELEMENTS)] | None = None
    """Guards on one line each."""
    policies: Annotated[list[str], Field(max_length=MAX_ELEMENTS)] | None = None
    return_activations: bool | None = None


class ChatBody(Body):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatTurn], Field(max_length=MAX_ELEMENTS)]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None


class CompletionBody(Body):
    """``POST /v1/completions``."""

    prompt: Any = None
    """Text, token ids, or a list of either."""
    logprobs: Int32 | None = None


class ModerationBody(BaseModel):
    """``POST /v1/moderations``."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    input: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(min_length=1, max_length=MAX_INPUTS)]

    @property
    def texts(self) -> list[str]:
        """Those to judge, in order."""
        return [part.text for part in self.input]


def parse_body(body_type: type[BodyT], content: bytes) -> BodyT:
    """Read a body.

    Raises:
        InvalidRequestError: not JSON, a wrong type, or a key that is unknown or not supported.
    """
    try:
        body = body_type.model_validate_json(content)
    except ValidationError as error:
        raise _field_error(error) from None
    _refuse_unsupported(body.model_extra or {}, body_type)
    for i, turn in enumerate(body.messages if isinstance(body, ChatBody) else ()):
        for name, value in (turn.model_extra or {}).items():
            if value:
                raise InvalidRequestError(f"messages[{i}].{name}", value, "a message of role and text content only")
    return body


def _refuse_unsupported(extra: dict[str, Any], body_type: type[BaseModel]) -> None:
    for name, value in extra.items():
        if name in IGNORED or (name in NEUTRAL and value is None) or value in NEUTRAL.get(name, ()):
            continue
        if name in NEUTRAL:
            expected = " or ".join(repr(neutral) for neutral in (None, *NEUTRAL[name]))
            raise InvalidRequestError(name, value, f"{expected}: this server does not support it")
        near = difflib.get_close_matches(name, [*body_type.model_fields, *NEUTRAL], n=1)
        raise InvalidRequestError(name, value, f"a key this server knows{f', such as {near[0]}' if near else ''}")


def _field_error(error: ValidationError) -> InvalidRequestError:
    problem = error.errors(include_url=False, include_context=False)[0]
    if problem["type"] == "json_invalid":
        return InvalidRequestError("body", AsShown("a malformed body"), problem["msg"].removeprefix("Invalid "))
    path = ""
    for part in problem["loc"]:
        if part != "[key]":
            path += f"[{part}]" if isinstance(part, int) or part.isdecimal() else f".{part}"
    value = AsShown("nothing") if problem["type"] == "missing" else problem["input"]
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return InvalidRequestError(path.lstrip(".") or "body", value, expected[0].lower() + expected[1:])
