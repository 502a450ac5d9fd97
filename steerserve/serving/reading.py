"""Where texts that the server did not write show a concept: for moderation, and for another model's traffic.

A text is a prompt whose positions guards read; the one token that must be generated is thrown away. It passes
through ``Service`` like every request, and what was read before is in the prefix cache: a text that grows costs
what it grew by.
"""

from __future__ import annotations

import asyncio
import math
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
    GuardEvent,
    Phase,
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
        self._max_tokens = engine.config.max_model_len - 1  # one is generated

    async def read(self, text: str, watched: Sequence[Watched], caller: Caller, interface: Interface) -> list[Sighting]:
        """Every token of ``text`` at which one of ``watched`` is seen, in windows that overlap if it is long.

        Raises:
            SteerserveError: as ``Service.generate``; also a score that is not finite.
        """
        windows = await asyncio.to_thread(lambda: list(_windows(self._tokenizer, text, self._max_tokens)))
        sightings = []
        for window in windows:
            for first in range(0, len(watched), MAX_DETECTORS):
                events = await self._events(window, watched[first : first + MAX_DETECTORS], caller, interface)
                for event in events:
                    start, end = window.spans[event.position]
                    if start < end and math.isfinite(event.score):
                        sightings.append(Sighting(first + event.guard, event.score, start, end))
        return sightings

    async def _events(
        self, window: _Window, watched: Sequence[Watched], caller: Caller, interface: Interface
    ) -> list[GuardEvent]:
        guards = tuple(
            Guard(ConceptTarget(each.concept), each.threshold, GuardAction.FLAG, None, Phase.PROMPT, each.fail_open)
            for each in watched
        )
        request = GenerateRequest(
            request_id=f"read-{uuid.uuid4().hex}",
            prompt=window.token_ids,
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            steering=SteeringSpec(guards=guards),
        )
        async with self._service.generate(request, caller, interface, is_reading=True) as outputs:
            events = [event for output in [output async for output in outputs] for event in output.guard_events]
        return [event for event in events if event.position < len(window.token_ids) and event.source == "request"]


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
