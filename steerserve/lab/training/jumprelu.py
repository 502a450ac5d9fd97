"""JumpReLU (Rajamanoharan et al. 2024): a threshold θ for each feature, learned beside the weights.

    f     = pre · 1[pre > θ]
    loss  = fraction of variance unexplained + coefficient · (L0 / target − 1)²,   L0 = Σ 1[pre > θ], batch mean

Both are flat in θ almost everywhere, but their expectations are not: a window about θ estimates how many activations
a small step of θ would cross (the straight-through estimator). In it

    ∂f/∂θ = −(θ / bandwidth) · 1[|pre − θ| < bandwidth / 2],     ∂L0/∂θ = −(1 / bandwidth) · 1[…]

and nothing goes back to ``pre`` beyond ∂f/∂pre = 1[pre > θ]. θ itself is the parameter: Adam moves a logarithm by a
fixed ratio a step, too slowly where θ has far to go. θ starts where ``target_l0`` features of a batch are active.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from steerserve.lab.training.objective import Forward, Objective, Thresholded, ramp
from steerserve.lab.training.settings import JumpReLUConfig


class JumpReLU(Objective[JumpReLUConfig]):
    """θ is kept at 0 or above."""

    def initialise(self, x: torch.Tensor) -> None:
        pre = self.pre_activation(x).detach().flatten()
        num_inactive = max(pre.numel() - round(self.config.target_l0 * len(x)), 1)
        start = pre.kthvalue(num_inactive).values.clamp(min=0)
        self.threshold = nn.Parameter(start.repeat(self.config.d_sae))

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        return jump_relu(pre, self.threshold, self.config.bandwidth)

    def loss(self, forward: Forward) -> torch.Tensor:
        l0 = step_above(forward.pre, self.threshold, self.config.bandwidth).sum(-1).mean()
        coefficient = self.config.sparsity_coefficient * ramp(forward.step, self.config.sparsity_warmup_steps)
        return forward.fvu + coefficient * (l0 / self.config.target_l0 - 1) ** 2

    def thresholded(self) -> Thresholded:
        return Thresholded(self.encoder().detach(), self.b_enc.detach(), self.threshold.detach())

    @torch.no_grad()
    def project(self) -> None:
        super().project()
        self.threshold.clamp_(min=0)


def jump_relu(pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """pre · 1[pre > threshold] of ``pre`` ``[n, d_sae]``, with the estimated gradient for ``threshold`` ``[d_sae]``."""
    result: torch.Tensor = _JumpReLU.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return result


def step_above(pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """1[pre > threshold] of ``pre`` ``[n, d_sae]``, with the estimated gradient for ``threshold`` ``[d_sae]`` alone."""
    result: torch.Tensor = _Step.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return result


def _in_window(pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    return (pre - threshold).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        crossed = (grad * _in_window(pre, threshold, ctx.bandwidth)).sum(0)
        return grad * (pre > threshold), -threshold / ctx.bandwidth * crossed, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        return None, -(grad * _in_window(pre, threshold, ctx.bandwidth)).sum(0) / ctx.bandwidth, None
