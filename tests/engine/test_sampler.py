"""Draws follow the distribution that a request's sampling parameters ask for, row by row."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from steerserve.engine import sampler
from steerserve.engine.sampler import DrawnToken, LogitEdits, RowSampler, next_tokens, sample
from steerserve.types import SamplingParams

VOCAB = 50
PROMPT = (3, 1, 4, 1, 5)
UNIFORMS = (np.arange(20000) + 0.5) / 20000


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        mass_before = np.cumsum(p[order]) - p[order]
        p[order[mass_before >= params.top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=5),
        SamplingParams(top_k=1000),
        SamplingParams(top_p=0.6),
        SamplingParams(top_k=7, top_p=0.8, temperature=1.7),
        SamplingParams(temperature=1e-9),
        SamplingParams(min_p=0.2),
        SamplingParams(min_p=1.0),
        SamplingParams(min_p=0.05, top_k=6, top_p=0.9, temperature=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("candidates", [(2, 8), (64, 1024)], ids=["few-candidates", "default"])
def test_draws_invert_the_distribution(params, candidates, monkeypatch) -> None:
    monkeypatch.setattr(sampler, "TOP_P_CANDIDATES", candidates)
    logits = np.random.default_rng(0).normal(0, 2, size=50).astype(np.float32)
    rows = torch.from_numpy(logits).expand(len(UNIFORMS), -1).contiguous()
    drawn = sample(rows, [params] * len(UNIFORMS), UNIFORMS.tolist())
    frequency = np.bincount(drawn, minlength=50) / len(UNIFORMS)
    np.testing.assert_allclose(frequency, reference(logits, params), atol=2e-4)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]])
    assert sample(logits, [SamplingParams(temperature=0)] * 2, [0.9, 0.9]) == [1, 0]


EVERY_KIND = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(seed=2, top_p=0.3, logprobs=3),
    SamplingParams(seed=3, top_k=40, min_p=0.1),
    SamplingParams(seed=4, top_p=0.999, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(seed=5, temperature=0.1, logit_bias={7: 3.0, 8: -2.0}, logprobs=20),
    SamplingParams(temperature=0, presence_penalty=2.0, logprobs=0),
]


def steps(params: list[SamplingParams], logits: torch.Tensor) -> list[list]:
    """What each row draws over ``logits`` ``[steps, B, vocab]``; every token counts for the next."""
    rows = [RowSampler(row, PROMPT) for row in params]
    drawn = []
    for step in logits:
        drawn.append(next_tokens(step.clone(), rows))
        for row, token in zip(rows, drawn[-1], strict=True):
            row.count(token.token_id)
    return [list(tokens) for tokens in zip(*drawn, strict=True)]


def go_on(row: RowSampler, logits: torch.Tensor) -> list[DrawnToken]:
    """What a row that has drawn before draws over ``logits`` ``[steps, 1, vocab]``."""
    tokens = []
    for step in logits:
        (token,) = next_tokens(step.clone(), [row])
        row.count(token.token_id)
        tokens.append(token)
    return tokens


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, size=(8, 7, 3001)).astype(np.float32))
    together = steps(EVERY_KIND, logits)
    assert together == [steps([params], logits[:, [i]])[0] for i, params in enumerate(EVERY_KIND)]
    reordered = [6, 2, 0, 5, 1, 4, 3]
    assert steps([EVERY_KIND[i] for i in reordered], logits[:, reordered]) == [together[i] for i in reordered]


@pytest.mark.parametrize("params", [*EVERY_KIND, SamplingParams(seed=6, repetition_penalty=0.5, presence_penalty=-2.0)])
@pytest.mark.parametrize(("num_kept", "num_ahead"), [(0, 5), (3, 1), (6, 8)])
def test_what_follows_a_rewind_is_as_if_nothing_had_been_drawn_ahead(params, num_kept, num_ahead) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, size=(14, 1, 12)).astype(np.float32))
    ahead = logits[:num_kept].tolist() + logits[-num_ahead:].tolist()  # other logits where it goes ahead
    row = RowSampler(params, PROMPT)
    tokens = go_on(row, torch.tensor(ahead))
    assert len(set(tokens)) > 1
    row.rewind([token.token_id for token in tokens[num_kept:]])
    expected = steps([params], logits)[0]
    assert tokens[:num_kept] + go_on(row, logits[num_kept:]) == expected


def test_response_i_draws_with_seed_plus_i() -> None:
    def uniforms(seed: int | None, index: int) -> list[float]:
        row = RowSampler(SamplingParams(seed=seed), PROMPT, index)
        return [row.draw_uniform() for _ in range(4)]

    assert uniforms(7, 2) == uniforms(9, 0) != uniforms(7, 0)
    assert uniforms(None, 0) != uniforms(None, 1)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.99999)], ids=str)
def test_impossible_tokens_are_never_drawn(params, uniform) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    assert sample(logits, [params], [uniform])[0] in (1, 3)


RESPONSES = st.lists(st.integers(0, VOCAB - 1), max_size=30)
LOGITS = st.integers(0, 99).map(lambda seed: np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32))


def edited(logits: np.ndarray, params: SamplingParams, response: list[int]) -> np.ndarray:
    edits, row = LogitEdits(params, PROMPT), logits.copy()
    for token_id in response:
        edits.count(token_id)
    edits.apply(row)
    return row


@settings(deadline=None, derandomize=True)
@given(logits=LOGITS, response=RESPONSES, penalty=st.floats(0.1, 3))
def test_repetition_penalty_is_that_of_transformers_over_prompt_and_response(logits, response, penalty) -> None:
    seen = torch.tensor([[*PROMPT, *response]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, torch.from_numpy(logits)[None].clone())[0]
    row = edited(logits, SamplingParams(repetition_penalty=penalty), response)
    np.testing.assert_array_equal(row, expected.numpy())


@settings(deadline=None, derandomize=True)
@given(logits=LOGITS, bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), min_size=1))
def test_logit_bias_is_that_of_transformers(logits, bias) -> None:
    processor = SequenceBiasLogitsProcessor([[[token_id], value] for token_id, value in bias.items()])
    expected = processor(torch.tensor([PROMPT]), torch.from_numpy(logits)[None].clone())[0]
    np.testing.assert_array_equal(edited(logits, SamplingParams(logit_bias=bias), [1, 2]), expected.numpy())


penalties = st.floats(-2, 2)


@settings(deadline=None, derandomize=True)
@given(logits=LOGITS, response=RESPONSES, frequency=penalties, presence=penalties, repetition=st.sampled_from([1, 1.5]))
def test_edits_follow_their_formula_and_order(logits, response, frequency, presence, repetition) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias={3: -4.0, 9: 2.5},
    )
    expected = logits.astype(np.float64)
    expected[3] -= 4.0
    expected[9] += 2.5
    for token_id in {*PROMPT, *response}:
        expected[token_id] *= 1 / repetition if expected[token_id] > 0 else repetition
    for token_id, count in Counter(response).items():
        expected[token_id] -= frequency * count + presence
    np.testing.assert_allclose(edited(logits, params, response), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, derandomize=True)
@given(
    logits=LOGITS,
    tries=st.lists(st.tuples(RESPONSES, st.integers(0, 30)), max_size=4),
    penalty=st.sampled_from([{"repetition_penalty": 1.5}, {"frequency_penalty": 0.5, "presence_penalty": -1.0}]),
)
def test_what_is_uncounted_was_never_there(logits, tries, penalty) -> None:
    """Each try goes on with some tokens and takes some of the last back."""
    params = SamplingParams(**penalty)
    edits, response = LogitEdits(params, PROMPT), []
    for token_ids, num_back in tries:
        for token_id in token_ids:
            edits.count(token_id)
        response += token_ids
        for _ in range(min(num_back, len(response))):
            edits.uncount(response.pop())
        row = logits.copy()
        edits.apply(row)
        np.testing.assert_array_equal(row, edited(logits, params, response))


def test_edits_leave_no_row_without_a_finite_logit() -> None:
    params = SamplingParams(repetition_penalty=100.0)
    logits = np.full(VOCAB, -np.inf, dtype=np.float32)
    logits[3] = -3e38
    assert np.isfinite(edited(logits, params, []).max())
    logits[3] = 3e38
    assert np.isfinite(edited(logits, SamplingParams(repetition_penalty=0.01), []).max())


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p) -> None:
    logits = np.random.default_rng(1).normal(0, 2, VOCAB).astype(np.float32)
    kept = MinPLogitsWarper(min_p)(torch.tensor([PROMPT]), torch.from_numpy(logits)[None].clone())[0].isfinite()
    rows = torch.from_numpy(logits).expand(len(UNIFORMS), -1).contiguous()
    drawn = sample(rows, [SamplingParams(min_p=min_p)] * len(UNIFORMS), UNIFORMS.tolist())
    frequent = kept.numpy() & (reference(logits, SamplingParams(min_p=min_p)) > 1e-3)
    assert set(np.flatnonzero(frequent)) <= set(drawn) <= set(np.flatnonzero(kept.numpy()))


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_of_the_untouched_distribution(num_top) -> None:
    logits = np.random.default_rng(2).normal(0, 4, size=VOCAB)
    params = SamplingParams(
        seed=0, temperature=3.0, top_k=30, repetition_penalty=2.0, logit_bias={3: 50.0}, logprobs=num_top
    )
    (token,) = next_tokens(torch.tensor(logits[None], dtype=torch.float32), [RowSampler(params, PROMPT)])
    expected = logits - np.log(np.exp(logits).sum())
    (entry,) = token.logprobs
    assert token.token_id == 3
    assert entry.logprob == pytest.approx(expected[3], abs=1e-5)
    assert entry.rank == 1 + (logits > logits[3]).sum() > 1
    ids, values = [token_id for token_id, _ in entry.top], [value for _, value in entry.top]
    assert ids == np.argsort(-logits)[:num_top].tolist()
    np.testing.assert_allclose(values, expected[ids], atol=1e-5)


def test_rows_that_do_not_ask_get_nothing(monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("work that no row asked for")

    monkeypatch.setattr(LogitEdits, "__init__", fail)
    monkeypatch.setattr(sampler, "_logprobs", fail)
    rows = [RowSampler(SamplingParams(temperature=0), PROMPT), RowSampler(SamplingParams(seed=0, top_k=2), PROMPT)]
    logits = torch.zeros(2, VOCAB)
    tokens = next_tokens(logits, rows)
    assert [token.logprobs for token in tokens] == [(), ()]
