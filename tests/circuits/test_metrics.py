"""Metrics against their formulas in float64; larger is worse in all of them."""

from __future__ import annotations

import pytest
import torch

from steerserve.circuits.metrics import METRICS, greater_than, kl, log_odds, logit_difference
from steerserve.circuits.prompts import PairText, PromptPairs

V = 11
CORRECT = ((1,), (2, 3, 4), (5, 6))
WRONG = ((7, 8), (9,), (0, 10))


@pytest.fixture
def pairs() -> PromptPairs:
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    text = PairText("a", "b", ("c",), ("d",))
    return PromptPairs("t", tokens, tokens + 1, torch.tensor([1, 1, 1]), CORRECT, WRONG, (text,) * 3)


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(4, 3, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def expected(name: str, row: torch.Tensor, prompt: int, reference: torch.Tensor) -> torch.Tensor:
    """Of one prompt's logits ``[V]``."""
    p, q = reference.softmax(0), row.softmax(0)
    correct, wrong = list(CORRECT[prompt]), list(WRONG[prompt])
    return {
        "kl": (p * (p / q).log()).sum(),
        "logit_difference": row[wrong].mean() - row[correct].mean(),
        "greater_than": q[wrong].sum() - q[correct].sum(),
        "log_odds": (q[wrong].sum() / q[correct].sum()).log(),
    }[name]


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_each_is_the_mean_of_its_formula(pairs, logits, name, dtype, tolerance) -> None:
    reference = logits[0]
    metric = METRICS[name](pairs, reference.to(dtype))
    each = torch.stack([torch.stack([expected(name, rows[i], i, reference[i]) for i in range(3)]) for rows in logits])
    assert metric.name == name
    assert metric(logits.to(dtype)).dtype is torch.float64
    torch.testing.assert_close(metric.per_prompt(logits.to(dtype)), each, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(metric(logits.to(dtype)), each.mean(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(metric(logits[1].to(dtype)), each[1].mean(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [logit_difference, greater_than, log_odds])
def test_a_likelier_correct_answer_is_better(pairs, logits, make) -> None:
    better = logits.clone()
    for prompt, tokens in enumerate(CORRECT):
        better[:, prompt, list(tokens)] += 1
    assert (make(pairs).per_prompt(better) < make(pairs).per_prompt(logits)).all()


def test_the_reference_itself_has_no_divergence(logits) -> None:
    assert kl(logits[0])(logits[0]) == 0
    assert (kl(logits[0])(logits[1:]) > 0).all()


@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_those_of_the_formula(pairs, logits, name) -> None:
    metric = METRICS[name](pairs, logits[0])
    assert torch.autograd.gradcheck(metric, logits[1:2].clone().requires_grad_())
