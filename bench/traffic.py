"""Requests that arrive as traffic does, and two ways to serve them: continuous batching and static batches."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from workload import greedy_request, random_prompt

from steerserve.engine.engine import Engine


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes (seconds from the start), what it says, how many tokens it wants."""

    time: float
    prompt: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True)
class Load:
    """How a trace was borne; times in seconds.

    Attributes:
        tokens_per_second: wanted tokens over the time from the first arrival to the last token.
        first_token: from arrival to first token, for each request.
        between_tokens: from one token of a request to its next.
    """

    tokens_per_second: float
    first_token: list[float]
    between_tokens: list[float]

    @classmethod
    def of(cls, trace: Sequence[Arrival], token_times: Sequence[Sequence[float]]) -> Load:
        assert [len(times) for times in token_times] == [arrival.num_tokens for arrival in trace]
        num_tokens = sum(arrival.num_tokens for arrival in trace)
        seconds = max(times[-1] for times in token_times) - trace[0].time
        first = [times[0] - arrival.time for arrival, times in zip(trace, token_times, strict=True)]
        between = [b - a for times in token_times for a, b in pairwise(times)]
        return cls(num_tokens / seconds, first, between)


def poisson_trace(num_requests: int, per_second: float, seed: int) -> list[Arrival]:
    """Poisson arrivals with lognormal lengths: prompts of median 48 tokens, responses of median 32, long tails."""
    generator = random.Random(seed)

    def length(median: float, longest: int) -> int:
        return min(max(round(median * generator.lognormvariate(0.0, 0.7)), 4), longest)

    time, trace = 0.0, []
    for _ in range(num_requests):
        time += generator.expovariate(per_second)
        trace.append(Arrival(time, random_prompt(generator, length(48, 256)), length(32, 160)))
    return trace


def serve_continuously(engine: Engine, trace: Sequence[Arrival]) -> Load:
    """Every request joins at the first step after its arrival."""
    token_times: list[list[float]] = [[] for _ in trace]
    to_come = deque(enumerate(trace))
    start = time.perf_counter()
    while to_come or engine.has_unfinished():
        while to_come and to_come[0][1].time <= time.perf_counter() - start:
            number, arrival = to_come.popleft()
            engine.add_request(greedy_request(str(number), arrival.prompt, arrival.num_tokens))
        if engine.has_unfinished():
            for output in engine.step():
                now = time.perf_counter() - start
                token_times[int(output.request_id)] += [now] * len(output.token_ids)
        else:
            _sleep_until(start + to_come[0][1].time)
    return Load.of(trace, token_times)


def serve_in_static_batches(model: PreTrainedModel, trace: Sequence[Arrival], max_batch_size: int) -> Load:
    """Whoever waits when a batch is done forms the next one; it runs to its longest response, and tokens stream."""
    token_times: list[list[float]] = []
    waiting = deque(trace)
    start = time.perf_counter()
    while waiting:
        _sleep_until(start + waiting[0].time)
        batch = []
        while waiting and len(batch) < max_batch_size and waiting[0].time <= time.perf_counter() - start:
            batch.append(waiting.popleft())
        num_tokens = max(arrival.num_tokens for arrival in batch)
        times = generate(model, [arrival.prompt for arrival in batch], num_tokens)
        token_times += [[at - start for at in times[: arrival.num_tokens]] for arrival in batch]
    return Load.of(trace, token_times)


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token of a batch was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int, **options: object
) -> list[float]:
    """Greedy ``generate`` of transformers on left-padded prompts; when each of the ``num_tokens`` tokens was there."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    clock = _Clock()
    with torch.inference_mode():
        model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
    assert len(clock.times) == num_tokens, "a response ended early"
    return clock.times


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """``generate`` goes on behind an end-of-sequence token, as the engine does with ``ignore_eos``."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))
