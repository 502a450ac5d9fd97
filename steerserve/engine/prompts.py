"""From a request's prompt to token ids, with every check that needs the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from steerserve.errors import InvalidRequestError
from steerserve.models.loading import LoadedModel
from steerserve.types import GenerateRequest, Message

MAX_CHARS_PER_TOKEN = 256
"""No text within ``max_model_len`` has more characters a token than this."""
ROLES = ("system", "user", "assistant", "tool")


def encode_prompt(request: GenerateRequest, model: LoadedModel, max_model_len: int) -> list[int]:
    """Token ids of the prompt: text as the tokenizer does by default, messages by the chat template.

    Raises:
        InvalidRequestError: an empty or overlong prompt, ids out of the vocabulary, messages the model
            has no template for, or ``max_tokens`` beyond ``max_model_len``.
    """
    token_ids = _token_ids(request, model.tokenizer, max_model_len * MAX_CHARS_PER_TOKEN)
    if not token_ids:
        raise InvalidRequestError("prompt", request.prompt, "at least one token")
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < model.vocab_size:
            expected = f"a token id from 0 to {model.vocab_size - 1}"
            raise InvalidRequestError(f"prompt.token_ids[{index}]", token_id, expected)
    longest = max_model_len if request.is_reading else max_model_len - 1
    if len(token_ids) > longest:
        reason = "" if request.is_reading else " less one to generate"
        expected = f"at most {longest} tokens (max_model_len {max_model_len}{reason})"
        raise InvalidRequestError("prompt", f"{len(token_ids)} tokens", expected)
    room = max_model_len - len(token_ids)
    if request.sampling.max_tokens > room:
        expected = f"at most {room}: the prompt has {len(token_ids)} of max_model_len {max_model_len} tokens"
        raise InvalidRequestError("sampling.max_tokens", request.sampling.max_tokens, expected)
    return token_ids


def _token_ids(request: GenerateRequest, tokenizer: PreTrainedTokenizerBase, max_chars: int) -> list[int]:
    prompt = request.prompt
    if isinstance(prompt, str):
        if len(prompt) > max_chars:  # tokenising megabytes would hold up every other request
            raise InvalidRequestError("prompt", f"{len(prompt)} characters", f"at most {max_chars}")
        return list(tokenizer(prompt)["input_ids"]) if prompt else []
    messages = [item for item in prompt if isinstance(item, Message)]
    if messages:
        return _apply_chat_template(messages, tokenizer)
    return [item for item in prompt if isinstance(item, int)]


def _apply_chat_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidRequestError(
            "prompt.messages", f"{len(messages)} messages", "text: the model has no chat template"
        )
    for index, message in enumerate(messages):
        if message.role not in ROLES:  # a template writes any role as it stands, and a model follows none but these
            raise InvalidRequestError(f"prompt.messages[{index}].role", message.role, f"one of {', '.join(ROLES)}")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = [message.role for message in messages]
        raise InvalidRequestError("prompt.messages", roles, f"turns the chat template accepts ({error})") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
