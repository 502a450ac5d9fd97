"""OpenTelemetry: a span for each exchange, with the ``gen_ai`` attributes, in the trace of the caller.

Where spans go, by OTLP over HTTP, is said by the standard environment variables (``OTEL_EXPORTER_OTLP_ENDPOINT``,
``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER`` and so on). A span is made when its exchange has ended: nothing is done
for a token. Prompts and responses are not in it. Needs the extra ``sidecar``; nobody imports this while tracing is off.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

import grpc.aio
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Receive, Scope, Send

from steerserve.serving.telemetry import Passage, code_of, policy_verdicts

_CALLERS_FAULT = {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNAUTHENTICATED", "PERMISSION_DENIED", "CANCELLED"}
_NANOSECONDS = 1_000_000_000
_propagator = TraceContextTextMapPropagator()
_parent: ContextVar[Context | None] = ContextVar("parent", default=None)


class Tracing:
    """Makes the spans; ``on_end`` is for ``Telemetry``.

    Args:
        model_name: what is served.
        processor: takes the spans; left out: to the OTLP exporter, in batches.
    """

    def __init__(self, model_name: str, processor: SpanProcessor | None = None) -> None:
        self._model_name = model_name
        resource = Resource.create({"service.version": version("steerserve")})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "steerserve"}))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor or _to_otlp())
        self._tracer = self._provider.get_tracer("steerserve", version("steerserve"))

    def on_end(self, passage: Passage, error: BaseException | None) -> None:
        """Record the exchange."""
        exchange = passage.exchange
        operation = _operation(passage)
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=_parent.get(),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "steerserve",
                "gen_ai.request.model": self._model_name,
                "gen_ai.response.model": self._model_name,
                **_request_attributes(passage),
                **_response_attributes(passage),
            },
            start_time=exchange.started_ns,
        )
        if passage.first_token_s is not None:
            at = exchange.started_ns + int(passage.first_token_s * _NANOSECONDS)
            span.add_event("first token", timestamp=at)
        code = code_of(error)
        if error is not None:
            span.set_attribute("error.type", code)
            if code not in _CALLERS_FAULT:
                span.set_status(Status(StatusCode.ERROR, code))
        span.end(exchange.started_ns + int(passage.seconds * _NANOSECONDS))

    def stop(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class TraceContextInterceptor(grpc.aio.ServerInterceptor):
    """Takes the caller's trace from a call's metadata."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        metadata = handler_call_details.invocation_metadata or ()
        _remember({key: value for key, value in metadata if isinstance(value, str)})
        return await continuation(handler_call_details)


def with_trace_context(app: ASGIApp) -> ASGIApp:
    """The same application, with the caller's trace taken from a request's headers."""

    async def traced(scope: Scope, receive: Receive, send: Send) -> None:
        _remember({key.decode("latin-1"): value.decode("latin-1") for key, value in scope.get("headers", ())})
        await app(scope, receive, send)

    return traced


def _to_otlp() -> SpanProcessor:
    # JSON over HTTP: the exporters in protobuf install the same files as xds-protos, in another version.
    from opentelemetry.exporter.otlp.json.http.trace_exporter import OTLPSpanExporter

    return BatchSpanProcessor(OTLPSpanExporter())


def _remember(carrier: dict[str, str]) -> None:
    _parent.set(_propagator.extract(carrier, Context()))


def _operation(passage: Passage) -> str:
    prompt = passage.exchange.request.prompt
    is_chat = isinstance(prompt, tuple) and bool(prompt) and not isinstance(prompt[0], int)
    return "chat" if is_chat else "text_completion"


def _request_attributes(passage: Passage) -> dict[str, AttributeValue]:
    exchange = passage.exchange
    request, sampling = exchange.request, exchange.request.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.choice.count": sampling.n,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "steerserve.interface": str(exchange.interface),
        "steerserve.tenant": exchange.caller.tenant,
        "steerserve.policies": request.policies,
        "steerserve.num_interventions": len(request.steering.interventions),
        "steerserve.num_guards": len(request.steering.guards),
    }
    return attributes if sampling.seed is None else attributes | {"gen_ai.request.seed": sampling.seed}


def _response_attributes(passage: Passage) -> dict[str, AttributeValue]:
    receipts = passage.receipts
    return {
        "gen_ai.response.id": passage.exchange.request.request_id,
        "gen_ai.response.finish_reasons": [str(output.finish_reason) for output in passage.last_outputs],
        "gen_ai.usage.input_tokens": passage.num_prompt_tokens,
        "gen_ai.usage.output_tokens": passage.num_generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": sum(receipt.num_cached_tokens for receipt in receipts),
        "steerserve.verdicts": [
            f"{policy}: {verdict}" for output in passage.last_outputs for policy, verdict in policy_verdicts(output)
        ],
        "steerserve.num_rewinds": sum(receipt.num_rewinds for receipt in receipts),
        "steerserve.num_redacted_tokens": sum(receipt.num_redacted_tokens for receipt in receipts),
        "steerserve.plan_hashes": [receipt.plan_hash for receipt in receipts],
    }
