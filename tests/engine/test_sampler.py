"""Draws follow the distribution that temperature, top-k and top-p ask for, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steerserve.engine import sampler
from steerserve.engine.sampler import sample
from steerserve.types import SamplingParams

UNIFORMS = (np.arange(20000) + 0.5) / 20000


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
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


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, size=(6, 3000)).astype(np.float32))
    params = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.3),
        SamplingParams(top_k=40),
        SamplingParams(top_p=0.999),
        SamplingParams(temperature=0.1),
    ]
    uniforms = rng.random(6).tolist()
    together = sample(logits, params, uniforms)
    assert together == [sample(logits[i : i + 1], [params[i]], [uniforms[i]])[0] for i in range(6)]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.99999)], ids=str)
def test_impossible_tokens_are_never_drawn(params, uniform) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    assert sample(logits, [params], [uniform])[0] in (1, 3)
