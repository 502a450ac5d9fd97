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

from steerserve.errors import InvalidRequestError
from steerserve.serving.convert import request_to_proto
from steerserve.serving.convert_response import output_from_proto
from steerserve.serving.status import error_of
from steerserve.serving.steer_string import parse_intervention
from steerserve.types import (
    FinishReason,
    GenerateRequest,
    Intervention,
    Message,
    PositionScores,
    Receipt,
    SamplingParams,
    SteeringSpec,
    StepOutput,
    StopReason,
    TokenLogprobs,
)
from steerserve.v1 import generation_pb2, generation_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50051"


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``generate_stream``; all may be left out.

    Attributes:
        steer: interventions, each an ``Intervention`` or a string such as ``profanity=clamp:-1x``
            (see ``steerserve.serving.steer_string``).
        policies: server-side policies, as ``name`` or ``name@version``.
        max_tokens and what follows it up to ``logprobs``: see ``SamplingParams``, whose defaults apply.
        stop: may be a single string.
        return_activations: report every intervention's score at every position.
        request_id: names the request; the server makes one up if it is left out.
        timeout: seconds until the call is ended with DEADLINE_EXCEEDED; no limit if left out.
    """

    steer: Sequence[str | Intervention]
    policies: Sequence[str]
    max_tokens: int
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
    timeout: float | None


@dataclass(frozen=True)
class Completion:
    """A finished response; the attributes are those of ``StepOutput``."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    scores: tuple[PositionScores, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: StopReason | None
    num_prompt_tokens: int
    receipt: Receipt


class SteerserveClient:
    """One channel to a server; safe to share between threads. Close it, or use it in a ``with`` statement.

    Every method raises ``InvalidRequestError``, ``IncompatibleError``, ``CapacityError`` as the server
    did, and ``ServiceError`` for every other way to fail: out of reach, out of time, draining.

    Args:
        target: ``host:port``.
    """

    def __init__(self, target: str = DEFAULT_TARGET) -> None:
        self._channel = grpc.insecure_channel(target)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        self._channel.close()

    def generate(
        self, prompt: str | Sequence[int] | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Generate, and return when the response is complete."""
        message = request_to_proto(_request(prompt, options), generation_pb2.GenerateRequest)
        with _typed_errors():
            output = output_from_proto(self._stub.Generate(message, timeout=options.get("timeout")))
        assert output.finish_reason is not None, "a response is finished"
        assert output.receipt is not None, "a finished response has a receipt"
        return Completion(
            request_id=output.request_id,
            text=output.text,
            token_ids=output.token_ids,
            scores=output.scores,
            logprobs=output.logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            num_prompt_tokens=output.num_prompt_tokens,
            receipt=output.receipt,
        )

    def generate_stream(
        self, prompt: str | Sequence[int] | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> Iterator[StepOutput]:
        """Generate, and yield each piece as it comes; the last one has ``finish_reason`` and ``receipt``.

        The call starts with the first ``next``. Closing the iterator cancels it and frees the server's slot.
        """
        message = request_to_proto(_request(prompt, options), generation_pb2.GenerateStreamRequest)
        return self._pieces(message, options.get("timeout"))

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
                    yield output_from_proto(piece)
        finally:
            call.cancel()


def _request(prompt: str | Sequence[int] | Sequence[Message], options: GenerateOptions) -> GenerateRequest:
    for name in options.keys() - GenerateOptions.__annotations__.keys():
        # A TypedDict is not checked at run time, and a mistyped `policies` must not drop a guard.
        raise InvalidRequestError(name, options.get(name), f"one of {', '.join(GenerateOptions.__annotations__)}")
    interventions = (
        parse_intervention(item, f"steer[{i}]") if isinstance(item, str) else item
        for i, item in enumerate(options.get("steer", ()))
    )
    return GenerateRequest(
        request_id=options.get("request_id", ""),
        prompt=prompt if isinstance(prompt, str) else cast("tuple[int, ...] | tuple[Message, ...]", tuple(prompt)),
        sampling=_sampling(options),
        steering=SteeringSpec(tuple(interventions)),
        policies=tuple(options.get("policies", ())),
        return_activations=options.get("return_activations", False),
    )


def _sampling(options: GenerateOptions) -> SamplingParams:
    names = {field.name for field in fields(SamplingParams)}
    given: dict[str, Any] = {name: value for name, value in options.items() if name in names}
    stop = options.get("stop", ())
    given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    given["stop_token_ids"] = tuple(options.get("stop_token_ids", ()))
    return SamplingParams(**given)


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(cast("grpc.Call", error)) from error
