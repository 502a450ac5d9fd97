"""Where texts that the server did not write show a concept: for moderation, and for another model's traffic.

A text is a prompt whose positions guards read, and behind which nothing is generated: the model runs up to the last
layer that they read. It passes through ``Service`` like every request, and what was read before is in the prefix cache:
a text that grows costs what it grew by.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from steerserve.serving.service import Caller, Interface, Service
from steerserve.types import (
    ConceptTarget,
    GenerateRequest,
    Guard,
    GuardAction,
    Phase,
    Receipt,
    SamplingParams,
    SteeringSpec,
)

MAX_DETECTORS = 16
"""Of one request."""


@dataclass(frozen=True)
class Watched:
    """A concept to look for.

    Attributes:
        threshold: scores above it are reported.
        fail_open: a score that is not finite is passed over; otherwise it is an error.
    """

    concept: str
    threshold: float
    fail_open: bool = False


@dataclass(frozen=True)
class Sighting:
    """A token at which a concept's score is above the threshold.

    Attributes:
        watched: which of those that were looked for.
        start, end: the characters of the token.
    """

    watched: int
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Reading:
    """What was seen in a text.

    Attributes:
        receipts: proof that the kernel read every token, of each part that was read by itself.
    """

    sightings: tuple[Sighting, ...]
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True)
class _Window:
    """Tokens of a text, as many as fit into one request.

    Attributes:
        spans: the characters ``[start, end)`` of each; empty for special tokens.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class TextReader:
    """Reads texts with the detectors of the loaded concepts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        engine = service.engine_loop.engine
        self._tokenizer = engine.model.tokenizer
        self._max_tokens = engine.config.max_model_len

    async def read(
        self,
        text: str,
        watched: Sequence[Watched],
        caller: Caller,
        interface: Interface,
        timeout_s: float | None = None,
    ) -> Reading:
        """Every token of ``text`` at which one of ``watched`` is seen, in windows that overlap if it is long.

        Raises:
            SteerserveError: as ``Service.generate``; also a score that is not finite.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        windows = await asyncio.to_thread(lambda: list(_windows(self._tokenizer, text, self._max_tokens)))
        sightings, receipts = [], []
        for window in windows:
            for first in range(0, len(watched), MAX_DETECTORS):
                asked = _request(window, watched[first : first + MAX_DETECTORS], deadline)
                async with self._service.generate(asked, caller, interface) as outputs:
                    *_, last = [output async for output in outputs]
                assert last.receipt is not None, "a last output has a receipt"
                receipts.append(last.receipt)
                for event in last.guard_events:
                    start, end = window.spans[event.position]
                    if event.source == "request" and start < end and math.isfinite(event.score):
                        sightings.append(Sighting(first + event.guard, event.score, start, end))
        return Reading(tuple(sightings), tuple(receipts))


def _request(window: _Window, watched: Sequence[Watched], deadline: float | None) -> GenerateRequest:
    guards = tuple(
        Guard(ConceptTarget(each.concept), each.threshold, GuardAction.FLAG, None, Phase.PROMPT, each.fail_open)
        for each in watched
    )
    return GenerateRequest(
        request_id=f"read-{uuid.uuid4().hex}",
        prompt=window.token_ids,
        sampling=SamplingParams(max_tokens=0),
        steering=SteeringSpec(guards=guards),
        timeout_s=None if deadline is None else max(deadline - time.monotonic(), 0.0),
    )


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> Iterator[_Window]:
    encoded = tokenizer(text, return_offsets_mapping=True)
    token_ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
    num_leading = next((i for i, (start, end) in enumerate(spans) if start < end), len(spans))  # special tokens
    room = size - num_leading
    step = max(1, room - room // 4)
    for first in range(num_leading, max(num_leading + 1, len(token_ids) - room // 4), step):
        chosen = [*range(num_leading), *range(first, min(first + room, len(token_ids)))]
        if len(chosen) > num_leading:
            yield _Window(tuple(token_ids[i] for i in chosen), tuple(spans[i] for i in chosen))
