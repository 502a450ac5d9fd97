"""Prometheus metrics: vLLM's names behind ``steerserve_``, and those of what only a guard has.

The prefix ends in an underscore, not in vLLM's colon: Prometheus keeps colons for recording rules. A dashboard for
vLLM becomes one for steerserve by replacing ``vllm:``. One server serves one model, so that ``model_name`` is a label
of ``steerserve_model_info`` alone.

What labels can say is bounded: a caller can neither invent one nor make their number grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from steerserve.engine.engine import Engine
from steerserve.errors import AssetError
from steerserve.serving.audit.observer import AuditObserver
from steerserve.serving.telemetry import Passage, code_of, policy_edits, policy_verdicts

MAX_LABEL_VALUES = 100
"""Tenants, policies and edits that have series of their own; the others share one."""

OTHERS = "others"
_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_DURATIONS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_SCORES = (-10, -1, 0, 0.5, 1, 2, 3, 5, 7, 10, 15, 25, 50, 100, 250, 1000)


class Metrics:
    """Counts what passes through the server, in a registry of its own.

    ``on_tokens`` and ``on_end`` are for ``Telemetry``, in the event loop; any thread may read the registry.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_EngineState(engine))
        self._tenant, self._policy, self._edit = _Bounded(), _Bounded(), _Bounded()
        self._define_vllm()
        self._define_own()

    def watch(self, audit: AuditObserver) -> None:
        """Tell of the audit log too."""
        self.registry.register(_AuditState(audit))

    def on_tokens(self, num_tokens: int, seconds: float, is_first: bool) -> None:
        """A response got tokens; those that come together share the time."""
        if is_first:
            self._first_token.observe(seconds)
            return
        for _ in range(num_tokens):
            self._between_tokens.observe(seconds / num_tokens)

    def on_end(self, passage: Passage, error: BaseException | None) -> None:
        """An exchange ended, or was refused."""
        exchange, code = passage.exchange, code_of(error)
        tenant = self._tenant(exchange.caller.tenant)
        self._requests.labels(exchange.interface, "reading" if exchange.is_reading else "generation", code).inc()
        self._tenant_requests.labels(tenant, code).inc()
        if not passage.is_admitted:
            return
        if exchange.is_reading:
            self._reading_duration.observe(passage.seconds)
            self._read_tokens.inc(passage.num_prompt_tokens)
            self._tenant_tokens.labels(tenant, "reading").inc(passage.num_prompt_tokens)
        else:
            self._count_generation(passage, tenant)
        self._count_decisions(passage)

    def _count_generation(self, passage: Passage, tenant: str) -> None:
        exchange = passage.exchange
        self._duration.observe(passage.seconds)
        self._params_n.observe(exchange.request.sampling.n)
        self._params_max_tokens.observe(exchange.request.sampling.max_tokens)
        self._prompt_length.observe(passage.num_prompt_tokens)
        self._response_length.observe(passage.num_generated_tokens)
        self._prompt_tokens.inc(passage.num_prompt_tokens)
        self._generated_tokens.inc(passage.num_generated_tokens)
        self._tenant_tokens.labels(tenant, "prompt").inc(passage.num_prompt_tokens)
        self._tenant_tokens.labels(tenant, "generation").inc(passage.num_generated_tokens)
        for output in passage.last_outputs:
            self._success.labels(output.finish_reason).inc()

    def _count_decisions(self, passage: Passage) -> None:
        for output in passage.last_outputs:
            for policy, verdict in policy_verdicts(output):
                self._verdicts.labels(self._policy(policy), verdict).inc()
        for receipt in passage.receipts:
            self._cache_queries.inc(passage.num_prompt_tokens)
            self._cache_hits.inc(receipt.num_cached_tokens)
            self._rewinds.inc(receipt.num_rewinds)
            self._rewound.inc(receipt.num_rewound_tokens)
            self._redacted.inc(receipt.num_redacted_tokens)
            for monitor in receipt.monitors:
                if monitor.tokens_covered and math.isfinite(monitor.max_score):
                    self._monitor_scores.labels(monitor.label).observe(monitor.max_score)
            for policy, edit in policy_edits(receipt):
                self._edited.labels(self._policy(policy)).inc(edit.tokens_edited)
                if math.isfinite(edit.max_activation):  # it is not where nothing was in scope
                    self._scores.labels(self._policy(policy), self._edit(edit.label)).observe(edit.max_activation)

    def _define_vllm(self) -> None:
        self._success = self._counter("request_success", "Responses that ended, by why.", "finished_reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated_tokens = self._counter("generation_tokens", "Tokens that were generated and released.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to a response's first tokens.", _LATENCIES
        )
        self._between_tokens = self._histogram(
            "inter_token_latency_seconds", "From one token of a response to its next.", _LATENCIES
        )
        self._duration = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _DURATIONS
        )
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _LENGTHS)
        self._response_length = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", _LENGTHS
        )
        self._params_n = self._histogram("request_params_n", "Responses that a request asked for.", _LENGTHS[:7])
        self._params_max_tokens = self._histogram("request_params_max_tokens", "Most tokens it asked for.", _LENGTHS)

    def _define_own(self) -> None:
        self._requests = self._counter(
            "requests",
            "Requests that ended, refused ones included; readings are of texts by Score, moderation or Envoy.",
            "interface",
            "kind",
            "code",
        )
        self._reading_duration = self._histogram(
            "reading_seconds", "From the arrival of a text that is only read to its end.", _LATENCIES
        )
        self._read_tokens = self._counter("read_tokens", "Tokens of texts that were only read.")
        self._tenant_requests = self._counter(
            "tenant_requests", "Requests and readings of each tenant.", "tenant", "code"
        )
        self._tenant_tokens = self._counter("tenant_tokens", "Tokens of each tenant.", "tenant", "kind")
        self._verdicts = self._counter(
            "verdicts", "What policies decided about responses: the gravest of each.", "policy", "verdict"
        )
        self._edited = self._counter(
            "edited_tokens", "Positions at which a policy's edits asked for a change.", "policy"
        )
        self._rewinds = self._counter("rewinds", "Times that guards took tokens back.")
        self._rewound = self._counter("rewound_tokens", "Tokens that guards took back.")
        self._redacted = self._counter("redacted_tokens", "Tokens that were not shown.")
        self._scores = self._histogram(
            "concept_score",
            "Largest score in a response that a policy's edit or guard read.",
            _SCORES,
            "policy",
            "edit",
        )
        self._monitor_scores = self._histogram(
            "monitor_score", "Largest score in a response that an entry of the monitor plan read.", _SCORES, "entry"
        )

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"steerserve_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"steerserve_{name}", documentation, labels, buckets=buckets, registry=self.registry)


