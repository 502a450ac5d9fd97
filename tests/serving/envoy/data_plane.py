"""A data plane as the protos describe Envoy: it sends one exchange in a body mode, and applies what it is answered.

What Envoy would refuse fails the test: an answer of another kind than its message, a content-length that is not
that of the body, a mutation of a form that the mode does not allow.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode as Mode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc

MODES = [Mode.BUFFERED, Mode.STREAMED, Mode.FULL_DUPLEX_STREAMED]
JSON_HEADERS = {"content-type": "application/json"}
EVENT_HEADERS = {"content-type": "text/event-stream"}


@dataclass
class Half:
    """What one side got of the other's message."""

    headers: dict[str, str]
    body: bytes = b""
    pieces: list[bytes] = field(default_factory=list)


@dataclass
class Outcome:
    """How an exchange went: what upstream got and what the client got, or the local reply that ended it."""

    request: Half
    response: Half | None = None
    immediate: pb.ImmediateResponse | None = None
    metadata: dict[str, object] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818
    """An immediate response."""


class DataPlane:
    """Carries exchanges past the external processor at ``address``."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = external_processor_pb2_grpc.ExternalProcessorStub(self._channel)

    def __enter__(self) -> DataPlane:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def carry(
        self,
        request: Sequence[bytes],
        response: Sequence[bytes] = (),
        *,
        path: str = "/v1/chat/completions",
        mode: int = Mode.BUFFERED,
        request_headers: Mapping[str, str] = JSON_HEADERS,
        response_headers: Mapping[str, str] = JSON_HEADERS,
        trailers: bool = False,
        observe: bool = False,
    ) -> Outcome:
        """One exchange; bodies are given in the pieces in which they come from the network."""
        call = _Call(self._stub, mode, observe)
        outcome = Outcome(Half(dict(request_headers) | {":path": path, ":method": "POST"}))
        try:
            with call:
                self._half(call, "request", outcome.request, request, mode, trailers)
                outcome.response = Half({":status": "200"} | dict(response_headers))
                self._half(call, "response", outcome.response, response, mode, trailers)
        except Refused:
            outcome.immediate = call.immediate
            outcome.response = None
        outcome.metadata = call.metadata
        return outcome

    def _half(self, call: _Call, side: str, half: Half, pieces: Sequence[bytes], mode: int, trailers: bool) -> None:
        whole = b"".join(pieces)
        if mode == Mode.BUFFERED:
            half.headers["content-length"] = str(len(whole))
            pieces = [whole] if whole else []
        header_map = base_pb2.HeaderMap(
            headers=[base_pb2.HeaderValue(key=key, raw_value=value.encode()) for key, value in half.headers.items()]
        )
        message = pb.HttpHeaders(headers=header_map, end_of_stream=not pieces)
        reply = call.ask(**{f"{side}_headers": message})
        if reply is not None:
            _mutate(half.headers, reply.response.header_mutation)
        for i, piece in enumerate(pieces):
            body = pb.HttpBody(body=piece, end_of_stream=i == len(pieces) - 1 and not trailers)
            if mode == Mode.FULL_DUPLEX_STREAMED:
                call.send(**{f"{side}_body": body})
            else:
                self._apply(half, piece, call.ask(**{f"{side}_body": body}), mode)
        if trailers and pieces:
            call.send(**{f"{side}_trailers": pb.HttpTrailers()})
        if mode == Mode.FULL_DUPLEX_STREAMED and pieces and not call.observes:
            self._receive_streamed(call, side, half, trailers)
        elif trailers and pieces and not call.observes:
            assert call.receive().WhichOneof("response") == f"{side}_trailers"

    def _receive_streamed(self, call: _Call, side: str, half: Half, trailers: bool) -> None:
        while True:
            reply = call.receive()
            kind = reply.WhichOneof("response")
            if kind == f"{side}_trailers":
                assert trailers
                return
            assert kind == f"{side}_body"
            mutation = getattr(reply, kind).response.body_mutation
            assert mutation.WhichOneof("mutation") == "streamed_response"
            half.pieces.append(mutation.streamed_response.body)
            half.body += mutation.streamed_response.body
            if mutation.streamed_response.end_of_stream:
                assert not trailers
                return

    def _apply(self, half: Half, piece: bytes, reply: pb.BodyResponse | None, mode: int) -> None:
        if reply is None:
            half.body += piece
            return
        mutation = reply.response.body_mutation
        match mutation.WhichOneof("mutation"):
            case "body":
                sent = mutation.body
            case "clear_body":
                sent = b""
            case None:
                sent = piece
            case other:
                raise AssertionError(f"{other} in mode {mode}")
        half.pieces.append(sent)
        half.body += sent
        if mode == Mode.BUFFERED:  # in the other modes the headers are gone
            _mutate(half.headers, reply.response.header_mutation)
            assert half.headers["content-length"] == str(len(sent)), "Envoy answers 500 to this"


class _Call:
    """One call of ``Process``."""

    def __init__(self, stub: external_processor_pb2_grpc.ExternalProcessorStub, mode: int, observes: bool) -> None:
        self._messages: queue.SimpleQueue[pb.ProcessingRequest | None] = queue.SimpleQueue()
        self._replies = stub.Process(iter(self._messages.get, None), timeout=60)
        self._mode: int | None = mode
        self.observes = observes
        self.immediate: pb.ImmediateResponse | None = None
        self.metadata: dict[str, object] = {}

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_: object) -> None:
        self._messages.put(None)
        rest = list(self._replies)
        assert rest == [], "an answer that nobody waits for"

    def send(self, **message: object) -> None:
        request = pb.ProcessingRequest(observability_mode=self.observes, **message)
        if self._mode is not None:
            request.protocol_config.request_body_mode = self._mode
            request.protocol_config.response_body_mode = self._mode
            self._mode = None
        self._messages.put(request)

    def receive(self) -> pb.ProcessingResponse:
        reply = next(self._replies)
        if reply.HasField("immediate_response"):
            self.immediate = reply.immediate_response
            raise Refused
        self.metadata |= {name: dict(value) for name, value in reply.dynamic_metadata.items()}
        return reply

    def ask(self, **message: object) -> object:
        """The reply to one message, of the same kind; None if there is to be none."""
        self.send(**message)
        if self.observes:
            return None
        reply = self.receive()
        (kind,) = message
        assert reply.WhichOneof("response") == kind
        return getattr(reply, kind)


def _mutate(headers: dict[str, str], mutation: pb.HeaderMutation) -> None:
    for name in mutation.remove_headers:
        headers.pop(name, None)
    for option in mutation.set_headers:
        headers[option.header.key] = option.header.raw_value.decode()
