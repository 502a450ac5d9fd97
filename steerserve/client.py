"""A client of one server, in plain types: no protobuf, no gRPC exception reaches the caller.

with SteerserveClient("127.0.0.1:50051") as client:
    reply = client.generate("I told him to", policies=["profanity"], max_tokens=40, seed=7)
    print(reply.text, reply.receipt)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.serving.convert import request_to_proto
from steerserve.serving.convert_response import outputs_from_proto, piece_from_proto
from steerserve.serving.convert_score import scores_from_proto
from steerserve.serving.listening import is_loopback
from steerserve.serving.status import error_of
from steerserve.serving.steer_string import parse_guard, parse_intervention
from steerserve.types import (
    ConceptScore,
    FinishReason,
    GenerateRequest,
    Guard,
    GuardEvent,
    Intervention,
    Message,
    PositionScores,
    Receipt,
    SamplingParams,
    SteeringSpec,
    StepOutput,
    StopReason,
    TokenLogprobs,
    Verdict,
)
from steerserve.v1 import generation_pb2, generation_pb2_grpc, score_pb2

DEFAULT_TARGET = "127.0.0.1:50051"
API_KEY_VARIABLE = "STEERSERVE_API_KEY"
TLS_CA_VARIABLE = "STEERSERVE_TLS_CA"
MAX_RECEIVED_BYTES = 64 << 20
"""Scores of every intervention at every position take more than gRPC's 4 MiB."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``generate_stream``; all may be left out.

    Attributes:
        steer: interventions, each an ``Intervention`` or a string such as ``profanity=block``
            (see ``steerserve.serving.steer_string``).
        guards: each a ``Guard`` or a string such as ``profanity>2.5=block``.
        policies: server-side policies, as ``name`` or ``name@version``.
        max_tokens and what follows it up to ``logprobs``: see ``SamplingParams``, whose defaults apply.
        stop: may be a single string.
        return_activations: report every intervention's score at every position.
        request_id: names the request; the server makes one up if it is left out.
        priority, cache_salt: see ``GenerateRequest``.
        timeout: seconds until the call is ended with DEADLINE_EXCEEDED; no limit if left out.
    """

    steer: Sequence[str | Intervention]
    guards: Sequence[str | Guard]
    policies: Sequence[str]
    max_tokens: int
    n: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    ignore_eos: bool
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    logprobs: int | None
    return_activations: bool
    request_id: str
    priority: int
    cache_salt: str
    timeout: float | None


@dataclass(frozen=True)
class Completion:
    """A finished response; the attributes are those of ``StepOutput``."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    scores: tuple[PositionScores, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: StopReason | None
    num_prompt_tokens: int
    receipt: Receipt
    guard_events: tuple[GuardEvent, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Reply(Completion):
    """What ``generate`` returns: all of the ``n`` responses, and the attributes of the first."""

    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class TLS:
    """Files, in PEM, of a connection that is encrypted.

    Attributes:
        ca: authorities of the server's certificate; None: those of the system.
        certificate, private_key: the client's own, where the server asks for one.
    """

    ca: str | None = None
    certificate: str | None = None
    private_key: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them.

        Raises:
            AssetError: a file cannot be read.
        """
        ca, key, certificate = (_read(path) for path in (self.ca, self.private_key, self.certificate))
        return grpc.ssl_channel_credentials(ca, key, certificate)


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the ``authorization`` header to every call."""

    def __init__(self, key: str) -> None:
        self._header = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), self._header])


