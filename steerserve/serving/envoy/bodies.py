"""Where the words stand in OpenAI-style bodies, and how to write others in their place.

What cannot be read for certain is refused, not guessed at: two readers may take different things from a key that
stands twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_TEXT_KEYS = ("content", "text", "refusal", "reasoning_content", "reasoning")


class UnreadableError(Exception):
    """Traffic in which the words cannot be found for certain; the text says why."""


@dataclass(frozen=True)
class Words:
    """A text of a body, at ``holder[key]``.

    Attributes:
        channel: what it belongs to: the pieces of one channel, joined, are one text.
    """

    holder: Any
    key: str | int
    channel: str = ""

    @property
    def text(self) -> str:
        """As it stands there."""
        text: str = self.holder[self.key]
        return text

    def write(self, text: str) -> None:
        """Put another in its place."""
        self.holder[self.key] = text


def parse(content: bytes) -> Json:
    """Read a body.

    Raises:
        UnreadableError: no JSON object, or one that readers may take differently.
    """
    try:
        body = json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"not JSON: {error}") from None
    if not isinstance(body, dict):
        raise UnreadableError("not a JSON object")
    return body


def dump(body: Json) -> bytes:
    """Write a body; in ASCII, as a text may hold halves of surrogate pairs."""
    return json.dumps(body, separators=(",", ":")).encode()


def asked_words(body: Json) -> list[Words]:
    """What the user said last: the user's messages behind the assistant's last one, or the prompts.

    Raises:
        UnreadableError: neither messages nor a prompt in text, or parts that are no text.
    """
    if "messages" in body:
        return list(_last_user_words(body["messages"]))
    match body.get("prompt"):
        case str():
            return [Words(body, "prompt")]
        case [str(), *_] as prompts if all(isinstance(prompt, str) for prompt in prompts):
            return [Words(prompts, i) for i in range(len(prompts))]
        case _:
            raise UnreadableError("neither messages nor a prompt in text")


def choices_of(body: Json) -> list[Json]:
    """The choices of an answer, or of a piece of one.

    Raises:
        UnreadableError: there are none, or choices of another form.
    """
    choices = body.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UnreadableError("no choices")
    return choices


def choice_words(choice: Json) -> Iterator[Words]:
    """The texts of a choice, or of a piece of one: what is said, and what tools are called with.

    Raises:
        UnreadableError: a choice of another form.
    """
    index = choice.get("index", 0)
    holder = choice.get("message", choice.get("delta", choice))
    if not isinstance(holder, dict):
        raise UnreadableError("a choice of another form")
    for key in _TEXT_KEYS:
        match holder.get(key):
            case str():
                yield Words(holder, key, f"{index}.{key}")
            case None:
                pass
            case _:
                raise UnreadableError(f"a choice whose {key} is no text")
    for i, call in enumerate(holder.get("tool_calls") or ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments", ""), str):
            raise UnreadableError("a tool call of another form")
        if "arguments" in function:
            yield Words(function, "arguments", f"{index}.tool_calls[{call.get('index', i)}]")


def without_other_texts(choice: Json) -> None:
    """Log-probabilities repeat the words token by token: take them away where words were changed."""
    if choice.get("logprobs") is not None:
        choice["logprobs"] = None


def _last_user_words(messages: object) -> Iterator[Words]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UnreadableError("messages of another form")
    answered = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=-1)
    for message in messages[answered + 1 :]:
        if message.get("role") == "user":
            yield from _content_words(message)


def _content_words(message: Json) -> Iterator[Words]:
    match message.get("content"):
        case str():
            yield Words(message, "content")
        case list() as parts:
            for part in parts:
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    raise UnreadableError("a message with parts that are no text")
                yield Words(part, "text")
        case _:
            raise UnreadableError("a message without text")


def _unique(pairs: Iterable[tuple[str, Any]]) -> Json:
    body: Json = {}
    for key, value in pairs:
        if key in body:
            raise ValueError(f"the key {key!r:.40} stands twice")
        body[key] = value
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
