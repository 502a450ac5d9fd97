"""From the pieces of responses to the JSON of the OpenAI API, whole and streamed.

Everything is read from the messages that gRPC sends, so that the two never tell different things: what OpenAI has no
place for stands in each choice's ``steerserve``, as the JSON form of ``steerserve.v1.FinishInfo``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as ProtoMessage

from steerserve.serving.convert_response import response_to_proto, step_to_proto
from steerserve.types import REDACTED_TEXT, REDACTED_TOKEN_ID, StepOutput
from steerserve.v1 import generation_pb2 as pb

Piece = pb.Completion | pb.GenerateStreamResponse
Json = dict[str, Any]

_FINISH_REASONS = {pb.FINISH_REASON_BLOCKED: "content_filter"}
_LOWEST_LOGPROB = -9999.0  # OpenAI's; JSON has no infinity


class Vocabulary:
    """The texts of single tokens.

    Args:
        decode: from ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._text = lru_cache(maxsize=65536)(lambda token_id: decode([token_id]))

    def text(self, token_id: int) -> str:
        """Of a token as it was sent; what was redacted is not told here either."""
        return REDACTED_TEXT if token_id == REDACTED_TOKEN_ID else self._text(token_id)

    def utf8(self, token_id: int) -> list[int] | None:
        """The bytes of its text; None if it is a part of a character."""
        text = self.text(token_id)
        return None if "�" in text else list(text.encode())


@dataclass
class Answer(ABC):
    """All JSON messages of one response; it counts what it has written of each choice.

    Attributes:
        num_per_prompt: choices of each prompt; ``prompt`` k has those from k · ``num_per_prompt`` on.
        created: UNIX time in seconds.
    """

    id: str
    model: str
    fingerprint: str
    vocabulary: Vocabulary
    num_per_prompt: int
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _num_tokens: Counter[int] = field(default_factory=Counter)
    _usage: dict[int, pb.FinishInfo] = field(default_factory=dict)

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, outputs: Sequence[Sequence[StepOutput]]) -> Json:
        """The answer to a request that does not stream; ``outputs`` are those of each prompt."""
        choices = [
            self._choice(completion, prompt * self.num_per_prompt + index)
            for prompt, pieces in enumerate(outputs)
            for index, completion in enumerate(response_to_proto(pieces).completions)
        ]
        return self._envelope(self.whole_object, choices) | {"usage": self._usage_so_far()}

    def chunk(self, prompt: int, output: StepOutput) -> Json | None:
        """One event of a stream; None if ``output`` has nothing to tell."""
        index = prompt * self.num_per_prompt + output.index
        self._num_tokens[index] += len(output.token_ids)
        piece = step_to_proto(output, self._num_tokens[index])
        if not (piece.text or piece.scores or piece.logprobs or piece.HasField("finish_info")):
            return None
        envelope = self._envelope(self.chunk_object, [self._delta(piece, index)])
        return envelope | {"usage": None} if self.include_usage else envelope

    def usage_chunk(self) -> Json:
        """The last event of a stream that was asked to tell the usage."""
        return self._envelope(self.chunk_object, []) | {"usage": self._usage_so_far()}

    @abstractmethod
    def _choice(self, piece: Piece, index: int) -> Json:
        """A whole choice."""

    @abstractmethod
    def _delta(self, piece: Piece, index: int) -> Json:
        """A piece of a choice."""

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _common(self, piece: Piece, index: int) -> Json:
        """What choices and deltas of all kinds have in common."""
        common: Json = {"index": index, "finish_reason": None}
        report: Json = {}
        if piece.HasField("finish_info"):
            finish = piece.finish_info
            self._usage[index] = finish
            name = pb.FinishReason.Name(finish.finish_reason).removeprefix("FINISH_REASON_").lower()
            common["finish_reason"] = _FINISH_REASONS.get(finish.finish_reason, name)
            stop_reason = finish.WhichOneof("stop_reason")
            common["stop_reason"] = getattr(finish, stop_reason) if stop_reason else None
            report = _to_json(finish)
        if piece.scores:
            report["scores"] = [_to_json(at) for at in piece.scores]
        return common | {"steerserve": report} if report else common

    def _usage_so_far(self) -> Json:
        firsts = {index // self.num_per_prompt: finish for index, finish in sorted(self._usage.items(), reverse=True)}
        num_prompt = sum(finish.num_prompt_tokens for finish in firsts.values())
        num_generated = sum(finish.num_generated_tokens for finish in self._usage.values())
        num_cached = sum(finish.receipt.num_cached_tokens for finish in firsts.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }


@dataclass
class ChatAnswer(Answer):
    """``chat.completion`` and ``chat.completion.chunk``."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    _begun: set[int] = field(default_factory=set)

    def _choice(self, piece: Piece, index: int) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._common(piece, index) | {"message": message, "logprobs": self._logprobs(piece)}

    def _delta(self, piece: Piece, index: int) -> Json:
        delta = {"content": piece.text} if index in self._begun else {"role": "assistant", "content": piece.text}
        self._begun.add(index)
        return self._common(piece, index) | {"delta": delta, "logprobs": self._logprobs(piece)}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not piece.logprobs:
            return None
        content = [
            self._token(token_id, _of_token(entry))
            | {"top_logprobs": [self._token(top.token_id, top.logprob) for top in entry.top]}
            for token_id, entry in zip(piece.token_ids.ids, piece.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        text = self.vocabulary.text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": self.vocabulary.utf8(token_id)}


@dataclass
class CompletionAnswer(Answer):
    """``text_completion``, whole and in pieces."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    _offset: Counter[int] = field(default_factory=Counter)

    def _choice(self, piece: Piece, index: int) -> Json:
        return self._common(piece, index) | {"text": piece.text, "logprobs": self._logprobs(piece, index)}

    _delta = _choice

    def _logprobs(self, piece: Piece, index: int) -> Json | None:
        if not piece.logprobs:
            return None
        report: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(piece.token_ids.ids, piece.logprobs, strict=True):
            text = self.vocabulary.text(token_id)
            top = {self.vocabulary.text(other.token_id): _finite(other.logprob) for other in entry.top}
            report["tokens"].append(text)
            report["token_logprobs"].append(_of_token(entry))
            report["top_logprobs"].append({text: _of_token(entry)} | top)
            report["text_offset"].append(self._offset[index])
            self._offset[index] += len(text)
        return report


def _to_json(message: ProtoMessage) -> Json:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _of_token(entry: pb.TokenLogprobs) -> float:
    return _finite(entry.logprob) if entry.rank else _LOWEST_LOGPROB  # no rank: redacted


def _finite(logprob: float) -> float:
    return max(_LOWEST_LOGPROB, logprob)
