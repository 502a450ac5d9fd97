"""The straight-through estimator, and the objectives' losses and gradients against formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steerserve.lab.training.jumprelu import jump_relu, step_above
from steerserve.lab.training.objective import Objective
from steerserve.lab.training.settings import train_config
from steerserve.lab.training.trainer import OBJECTIVES

BANDWIDTH = 0.4


def test_jump_relu_is_differentiated_as_stated() -> None:
    """∂f/∂pre = 1[pre > θ]; ∂f/∂θ = −(θ / bandwidth) · 1[|pre − θ| < bandwidth / 2]."""
    pre = torch.tensor([[-1.0, 0.9, 1.1], [0.81, 1.19, 1.3]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    f = jump_relu(pre, threshold, BANDWIDTH)
    assert f.tolist() == [[0, 0, 1.1], [0.81, 1.19, 1.3]]
    (f * weight).sum().backward()
    assert pre.grad is not None
    assert pre.grad.tolist() == [[0, 0, 3], [4, 5, 6]]
    # Column 0: 0.81 lies 0.31 above θ, outside; column 1: 0.9 and 1.19 inside; column 2: 1.1 inside, 1.3 outside.
    torch.testing.assert_close(threshold.grad, -torch.tensor([0.0, 7.0, 3.0], dtype=torch.float64) / BANDWIDTH)


def test_the_step_moves_the_threshold_alone() -> None:
    pre = torch.tensor([[0.9, 3.0], [1.1, 1.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    active = step_above(pre, threshold, BANDWIDTH)
    assert active.tolist() == [[0, 1], [1, 0]]
    active.sum().backward()
    assert pre.grad is None
    torch.testing.assert_close(threshold.grad, torch.tensor([-2 / BANDWIDTH, 0.0], dtype=torch.float64))


def test_the_estimator_estimates_the_derivative_of_the_expectation() -> None:
    """On many samples, against finite differences of the loss's mean, which is smooth in θ."""
    pre = torch.randn(400_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    target = 0.4 * pre

    def loss(value: torch.Tensor) -> torch.Tensor:
        f = jump_relu(pre, value, 0.2)
        return (f - target).square().mean() + 0.3 * step_above(pre, value, 0.2).mean()

    (gradient,) = torch.autograd.grad(loss(threshold), threshold)
    with torch.no_grad():
        difference = (loss(threshold + 0.05) - loss(threshold - 0.05)) / 0.1
    assert gradient.item() == pytest.approx(difference.item(), rel=0.1)


D, D_SAE, ROWS = 12, 20, 16


def objective(architecture: str, **settings: Any) -> tuple[Objective[Any], torch.Tensor]:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0)) + 0.5
    generator = torch.Generator().manual_seed(1)
    config = train_config(architecture, {"d_sae": D_SAE, **settings})
    made = OBJECTIVES[architecture](config, x, x, False, generator)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made, x[:ROWS]


