"""What came of each exchange, gathered once for the metrics, the log and the traces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from steerserve.errors import CapacityError, IncompatibleError, InvalidRequestError, ServiceError
from steerserve.serving.service import Exchange
from steerserve.types import InterventionReceipt, Receipt, StepOutput, Verdict, VerdictKind, overall_verdict


@dataclass(eq=False)
class Passage:
    """One exchange, and what it has produced so far.

    Attributes:
        is_admitted: it was the engine's; otherwise it was refused.
        num_generated_tokens: of all its responses.
        first_token_s: from its arrival to its first token; None before that.
        token_times: when each response last had tokens, by index; monotonic seconds.
        last_outputs: those that ended a response, with the receipts.
    """

    exchange: Exchange
    is_admitted: bool = False
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    first_token_s: float | None = None
    token_times: dict[int, float] = field(default_factory=dict)
    last_outputs: list[StepOutput] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Since its arrival."""
        return time.monotonic() - self.exchange.started

    @property
    def receipts(self) -> list[Receipt]:
        """Of the responses that have ended."""
        return [output.receipt for output in self.last_outputs if output.receipt is not None]


OnTokens = Callable[[int, float, bool], None]
"""Called with how many tokens a response got, the seconds since its last ones (since the arrival, before the first),
and whether they are its first."""

OnEnd = Callable[[Passage, BaseException | None], None]
"""Called at the end of every exchange, refused ones included, with what ended it early."""


class Telemetry:
    """The ``Observer`` behind the metrics, the log and the traces."""

    def __init__(self, on_tokens: Sequence[OnTokens], on_end: Sequence[OnEnd]) -> None:
        self._on_tokens = tuple(on_tokens)
        self._on_end = tuple(on_end)
        # By identity: an exchange that is refused because its id is in use has the same id as the one in flight.
        self._open: dict[int, Passage] = {}

    async def admitted(self, exchange: Exchange) -> None:
        self._open[exchange.number] = Passage(exchange, is_admitted=True)

    async def produced(self, exchange: Exchange, output: StepOutput) -> None:
        passage = self._open[exchange.number]
        if output.token_ids:
            self._time_tokens(passage, output)
        passage.num_prompt_tokens = max(passage.num_prompt_tokens, output.num_prompt_tokens)
        if output.finish_reason is not None:
            passage.last_outputs.append(output)

    async def ended(self, exchange: Exchange, error: BaseException | None) -> None:
        passage = self._open.pop(exchange.number, None) or Passage(exchange)
        for tell in self._on_end:
            tell(passage, error)

    def _time_tokens(self, passage: Passage, output: StepOutput) -> None:
        now = time.monotonic()
        is_first = output.index not in passage.token_times
        seconds = now - passage.token_times.get(output.index, passage.exchange.started)
        passage.token_times[output.index] = now
        passage.num_generated_tokens += len(output.token_ids)
        if passage.first_token_s is None:
            passage.first_token_s = seconds
        for tell in self._on_tokens:
            tell(len(output.token_ids), seconds, is_first)


def code_of(error: BaseException | None) -> str:
    """The canonical status name of what ended an exchange."""
    match error:
        case None:
            return "OK"
        case InvalidRequestError():
            return "INVALID_ARGUMENT"
        case IncompatibleError():
            return "FAILED_PRECONDITION"
        case CapacityError():
            return "RESOURCE_EXHAUSTED"
        case ServiceError():
            return error.code
        case asyncio.CancelledError() | GeneratorExit():
            return "CANCELLED"
        case _:
            return "INTERNAL"


def policy_name(source: str) -> str | None:
    """The policy that an edit or a guard belongs to; None for the request's own."""
    kind, _, tag = source.partition(":")
    return tag.partition("@")[0] if kind == "policy" else None


def policy_edits(receipt: Receipt) -> Iterator[tuple[str, InterventionReceipt]]:
    """What policies did, each edit with its policy's name."""
    for intervention in receipt.interventions:
        policy = policy_name(intervention.source)
        if policy is not None:
            yield policy, intervention


def policy_verdicts(output: StepOutput) -> Iterator[tuple[str, VerdictKind]]:
    """What each policy decided about a response that has ended: the gravest of what it did."""
    by_policy: dict[str, list[Verdict]] = {}
    for verdict in output.verdicts:
        policy = policy_name(verdict.source)
        if policy is not None:
            by_policy.setdefault(policy, []).append(verdict)
    return ((policy, overall_verdict(verdicts)) for policy, verdicts in by_policy.items())
