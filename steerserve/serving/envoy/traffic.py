"""One HTTP exchange between a client and another model, as Envoy shows it: headers, bodies and trailers, each way."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from steerserve.config import EnvoyConfig
from steerserve.errors import CapacityError, SteerserveError
from steerserve.serving.envoy.bodies import (
    Json,
    UnreadableError,
    Words,
    asked_words,
    choice_words,
    choices_of,
    dump,
    parse,
    without_other_texts,
)
from steerserve.serving.envoy.judge import Judge, Mark, redacted, worst
from steerserve.serving.envoy.replies import VERDICT_HEADER as VERDICT
from steerserve.serving.envoy.replies import Mode, Side, body_reply, headers_reply, refusal, trailers_reply
from steerserve.serving.envoy.stream_filter import StreamFilter
from steerserve.serving.service import Caller
from steerserve.types import Phase, VerdictKind

_log = logging.getLogger(__name__)

REQUEST_VERDICT = "x-steerserve-request-verdict"
_CHECKED_PATH = re.compile(r".*/(chat/)?completions/?")
_Replies = list[pb.ProcessingResponse]


class _Plan(Enum):
    """What is done with a body."""

    PASS = auto()
    """It goes on as it is."""
    WHOLE = auto()
    """It is collected and judged at its end."""
    EVENTS = auto()
    """It is a stream of events, judged as it comes."""
    DISCARD = auto()
    """What was sent in its place is complete."""


@dataclass
class _Body:
    """One direction's body, and what of it waits.

    Attributes:
        mode: in which Envoy sends it; NONE: not known yet.
    """

    side: Side
    mode: int = Mode.NONE
    plan: _Plan = _Plan.PASS
    collected: bytearray = field(default_factory=bytearray)
    events: StreamFilter | None = None
    verdict: VerdictKind | None = None

    def let_go(self) -> bytes:
        """What waits, as it came; the rest goes on as it is."""
        waiting = bytes(self.collected) if self.events is None else self.events.let_go()
        self.collected.clear()
        self.plan = _Plan.PASS
        return waiting


class _RefusedError(Exception):
    """Ends the exchange with ``reply``."""

    def __init__(self, reply: pb.ProcessingResponse) -> None:
        self.reply = reply
        super().__init__()


class Traffic:
    """Answers the messages about one exchange.

    Args:
        max_bytes: of a body, or of the part of a stream that waits.
    """

    def __init__(self, judge: Judge, config: EnvoyConfig, max_bytes: int, caller: Caller) -> None:
        self._judge = judge
        self._config = config
        self._max_bytes = max_bytes
        self._caller = caller
        self._request = _Body("request")
        self._response = _Body("response")

    async def replies(self, message: pb.ProcessingRequest) -> _Replies:
        """What to answer; an immediate response ends the exchange."""
        if message.HasField("protocol_config"):
            self._request.mode = message.protocol_config.request_body_mode
            self._response.mode = message.protocol_config.response_body_mode
        try:
            match message.WhichOneof("request"):
                case "request_headers":
                    return [self._request_headers(message.request_headers)]
                case "response_headers":
                    return [self._response_headers(message.response_headers)]
                case "request_body":
                    return await self._body(self._request, message.request_body)
                case "response_body":
                    return await self._body(self._response, message.response_body)
                case "request_trailers":
                    return await self._trailers(self._request)
                case "response_trailers":
                    return await self._trailers(self._response)
                case _:
                    return []
        except _RefusedError as refused:
            return [refused.reply]

    # Headers: what the body is going to be.

    def _request_headers(self, message: pb.HttpHeaders) -> pb.ProcessingResponse:
        headers = _plain(message.headers)
        # Ours alone to set; and an answer that is compressed could not be read.
        removed = (VERDICT, REQUEST_VERDICT, "accept-encoding")
        if not message.end_of_stream:
            self._request.plan = _Plan.WHOLE
            path = headers.get(":path", "").partition("?")[0]
            if not _CHECKED_PATH.fullmatch(path):
                self._cannot_read(self._request, f"{path[:80]} is neither of chat/completions and completions")
            elif _is_encoded(headers):
                self._cannot_read(self._request, "the request is compressed")
        return headers_reply("request", {}, removed)

    def _response_headers(self, message: pb.HttpHeaders) -> pb.ProcessingResponse:
        headers = _plain(message.headers)
        body = self._response
        told = {} if self._request.verdict is None else {REQUEST_VERDICT: self._request.verdict.value}
        is_answer = self._request.verdict is not None and headers.get(":status", "200").startswith("2")
        if is_answer and not message.end_of_stream:
            content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if _is_encoded(headers):
                self._cannot_read(body, "the answer is compressed")
            elif content_type == "text/event-stream":
                body.plan = _Plan.EVENTS
                body.events = StreamFilter(self._judge_answer, self._config.hold_back, self._max_bytes)
            elif content_type == "application/json":
                body.plan = _Plan.WHOLE
            else:
                self._cannot_read(body, f"the answer is {content_type[:80] or 'of no type'}")
        return headers_reply("response", told, (VERDICT,))

    # Bodies.

    async def _body(self, body: _Body, message: pb.HttpBody) -> _Replies:
        if body.mode == Mode.NONE:
            body.mode = Mode.BUFFERED if message.end_of_stream else Mode.STREAMED
        is_last = message.end_of_stream or body.mode == Mode.BUFFERED
        sent = await self._sent(body, message.body, is_last)
        if body.mode == Mode.FULL_DUPLEX_STREAMED and not (sent or is_last):
            return []
        if is_last:
            _log.info("a %s of another model was %s", body.side, body.verdict or "not checked")
        reply = body_reply(body.side, body.mode, message.body, sent, is_last=is_last, verdict=body.verdict)
        return [reply]

    async def _trailers(self, body: _Body) -> _Replies:
        """The body has ended without saying so."""
        if body.mode == Mode.FULL_DUPLEX_STREAMED:
            sent = await self._sent(body, b"", is_last=True)
            flushed = body_reply(body.side, body.mode, b"", sent, is_last=False, verdict=body.verdict)
            return [flushed, trailers_reply(body.side)] if sent else [trailers_reply(body.side)]
        if body.collected or (body.events is not None and body.events.is_waiting):
            raise _RefusedError(_refusal_of(UnreadableError("trailers came before the body had ended"), body.side))
        return [trailers_reply(body.side)]

    async def _sent(self, body: _Body, data: bytes, is_last: bool) -> bytes:
        """What goes on in the place of ``data``."""
        try:
            match body.plan:
                case _Plan.PASS:
                    return data
                case _Plan.DISCARD:
                    return b""
                case _Plan.WHOLE:
                    return await self._collect(body, data, is_last)
                case _Plan.EVENTS:
                    return await self._filter(body, data, is_last)
        except _RefusedError:
            raise
        except Exception as error:
            return self._failed(body, error)

    async def _collect(self, body: _Body, data: bytes, is_last: bool) -> bytes:
        body.collected += data
        if len(body.collected) > self._max_bytes:
            raise UnreadableError(f"the {body.side} has more than {self._max_bytes} bytes")
        if not is_last:
            if body.mode == Mode.BUFFERED_PARTIAL:
                raise UnreadableError(f"the {body.side} is larger than Envoy's buffer")
            return b""
        content = bytes(body.collected)
        judged = await (self._judged_request(content) if body.side == "request" else self._judged_answer(content))
        body.collected.clear()
        body.verdict = judged[1]
        return judged[0]

    async def _filter(self, body: _Body, data: bytes, is_last: bool) -> bytes:
        assert body.events is not None
        sent = await body.events.feed(data)
        if is_last:
            sent += await body.events.finish()
        body.verdict = body.events.verdict
        return sent

    async def _judged_request(self, content: bytes) -> tuple[bytes, VerdictKind]:
        body = parse(content)
        verdict = VerdictKind.ALLOW
        for words in asked_words(body):
            verdict = worst([verdict, await self._rewrite(words, Phase.PROMPT)])
        if verdict is VerdictKind.BLOCKED:
            message = "the request was refused by the policies in force"
            raise _RefusedError(refusal(400, "content_filter", message, verdict))
        return (dump(body) if verdict is VerdictKind.REDACTED else content), verdict

    async def _judged_answer(self, content: bytes) -> tuple[bytes, VerdictKind]:
        body = parse(content)
        if "error" in body and "choices" not in body:
            return content, VerdictKind.ALLOW
        verdicts = [await self._judge_choice(choice) for choice in choices_of(body)]
        is_changed = worst(verdicts) in (VerdictKind.REDACTED, VerdictKind.BLOCKED)
        return (dump(body) if is_changed else content), worst(verdicts)

    async def _judge_choice(self, choice: Json) -> VerdictKind:
        texts = list(choice_words(choice))
        verdict = worst([await self._rewrite(words, Phase.GENERATED) for words in texts])
        if verdict in (VerdictKind.REDACTED, VerdictKind.BLOCKED):
            without_other_texts(choice)
        if verdict is VerdictKind.BLOCKED:
            for words in texts:
                words.write("")
            choice["finish_reason"] = "content_filter"
        return verdict

    async def _rewrite(self, words: Words, phase: Phase) -> VerdictKind:
        text = words.text
        marks = await self._judge(text, phase, self._caller)
        verdict = worst(mark.verdict for mark in marks)
        if verdict is VerdictKind.REDACTED:
            words.write(redacted(text, marks))
        return verdict

    async def _judge_answer(self, text: str) -> list[Mark]:
        return await self._judge(text, Phase.GENERATED, self._caller)

    # What cannot be checked.

    def _cannot_read(self, body: _Body, reason: str) -> None:
        if not self._config.fail_open:
            raise _RefusedError(_refusal_of(UnreadableError(reason), body.side))
        _log.warning("a %s of another model passes unchecked: %s", body.side, reason)
        body.plan = _Plan.PASS

    def _failed(self, body: _Body, error: Exception) -> bytes:
        """What goes on when ``body`` could not be checked."""
        is_expected = isinstance(error, UnreadableError | SteerserveError)
        _log.warning("a %s could not be checked: %s", body.side, error, exc_info=None if is_expected else error)
        if self._config.fail_open:
            return body.let_go()
        reply = _refusal_of(error, body.side)
        if body.side == "request" or body.mode in (Mode.BUFFERED, Mode.BUFFERED_PARTIAL):
            raise _RefusedError(reply)
        # The headers are out: what follows them can only say what happened.
        body.plan, body.verdict = _Plan.DISCARD, VerdictKind.BLOCKED
        body.collected.clear()
        content = reply.immediate_response.body
        return content if body.events is None else body.events.end_with(parse(content))


def _refusal_of(error: Exception, side: Side) -> pb.ProcessingResponse:
    match error:
        case UnreadableError():
            status = 400 if side == "request" else 502
            return refusal(status, "unreadable", f"the {side} cannot be checked: {error}", VerdictKind.BLOCKED)
        case CapacityError():
            return refusal(503, "capacity", f"the {side} cannot be checked now: {error}", VerdictKind.BLOCKED)
        case _:
            return refusal(503, "unchecked", f"the {side} cannot be checked now", VerdictKind.BLOCKED)


def _plain(headers: base_pb2.HeaderMap) -> Mapping[str, str]:
    return {
        header.key.lower(): header.raw_value.decode("latin-1") if header.raw_value else header.value
        for header in headers.headers
    }


def _is_encoded(headers: Mapping[str, str]) -> bool:
    return headers.get("content-encoding", "identity").strip().lower() not in ("", "identity")
