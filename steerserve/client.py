"""A client of one server, in plain types: no protobuf, no gRPC exception reaches the caller.

with SteerserveClient("127.0.0.1:50051") as client:
    reply = client.generate("I told him to", policies=["profanity"], max_tokens=40, seed=7)
    print(reply.text, reply.receipt)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steerserve.errors import InvalidRequestError
from steerserve.serving.convert import request_to_proto
from steerserve.serving.convert_response import outputs_from_proto, piece_from_proto
from steerserve.serving.convert_score import scores_from_proto
from steerserve.serving.dialling import DEFAULT_TARGET, TLS, channel_to
from steerserve.serving.dialling import api_key as key_of
from steerserve.serving.status import error_of
from steerserve.serving.steer_string import parse_guard, parse_intervention
from steerserve.types import (
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
    TextScores,
    TokenLogprobs,
    Verdict,
)
from steerserve.v1 import generation_pb2, generation_pb2_grpc, policy_pb2, policy_pb2_grpc, score_pb2


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``generate_stream``; all may be left out.

    Attributes:
        steer: interventions, each an ``Intervention`` or a string such as ``profanity=block``
            (see ``steerserve.serving.steer_string``).
        guards: each a ``Guard`` or a string such as ``profanity>1=block``.
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


class SteerserveClient:
    """One channel to a server; safe to share between threads. Close it, or use it in a ``with`` statement.

    Every method raises ``InvalidRequestError``, ``IncompatibleError``, ``CapacityError`` as the server
    did, and ``ServiceError`` for every other way to fail: out of reach, out of time, draining.

    Args:
        target: ``host:port``.
        api_key: shown with every call.
        api_key_file: file that holds the key, so that no list of processes does. Without either, the environment
            variables STEERSERVE_API_KEY and STEERSERVE_API_KEY_FILE say; an empty one counts as none.
        tls: the server speaks TLS; None: if the environment variables STEERSERVE_TLS_CA, STEERSERVE_TLS_CERTIFICATE and
            STEERSERVE_TLS_PRIVATE_KEY name files.

    Raises:
        InvalidRequestError: a key for a server elsewhere, without TLS; a file that is no key.
        AssetError: a file cannot be read.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        api_key: str | None = None,
        tls: TLS | None = None,
        api_key_file: str | None = None,
    ) -> None:
        self._channel, with_key = channel_to(target, key_of(api_key, api_key_file), tls)
        self._stub = generation_pb2_grpc.GenerationServiceStub(with_key)
        self._policies = policy_pb2_grpc.PolicyServiceStub(with_key)

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
        self,
        text: str,
        concepts: Sequence[str] = (),
        policies: Sequence[str] = (),
        return_tokens: bool = False,
        timeout: float | None = None,
    ) -> TextScores:
        """How much a text shows each of ``concepts``, or of all that are loaded.

        Args:
            policies: as ``name`` or ``name@version``; what their rules would do about the text is in ``verdicts``.
            return_tokens: with the score at every token, not the largest alone.
            timeout: seconds until the call is ended with DEADLINE_EXCEEDED.
        """
        message = score_pb2.ScoreRequest(text=text, concepts=concepts, policies=policies, return_tokens=return_tokens)
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

    def list_policies(self) -> Sequence[policy_pb2.PolicyInfo]:
        """The policies in force; needs a key with the role of operators."""
        with _typed_errors():
            return self._policies.ListPolicies(policy_pb2.ListPoliciesRequest()).policies

    def reload_policies(self) -> policy_pb2.ReloadPoliciesResponse:
        """Have the server read its policy and access files again; needs a key with the role of operators.

        Raises:
            PolicyError: what is wrong with the files; the policies in force stay.
        """
        with _typed_errors():
            return self._policies.ReloadPolicies(policy_pb2.ReloadPoliciesRequest())

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


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(cast("grpc.Call", error)) from error