class MetricsServer:
    """Answers scrapes at ``/metrics``, in threads of its own: the event loop does not wait for them.

    Attributes:
        address: ``host:port`` as bound.

    Raises:
        AssetError: the address cannot be bound.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            raise AssetError(
                f"cannot listen on {host}:{port} ({error.strerror}); is another server using it?"
            ) from error
        self.address = f"{host}:{self._server.server_port}"

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _EngineState(Collector):
    """What the engine says of itself when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield GaugeMetricFamily(
            "steerserve_num_requests_running", "Responses that are being generated.", engine.num_running
        )
        yield GaugeMetricFamily("steerserve_num_requests_waiting", "Responses in the queue.", engine.num_waiting)
        yield GaugeMetricFamily(
            "steerserve_kv_cache_usage_perc", "KV cache that requests hold; 1 is all of it.", engine.kv_cache_usage
        )
        yield CounterMetricFamily(
            "steerserve_num_preemptions", "Responses that lost their place to others.", engine.num_preemptions
        )
        model = GaugeMetricFamily(
            "steerserve_model_info", "What is served.", labels=["model_name", "fingerprint", "version"]
        )
        model.add_metric([engine.model.name, engine.model.fingerprint[:12], version("steerserve")], 1)
        yield model
        policies = GaugeMetricFamily("steerserve_policy_info", "Policies in force.", labels=["policy", "version"])
        for policy in engine.catalog.policies.values():
            policies.add_metric([policy.name, policy.version], 1)
        yield policies

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry that knows no names does not ask the engine when it is made."""
        return iter(())


class _AuditState(Collector):
    """How far the audit log is behind what happens."""

    def __init__(self, audit: AuditObserver) -> None:
        self._audit = audit

    def collect(self) -> Iterator[Metric]:
        lag = self._audit.lag()
        yield GaugeMetricFamily(
            "steerserve_audit_records_waiting", "Records that are not in the audit log yet.", lag.num_waiting
        )
        yield GaugeMetricFamily(
            "steerserve_audit_lag_seconds", "For how long the oldest of them has waited.", lag.seconds
        )
        yield GaugeMetricFamily(
            "steerserve_audit_records_unproved", "Records behind the last exported head.", lag.num_unproved
        )
        yield GaugeMetricFamily("steerserve_audit_failing", "1 while the audit log cannot be written.", lag.is_failing)

    def describe(self) -> Iterator[Metric]:
        """Nothing, as above."""
        return iter(())


class _Bounded:
    """The first ``MAX_LABEL_VALUES`` values of a label pass; the others become one."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._seen:
            if len(self._seen) == MAX_LABEL_VALUES:
                return OTHERS
            self._seen.add(value)
        return value
