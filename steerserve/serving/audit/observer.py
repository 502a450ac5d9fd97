"""From exchanges to records: what is said about each, and when it must be on disk."""

from __future__ import annotations

import hmac
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steerserve.config import AuditConfig
from steerserve.errors import FieldError, ServiceError
from steerserve.serving.audit.chain import canonical
from steerserve.serving.audit.files import now
from steerserve.serving.audit.keys import AuditKey
from steerserve.serving.audit.writer import AuditWriter, Lag
from steerserve.serving.service import Exchange
from steerserve.serving.telemetry import code_of
from steerserve.types import (
    InterventionReceipt,
    MonitorReceipt,
    Prompt,
    Receipt,
    StepOutput,
    Verdict,
    overall_verdict,
)

_log = logging.getLogger(__name__)

MAX_POSITIONS = 16
"""Of one verdict, in the record; their number is always told."""


@dataclass(eq=False)
class _Response:
    """One of an exchange's responses, as its client has got it so far."""

    hash: hmac.HMAC
    text: list[str] | None
    num_tokens: int = 0
    last: StepOutput | None = None

    def add(self, output: StepOutput) -> None:
        self.hash.update(output.text.encode(errors="surrogatepass"))
        if self.text is not None:
            self.text.append(output.text)
        self.num_tokens += len(output.token_ids)
        self.last = output

    def body(self, index: int) -> dict[str, Any]:
        last = self.last
        finish = None if last is None or last.finish_reason is None else str(last.finish_reason)
        body: dict[str, Any] = {"index": index, "finish_reason": finish, "tokens": self.num_tokens}
        body["text_hmac"] = self.hash.hexdigest()
        if self.text is not None:
            body["text"] = "".join(self.text)
        if last is not None and finish is not None:
            body["verdict"] = str(overall_verdict(last.verdicts))
            body["verdicts"] = [_verdict_body(verdict) for verdict in last.verdicts]
            body["receipt"] = None if last.receipt is None else _receipt_body(last.receipt)
        return body


@dataclass(eq=False)
class _Passage:
    responses: dict[int, _Response] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_ended: int = 0
    is_recorded: bool = False


class AuditObserver:
    """Has one record written for every exchange, before the last output, or the error, reaches the client.

    Args:
        model: fingerprint of the weights.
        on_health: see ``AuditWriter``.

    Raises:
        AssetError: a key or the log is not what it should be.
    """

    def __init__(self, config: AuditConfig, model: str, on_health: Callable[[bool], None]) -> None:
        assert config.key is not None, "the configuration was checked"
        self._key = AuditKey.load(Path(config.key))
        self._writer = AuditWriter(config, self._key, {"model": model, "version": version("steerserve")}, on_health)
        self._model = model
        self._log_text = config.log_text
        # By identity: an exchange that is refused because its id is in use has the same id as the one in flight.
        self._open: dict[int, _Passage] = {}

    async def admitted(self, exchange: Exchange) -> None:
        """Refuse what could not be recorded, before anything is computed for it."""
        self._open[exchange.number] = _Passage()
        self._writer.check()

    async def produced(self, exchange: Exchange, output: StepOutput) -> None:
        """Note the output; behind the last one of all, wait for the record."""
        passage = self._open[exchange.number]
        if output.index not in passage.responses:
            passage.responses[output.index] = _Response(self._key.text_hash(), [] if self._log_text else None)
        passage.responses[output.index].add(output)
        passage.num_prompt_tokens = max(passage.num_prompt_tokens, output.num_prompt_tokens)
        passage.num_ended += output.finish_reason is not None
        if passage.num_ended == exchange.request.sampling.n:
            passage.is_recorded = True
            await self._writer.write(self._body(exchange, passage, None))

    async def ended(self, exchange: Exchange, error: BaseException | None) -> None:
        """Record what was refused, failed, or left by its client."""
        passage = self._open.pop(exchange.number, None) or _Passage()
        if passage.is_recorded:
            return
        code = "CANCELLED" if error is None else code_of(error)
        body = {"code": code, "field": error.field if isinstance(error, FieldError) else None}
        try:
            await self._writer.write(self._body(exchange, passage, body))
        except ServiceError:
            _log.error("an exchange that ended with %s has no record in the audit log", code)

    def lag(self) -> Lag:
        """How far the log is behind; from any thread."""
        return self._writer.lag()

    async def close(self) -> None:
        """Have everything written, and the last head exported."""
        await self._writer.close()

    def _body(self, exchange: Exchange, passage: _Passage, error: dict[str, Any] | None) -> dict[str, Any]:
        request, caller = exchange.request, exchange.caller
        prompt = _prompt_bytes(request.prompt)
        prompt_hash = self._key.text_hash()
        prompt_hash.update(prompt)
        receipts = [each.last.receipt for each in passage.responses.values() if each.last and each.last.receipt]
        body: dict[str, Any] = {
            "kind": "exchange",
            "time": now(),
            "started": datetime.fromtimestamp(exchange.started_ns / 1e9, UTC)
            .isoformat(timespec="microseconds")
            .replace("+00:00", "Z"),
            "request_id": request.request_id,
            "tenant": caller.tenant,
            "key_id": caller.key_id,
            "interface": str(exchange.interface),
            "reading": exchange.is_reading,
            "model": self._model,
            "policies": list(receipts[0].policies if receipts else request.policies),
            "plan": receipts[0].plan_hash if receipts else None,
            "prompt_tokens": passage.num_prompt_tokens,
            "prompt_hmac": prompt_hash.hexdigest(),
            "responses": [each.body(index) for index, each in sorted(passage.responses.items())],
            "error": error,
        }
        if self._log_text:
            body["prompt"] = prompt.decode(errors="surrogatepass")
        return body


