"""What guarded responses ought to be: a loop that knows no cache, and how to compare an engine with it.

The oracle runs the plain Hugging Face model over all tokens again for every one it draws, with hooks written here,
and edits and scores in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from engine_runs import Outcome, assert_idle, feature, outcome

from steerserve.engine.engine import Engine
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import (
    DirectionTarget,
    FinishReason,
    GenerateRequest,
    Guard,
    GuardAction,
    GuardEvent,
    Op,
    Phase,
    SamplingParams,
    Site,
    SteeringSpec,
    StepOutput,
    StopReason,
    Stream,
)

SITE, BEHIND = Site(1, Stream.RESID_POST), Site(2, Stream.RESID_POST)
PROMPT = tuple(b"The quick brown fox")
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=3)
LETTERS = {token_id: -100.0 for token_id in range(260) if not ord("A") <= token_id + 33 <= ord("z")}
"""Leaves tokens of one character each."""
EDITED = (3, 5, 6)
BASE = (feature(3, Op.ADD, 2.0), feature(5, Op.BLOCK, None, phase=Phase.GENERATED))
STRONGER = (feature(3, Op.CLAMP, 5.0, always=True), feature(6, Op.ADD, 9.0))
"""Takes the place of the first of ``BASE``."""


SAMPLED = SamplingParams(max_tokens=20, seed=4, temperature=0.9, ignore_eos=True, logprobs=2)
PENALISED = replace(
    SAMPLED, seed=8, logit_bias=LETTERS, repetition_penalty=1.3, frequency_penalty=0.8, presence_penalty=-0.5
)


@dataclass
class Expected:
    """What the oracle makes of a request; ``reads`` has the position and the level of each time one was read."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: StopReason | None = None
    logprobs: list[float] = field(default_factory=list)
    events: list[GuardEvent] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    num_rewinds: int = 0
    num_rewound_tokens: int = 0