def reference(made: Objective[Any], architecture: str, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> Any:
    """The loss at the end of the penalty's warm-up, written out in float64."""
    W_enc = weights["W_dec"].T if architecture == "tied" else weights["W_enc"]
    pre = (x - weights["b_dec"]) @ W_enc + weights["b_enc"]
    config, variance = made.config, (x - x.mean(0)).square().sum(1).mean()
    extra = torch.zeros(())
    if architecture in ("relu", "tied"):
        f = F.relu(pre)
        extra = config.l1 * f.sum(1).mean() / variance
    elif architecture == "gated":
        product = (x - weights["b_dec"]) @ W_enc
        f = (pre > 0) * F.relu(product * weights["r_mag"].exp() + weights["b_mag"])
        frozen = F.relu(pre) @ weights["W_dec"].detach() + weights["b_dec"].detach()
        extra = (config.l1 * F.relu(pre).sum(1).mean() + (x - frozen).square().sum(1).mean()) / variance
    else:
        f = F.relu(pre)
        smallest = f.flatten().sort(descending=True).values[config.k * len(x) - 1]
        f = f * (f >= smallest) if architecture != "topk" else f * (f >= f.topk(config.k).values[:, -1:])
    ends = [D_SAE // 2, D_SAE] if architecture == "matryoshka" else [D_SAE]
    losses = [
        (x - f[:, :end] @ weights["W_dec"][:end] - weights["b_dec"]).square().sum(1).mean() / variance for end in ends
    ]
    return sum(losses) / len(losses) + extra


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("relu", {"l1": 0.7}),
        ("tied", {"l1": 0.7}),
        ("gated", {"l1": 0.7}),
        ("topk", {"k": 3}),
        ("batchtopk", {"k": 3}),
        ("matryoshka", {"k": 3, "prefix_shares": (0.5, 1)}),
    ],
)
def test_losses_and_gradients_are_those_of_the_formulas(
    architecture: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: torch.enable_grad())  # products in full precision
    made, x = objective(architecture, **settings)
    forward = made(x, x, 10**6)
    loss = made.loss(forward)
    loss.backward()
    weights = {name: weight.detach().double().requires_grad_() for name, weight in made.named_parameters()}
    expected = reference(made, architecture, x.double(), weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(expected, list(weights.values()))
    for (name, weight), gradient in zip(made.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(
            weight.grad.double(), gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_jumprelu_pulls_l0_to_its_target() -> None:
    """Too many active features raise every threshold that some activation is near; too few lower it."""
    for target, sign in ((1, -1), (19, 1)):
        made, x = objective("jumprelu", target_l0=10, bandwidth=2.0)
        made.config = train_config("jumprelu", {"d_sae": D_SAE, "target_l0": target, "sparsity_coefficient": 100})
        made.loss(made(x, x, 10**6)).backward()
        gradient = made.threshold.grad
        assert (sign * gradient >= 0).all()
        assert gradient.abs().sum() > 0


def test_the_auxiliary_loss_has_the_dead_features_explain_the_residual() -> None:
    made, x = objective("topk", k=3, dead_after_rows=100)
    made.rows_since_fired[:] = 0
    made.rows_since_fired[[4, 9]] = 10_000
    forward = made(x, x, 0)
    pre, residual = forward.pre.detach().double(), forward.residual.detach().double()
    kept = pre.clone()
    kept[:, [i for i in range(D_SAE) if i not in (4, 9)]] = 0
    made.rows_since_fired[[4, 9]] = 10_000  # whatever fired in this batch
    kept[pre < pre[:, [4, 9]].amax(1, keepdim=True)] = 0  # d_sae / 16 of them at most: one a row
    explained = kept @ made.W_dec.detach().double()
    wanted = (residual - explained).square().sum(1).mean() / (residual - residual.mean(0)).square().sum(1).mean()
    assert made.auxiliary_loss(forward).item() == pytest.approx(wanted.item(), rel=1e-4)
    made.rows_since_fired[:] = 0
    assert made.auxiliary_loss(forward).item() == 0


def test_the_threshold_is_a_running_average() -> None:
    made, x = objective("batchtopk", k=3, threshold_decay=0.75)
    cutoffs = []
    for rows in (x, 2 * x, 3 * x):
        forward = made(rows, rows, 0)
        cutoffs.append(forward.f[forward.f > 0].min().item())
    assert len(set(cutoffs)) == 3
    assert made.threshold.item() == pytest.approx(
        0.75 * (0.75 * cutoffs[0] + 0.25 * cutoffs[1]) + 0.25 * cutoffs[2], rel=1e-5
    )
    assert (made(x, x, 0).f > 0).sum() == 3 * ROWS


def test_decoder_gradients_turn_rows_and_do_not_stretch_them() -> None:
    made, x = objective("relu")
    made.project()
    made.loss(made(x, x, 0)).backward()
    before = made.W_dec.grad.clone()
    made.keep_decoder_gradient_tangent()
    torch.testing.assert_close((made.W_dec.grad * made.W_dec).sum(1), torch.zeros(D_SAE), atol=1e-6, rtol=0)
    assert (before * made.W_dec).sum(1).abs().max() > 1e-3