def _prompt_bytes(prompt: Prompt) -> bytes:
    """What is hashed of a prompt: its text as UTF-8, its token ids or its chat turns as canonical JSON."""
    if isinstance(prompt, str):
        return prompt.encode(errors="surrogatepass")
    return canonical([each if isinstance(each, int) else [each.role, each.content] for each in prompt])


def _receipt_body(receipt: Receipt) -> dict[str, Any]:
    return {
        "steered": receipt.steered,
        "packs": receipt.packs,
        "rewinds": receipt.num_rewinds,
        "rewound_tokens": receipt.num_rewound_tokens,
        "redacted_tokens": receipt.num_redacted_tokens,
        "cached_tokens": receipt.num_cached_tokens,
        "interventions": [_intervention_body(entry) for entry in receipt.interventions],
        "monitors": [_monitor_body(entry) for entry in receipt.monitors],
    }


def _monitor_body(entry: MonitorReceipt) -> dict[str, Any]:
    return {
        "source": entry.source,
        "label": entry.label,
        "site": str(entry.site),
        "in_scope": entry.tokens_in_scope,
        "covered": entry.tokens_covered,
        "max_score": entry.max_score if math.isfinite(entry.max_score) else None,
        "mean_score": entry.mean_score,
    }


def _intervention_body(entry: InterventionReceipt) -> dict[str, Any]:
    return {
        "source": entry.source,
        "label": entry.label,
        "site": str(entry.site),
        "in_scope": entry.tokens_in_scope,
        "covered": entry.tokens_covered,
        "edited": entry.tokens_edited,
    }


def _verdict_body(verdict: Verdict) -> dict[str, Any]:
    finite = [score for score in verdict.scores if math.isfinite(score)]
    return {
        "kind": str(verdict.kind),
        "source": verdict.source,
        "rule": verdict.rule,
        "threshold": verdict.threshold if verdict.threshold is None or math.isfinite(verdict.threshold) else None,
        "num_positions": len(verdict.positions),
        "positions": list(verdict.positions[:MAX_POSITIONS]),
        "max_score": max(finite, default=None),
        "num_unread": len(verdict.scores) - len(finite),
    }
