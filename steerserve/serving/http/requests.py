"""From bodies to requests, and from a request's fields back to the keys that the caller wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from steerserve.errors import FieldError, InvalidRequestError
from steerserve.serving.fields import AsShown, expect, refuse_no_tokens, refuse_too_many
from steerserve.serving.http.bodies import Body, ChatBody, CompletionBody
from steerserve.serving.http.steering import read_steering
from steerserve.types import MAX_RESPONSES, GenerateRequest, Message, Prompt, SamplingParams

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of plain completions."""

_SAME_NAMES = (
    "n", "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "logit_bias", "min_p",
    "repetition_penalty", "ignore_eos", "include_stop_str_in_output",
)  # fmt: skip
_PROMPT_FIELD = re.compile(r"prompt(?:\.\w+)?(?P<element>(?:\[\d+\](?:\.role)?)?)")
_PROMPT_FORMS = "text, token ids, or a list of either"
_ROLES = {"developer": "system"}  # its name in OpenAI's later models; chat templates know the earlier one

Rename = Callable[[str, int], str]


@dataclass(frozen=True)
class Asked:
    """What one body asks for.

    Attributes:
        requests: one for each prompt.
        rename: from a field of a request, as the types name it, and the request's index, to the key in the body.
    """

    requests: tuple[GenerateRequest, ...]
    rename: Rename


@contextmanager
def fields_renamed(rename: Rename, index: int) -> Iterator[None]:
    """Errors at a field of the request with this ``index`` name the key of the body instead."""
    try:
        yield
    except FieldError as error:
        raise type(error)(rename(error.field, index), AsShown(error.value), error.expected) from None


def chat_request(body: ChatBody, answer_id: str, default_max_tokens: int) -> Asked:
    """Read a chat completion; ``answer_id`` names it in the engine and in the answer.

    Raises:
        InvalidRequestError: what no loaded model is needed to see; it names the key of the body.
    """
    expect(body.top_logprobs is None or body.logprobs is True, "top_logprobs", body.top_logprobs, "logprobs: true too")
    limits = [limit for limit in (body.max_completion_tokens, body.max_tokens) if limit is not None]
    expect(len(set(limits)) < 2, "max_tokens", body.max_tokens, f"{body.max_completion_tokens}, as the other key says")
    names = {
        "sampling.max_tokens": "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        "sampling.logprobs": "top_logprobs",
    }
    turns = tuple(Message(_ROLES.get(turn.role, turn.role), turn.text) for turn in body.messages)
    expect(len(turns) > 0, "messages", AsShown("[]"), "at least one message")
    sampling = {
        "max_tokens": limits[0] if limits else default_max_tokens,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }

    def rename(field: str, index: int) -> str:
        return names.get(field) or _renamed(field, "messages")

    return _asked(body, answer_id, [turns], sampling, rename)


def completion_request(body: CompletionBody, answer_id: str) -> Asked:
    """Read a plain completion; each prompt of several adds its number to ``answer_id``.

    Raises:
        InvalidRequestError: as ``chat_request``.
    """
    prompts, is_list = _prompts(body.prompt)
    num_responses = len(prompts) * (body.n or 1)
    expect(num_responses <= MAX_RESPONSES, "prompt", f"{num_responses} responses in all", f"at most {MAX_RESPONSES}")
    sampling = {
        "max_tokens": COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        "logprobs": body.logprobs,
    }

    def rename(field: str, index: int) -> str:
        return _renamed(field, f"prompt[{index}]" if is_list else "prompt")

    return _asked(body, answer_id, prompts, sampling, rename)


def _asked(body: Body, answer_id: str, prompts: Sequence[Prompt], sampling: dict[str, Any], rename: Rename) -> Asked:
    steering = read_steering(body.steering, body.guards or ())
    with fields_renamed(rename, 0):
        params = _sampling(body, sampling)
    requests = tuple(
        GenerateRequest(
            request_id=answer_id if len(prompts) == 1 else f"{answer_id}-{index}",
            prompt=prompt,
            sampling=params,
            steering=steering.spec,
            policies=tuple(body.policies or ()),
            return_activations=body.return_activations or False,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
        )
        for index, prompt in enumerate(prompts)
    )
    return Asked(requests, lambda field, index: rename(steering.locate(field), index))


def _sampling(body: Body, values: dict[str, Any]) -> SamplingParams:
    refuse_no_tokens(values["max_tokens"])
    given = {name: getattr(body, name) for name in _SAME_NAMES if getattr(body, name) is not None}
    return SamplingParams(
        **values,
        **given,
        top_k=0 if body.top_k in (None, -1) else body.top_k,  # vLLM's -1: no limit
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
    )


def _prompts(prompt: object) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they stood in a list of prompts."""
    if isinstance(prompt, str) or _is_token_ids(prompt):
        return [_prompt(prompt)], False
    if isinstance(prompt, list) and prompt:
        refuse_too_many(len(prompt), "prompt", MAX_RESPONSES)
        if len({type(element) for element in prompt}) == 1:
            return [_prompt(element) for element in prompt], True
    raise InvalidRequestError("prompt", prompt, _PROMPT_FORMS)


def _prompt(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if _is_token_ids(value) or value == []:
        return tuple(value)
    raise InvalidRequestError("prompt", value, _PROMPT_FORMS)


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(element) is int for element in value)


def _renamed(field: str, prompt_key: str) -> str:
    match = _PROMPT_FIELD.fullmatch(field)
    if match is not None:
        return prompt_key + match["element"]
    return field.removeprefix("sampling.")