class SteerserveClient:
    """One channel to a server; safe to share between threads. Close it, or use it in a ``with`` statement.

    Every method raises ``InvalidRequestError``, ``IncompatibleError``, ``CapacityError`` as the server
    did, and ``ServiceError`` for every other way to fail: out of reach, out of time, draining.

    Args:
        target: ``host:port``.
        api_key: shown with every call; None: that in the environment variable STEERSERVE_API_KEY, if there is one.
        tls: the server speaks TLS; None: if STEERSERVE_TLS_CA names a file of authorities.

    Raises:
        InvalidRequestError: a key for a server elsewhere, without TLS.
    """

    def __init__(self, target: str = DEFAULT_TARGET, api_key: str | None = None, tls: TLS | None = None) -> None:
        authority = os.environ.get(TLS_CA_VARIABLE)
        if tls is None and authority:
            tls = TLS(authority)
        key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
        if key and tls is None and not is_loopback(target.rpartition(":")[0].strip("[]")):
            expected = f"TLS: {target} is not on this machine, and the key would be sent in the clear"
            raise InvalidRequestError("api_key", "a key without TLS", expected)
        options = [("grpc.max_receive_message_length", MAX_RECEIVED_BYTES)]
        if tls is None:
            channel = grpc.insecure_channel(target, options)
        else:
            channel = grpc.secure_channel(target, tls.credentials(), options)
        self._channel = channel
        if key:
            channel = grpc.intercept_channel(channel, _WithKey(key))
        self._stub = generation_pb2_grpc.GenerationServiceStub(channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        self._channel.close()

    def is_serving(self, service: str = "readiness", timeout: float = 5.0) -> bool:
        """Whether the server says so of ``service``: ``readiness`` (it takes requests) or ``liveness``.

        False as well where it cannot be reached.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its methods are made when it is
            answer = stub.Check(request, timeout=timeout)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def generate(self, prompt: str | Sequence[int] | Sequence[Message], **options: Unpack[GenerateOptions]) -> Reply:
        """Generate, and return when every response is complete."""
        message = request_to_proto(_request(prompt, options), generation_pb2.GenerateRequest)
        with _typed_errors():
            outputs = outputs_from_proto(self._stub.Generate(message, timeout=options.get("timeout")))
        completions = tuple(_completion(output) for output in outputs)
        return Reply(**vars(completions[0]), completions=completions)

    def generate_stream(
        self, prompt: str | Sequence[int] | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> Iterator[StepOutput]:
        """Generate, and yield each piece as it comes; the last one of each response says how it ended.

        Only that one has ``finish_reason``, ``receipt``, ``guard_events`` and ``verdicts``. With ``n`` > 1 the pieces
        of the responses alternate; ``index`` tells them apart.

        The call starts with the first ``next``. Closing the iterator cancels it and frees the server's slot.
        """
        message = request_to_proto(_request(prompt, options), generation_pb2.GenerateStreamRequest)
        return self._pieces(message, options.get("timeout"))

    def score(
        self, text: str, concepts: Sequence[str] = (), return_tokens: bool = False, timeout: float | None = None
    ) -> dict[str, ConceptScore]:
        """How much a text shows each of ``concepts``, or of all that are loaded, by name.

        Args:
            return_tokens: with the score at every token, not the largest alone.
        """
        message = score_pb2.ScoreRequest(text=text, concepts=concepts, return_tokens=return_tokens)
        with _typed_errors():
            return scores_from_proto(self._stub.Score(message, timeout=timeout))

    def get_model_info(self) -> generation_pb2.GetModelInfoResponse:
        """The model and what requests can name: sites, SAEs, concepts, policies."""
        with _typed_errors():
            return self._stub.GetModelInfo(generation_pb2.GetModelInfoRequest())

    def get_server_info(self) -> generation_pb2.GetServerInfoResponse:
        """Version, uptime, requests running and waiting."""
        with _typed_errors():
            return self._stub.GetServerInfo(generation_pb2.GetServerInfoRequest())

    def _pieces(self, message: generation_pb2.GenerateStreamRequest, timeout: float | None) -> Iterator[StepOutput]:
        call = self._stub.GenerateStream(message, timeout=timeout)
        try:
            with _typed_errors():
                for piece in call:
                    yield piece_from_proto(piece)
        finally:
            call.cancel()


def _request(prompt: str | Sequence[int] | Sequence[Message], options: GenerateOptions) -> GenerateRequest:
    for name in options.keys() - GenerateOptions.__annotations__.keys():
        # A TypedDict is not checked at run time, and a mistyped `policies` must not drop a guard.
        raise InvalidRequestError(name, options.get(name), f"one of {', '.join(GenerateOptions.__annotations__)}")
    interventions = tuple(
        parse_intervention(item, f"steer[{i}]") if isinstance(item, str) else item
        for i, item in enumerate(options.get("steer", ()))
    )
    guards = tuple(
        parse_guard(item, f"guards[{i}]") if isinstance(item, str) else item
        for i, item in enumerate(options.get("guards", ()))
    )
    return GenerateRequest(
        request_id=options.get("request_id", ""),
        prompt=prompt if isinstance(prompt, str) else cast("tuple[int, ...] | tuple[Message, ...]", tuple(prompt)),
        sampling=_sampling(options),
        steering=SteeringSpec(interventions, guards),
        policies=tuple(options.get("policies", ())),
        return_activations=options.get("return_activations", False),
        priority=options.get("priority", 0),
        cache_salt=options.get("cache_salt", ""),
    )


def _sampling(options: GenerateOptions) -> SamplingParams:
    names = {field.name for field in fields(SamplingParams)}
    given: dict[str, Any] = {name: value for name, value in options.items() if name in names}
    stop = options.get("stop", ())
    given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    given["stop_token_ids"] = tuple(options.get("stop_token_ids", ()))
    return SamplingParams(**given)


def _completion(output: StepOutput) -> Completion:
    assert output.finish_reason is not None, "a response is finished"
    assert output.receipt is not None, "a finished response has a receipt"
    return Completion(**{field.name: getattr(output, field.name) for field in fields(Completion)})


def _read(path: str | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(cast("grpc.Call", error)) from error