class Oracle:
    """Serves one request at a time, under ``BASE`` and its rewinds under ``STRONGER``."""

    def __init__(self, model: LoadedModel, sae: SAE) -> None:
        self.model = model
        self.W_enc, self.b_enc, self.threshold, _, self.W_dec = (rows.double().numpy() for rows in sae.rows(EDITED))

    def edit(self, x: np.ndarray, level: np.ndarray, is_prompt: np.ndarray) -> np.ndarray:
        """``BASE``, and ``STRONGER`` so many times where the level is not 0."""
        pre = x @ self.W_enc.T + self.b_enc
        f = np.where(pre > self.threshold, pre, 0.0)
        edits = [np.where(level > 0, 5.0 * level - f[:, 0], 2.0), np.where(is_prompt, 0.0, -f[:, 1]), 9.0 * level]
        return x + np.stack(edits, axis=1) @ self.W_dec

    def read(self, tokens: Sequence[int], level: Sequence[int], num_prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """The last token's logits and, at every position, the activation behind all edits at ``BEHIND``."""
        seen = []

        def edited(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            changed = self.edit(hidden[0].double().numpy(), np.array(level), np.arange(len(tokens)) < num_prompt)
            hidden[0] = torch.from_numpy(changed).to(hidden.dtype)

        def recorded(_module, _args, output):
            seen.append((output[0] if isinstance(output, tuple) else output)[0].double().numpy())

        points = [self.model.adapter.hook_point(self.model.model, site).module for site in (SITE, BEHIND)]
        handles = [point.register_forward_hook(hook) for point, hook in zip(points, (edited, recorded), strict=True)]
        with torch.inference_mode():
            logits = self.model.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits.double().numpy(), seen[0]

    def generate(self, request: GenerateRequest, index: int = 0) -> Expected:
        """Token by token."""
        sampling, guards = request.sampling, request.steering.guards
        uniforms = np.random.Generator(np.random.PCG64((sampling.seed or 0) + index)).random(sampling.max_tokens)
        num_prompt, hold_back = len(request.prompt), max(g.rewind.num_tokens if g.rewind else 1 for g in guards)
        tokens, level = list(request.prompt), [0] * num_prompt
        num_released, num_read, result = num_prompt, 0, Expected()
        while True:
            logits, x = self.read(tokens, level, num_prompt)
            unread, num_read = range(num_read, len(tokens)), len(tokens)
            result.reads += [(position, level[position]) for position in unread]
            result.scores, fired = self._judge(guards, x, unread, num_prompt, result)
            if fired is not None and fired.action is GuardAction.BLOCK:
                result.finish_reason, result.stop_reason = FinishReason.BLOCKED, None
                result.token_ids = tokens[num_prompt:num_released]
                result.text = self.model.tokenizer.decode(result.token_ids).rstrip("\ufffd")
                del result.logprobs[len(result.token_ids) :]
                return result
            if fired is not None and fired.action is GuardAction.REWIND:
                kept = max(num_prompt, num_released, fired.position + 1 - hold_back)
                result.num_rewinds += 1
                result.num_rewound_tokens += len(tokens) - kept
                result.finish_reason = result.stop_reason = None
                tokens, num_read = tokens[:kept], kept - 1
                level = [*level[: kept - 1], result.num_rewinds]
                del result.logprobs[kept - num_prompt :]
                continue
            if result.finish_reason is not None:
                break
            num_released = max(num_released, len(tokens) - hold_back + 1)
            token = draw(logits, tokens, num_prompt, sampling, uniforms[len(tokens) - num_prompt])
            result.logprobs.append(logits[token] - np.logaddexp.reduce(logits))
            tokens, level = [*tokens, token], [*level, result.num_rewinds]
            self._finish(tokens[num_prompt:], sampling, result)
        result.token_ids = tokens[num_prompt:]
        return result

    def _judge(self, guards, x, unread, num_prompt, result) -> tuple[np.ndarray, GuardEvent | None]:
        score = np.stack([x @ (guard.target.vector / np.linalg.norm(guard.target.vector)) for guard in guards], axis=1)
        for position in unread:
            fired: list[GuardEvent] = []
            for index, guard in enumerate(guards):
                is_prompt = position < num_prompt
                if guard.phase not in (Phase.ALL, Phase.PROMPT if is_prompt else Phase.GENERATED):
                    continue
                assert abs(score[position, index] - guard.threshold) > 1e-4, "too close to call"
                if score[position, index] > guard.threshold:
                    action = guard.action
                    if guard.rewind and (is_prompt or result.num_rewinds == guard.rewind.max_retries):
                        action = guard.rewind.otherwise
                    fired.append(GuardEvent(index, action, position, score[position, index]))
            result.events += fired
            decisive = [event for event in fired if event.action is not GuardAction.FLAG]
            assert len(decisive) < 2, "the oracle does not rank decisions"
            if decisive:
                return score, decisive[0]
        return score, None

    def _finish(self, response: list[int], sampling: SamplingParams, result: Expected) -> None:
        result.text = self.model.tokenizer.decode(response, skip_special_tokens=True)
        ends = [(result.text.find(stop) + len(stop), stop) for stop in sampling.stop if stop in result.text]
        if ends:
            end, stop = min(ends)
            result.text = result.text[: end - len(stop)]
            result.finish_reason, result.stop_reason = FinishReason.STOP, stop
        elif len(response) == sampling.max_tokens:
            result.finish_reason = FinishReason.LENGTH


def draw(logits: np.ndarray, tokens: list[int], num_prompt: int, sampling: SamplingParams, uniform: float) -> int:
    """The token whose share of the distribution holds ``uniform``."""
    z = logits.copy()
    for token_id, bias in sampling.logit_bias.items():
        z[token_id] += bias
    for token_id in set(tokens):
        z[token_id] *= sampling.repetition_penalty if z[token_id] < 0 else 1 / sampling.repetition_penalty
        count = tokens[num_prompt:].count(token_id)
        z[token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
    if sampling.temperature == 0:
        return int(z.argmax())
    mass = np.exp((z - z.max()) / sampling.temperature).cumsum()
    return int(np.searchsorted(mass, uniform * mass[-1], side="right"))


def guarded(
    guard: Guard, sampling: SamplingParams = GREEDY, prompt: tuple[int, ...] = PROMPT, name: str = "r", **rest: object
) -> GenerateRequest:
    return GenerateRequest(name, prompt, sampling, SteeringSpec(BASE, (guard,)), **rest)


ASLEEP = Guard(DirectionTarget(BEHIND, np.ones(32, dtype=np.float32)), 1e6, GuardAction.FLAG)


def activations_behind(oracle: Oracle, request: GenerateRequest) -> np.ndarray:
    """``[positions, d]`` at ``BEHIND`` where no guard fires."""
    tokens = [*request.prompt, *oracle.generate(replace(request, steering=SteeringSpec(BASE, (ASLEEP,)))).token_ids]
    return oracle.read(tokens, [0] * len(tokens), len(request.prompt))[1]


def fires_at(x: np.ndarray, position: int, action: GuardAction, share: float = 0.9, **rest: object) -> Guard:
    """A guard for the activation at one position, and for what is like it.

    Args:
        share: of the score there, the threshold.
    """
    vector = (x[position] - x.mean(axis=0)).astype(np.float32)
    score = x @ vector / np.linalg.norm(vector)
    return Guard(DirectionTarget(BEHIND, vector), float(np.float32(share * score[position])), action, **rest)


def fires_at_half(x: np.ndarray, action: GuardAction, **rest: object) -> Guard:
    """A guard that fires at every other position or so, the last one included."""
    vector = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    score = x @ vector / np.linalg.norm(vector)
    if score[-1] < np.median(score):
        vector, score = -vector, -score
    low, high = np.sort(score)[len(score) // 2 - 1 : len(score) // 2 + 1]
    return Guard(DirectionTarget(BEHIND, vector), float(np.float32((low + high) / 2)), action, **rest)


@dataclass
class Watched:
    """The outputs of a request that ran alone; after each step, how far the model had come."""

    outcome: Outcome
    num_released: list[int]
    num_computed: list[int]


def watch(engine: Engine, request: GenerateRequest) -> Watched:
    """Run a request, and note at each step which positions had been computed when its tokens were released."""
    outputs: list[StepOutput] = []
    num_released, num_computed, forward = [], [0], engine._runner.forward

    def noted(token_ids, positions, rows, logits_at, num_layers):
        num_computed[-1] = max(positions) + 1
        return forward(token_ids, positions, rows, logits_at, num_layers)

    engine._runner.forward = noted
    engine.add_request(request)
    while engine.has_unfinished():
        outputs += engine.step()
        num_released.append(sum(len(output.token_ids) for output in outputs))
        num_computed.append(num_computed[-1])
    engine._runner.forward = forward
    assert_idle(engine)
    return Watched(outcome(outputs), num_released, num_computed[:-1])


def assert_held_back(watched: Watched, num_prompt: int, num_positions: int) -> None:
    """No token before the ``num_positions`` from its own on had been computed; the last ones with the last of them."""
    steps = zip(watched.num_released, [0, *watched.num_released], watched.num_computed, strict=False)
    *releases, last = [(released, computed) for released, before, computed in steps if released > before]
    if watched.outcome.finish_reason is FinishReason.BLOCKED:
        releases.append(last)
    else:
        assert last[1] == num_prompt + last[0]
    assert releases
    assert all(num_prompt + released <= computed - num_positions + 1 for released, computed in releases)


def assert_expected(result: Outcome, expected: Expected) -> None:
    assert list(result.token_ids) == expected.token_ids
    assert result.text == expected.text
    assert (result.finish_reason, result.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert [entry.logprob for entry in result.logprobs] == pytest.approx(expected.logprobs, abs=1e-3)
    assert_events(result.guard_events, expected.events)
    receipt = result.receipt
    assert (receipt.num_rewinds, receipt.num_rewound_tokens) == (expected.num_rewinds, expected.num_rewound_tokens)


def assert_events(events: Sequence[GuardEvent], expected: Sequence[GuardEvent]) -> None:
    assert all(event.source == "request" and event.label.startswith("guard: direction") for event in events)
    assert [replace(event, score=0.0, label="") for event in events] == [replace(e, score=0.0) for e in expected]
    np.testing.assert_allclose([e.score for e in events], [e.score for e in expected], rtol=1e-4, atol=1e-4)
