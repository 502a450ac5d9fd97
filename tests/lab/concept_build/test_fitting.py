"""What a fit charges for the tokens that it is not about."""

from __future__ import annotations

import pytest
import torch

from steerserve.lab.concept_build.fitting import elsewhere


def log_probs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


NOTHING = torch.zeros(1, 4, dtype=torch.bool)


def test_the_charge_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    listed = torch.rand(5, 7, generator=generator) < 0.3
    kls, surprisals = [], []
    for b, a, excluded in zip(before, after, listed, strict=True):
        p, q = b[~excluded].exp(), a[~excluded].exp()
        p, q = p / p.sum(), q / q.sum()
        kls.append((p * (p / q).log()).sum())
        surprisals.append(-(q * p.log()).sum() + (p * p.log()).sum())
    kl, surprisal = elsewhere(before, after, listed)
    torch.testing.assert_close(kl, torch.stack(kls).mean())
    torch.testing.assert_close(surprisal, torch.stack(surprisals).mean())


def test_listed_tokens_are_not_charged() -> None:
    before, after = log_probs([0.4, 0.3, 0.2, 0.1]), log_probs([0.01, 0.495, 0.33, 0.165])
    listed = torch.tensor([[True, False, False, False]])
    assert elsewhere(before, after, listed) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert elsewhere(before, after, NOTHING)[0] > 0.1


def test_probability_that_moves_to_rare_tokens_costs_and_to_common_ones_earns() -> None:
    before = log_probs([0.7, 0.1, 0.1, 0.1])
    assert elsewhere(before, log_probs([0.6, 0.2, 0.1, 0.1]), NOTHING)[1] > 0.1
    assert elsewhere(before, log_probs([0.8, 0.1, 0.05, 0.05]), NOTHING)[1] < -0.1
