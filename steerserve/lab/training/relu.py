"""ReLU with an L1 penalty: the textbook SAE, untied and tied.

minimise  |x − x̂|² + l1 · Σ f        (over the variance of x, which changes no minimum)
"""

from __future__ import annotations

import torch

from steerserve.lab.training.objective import Forward, Objective, ramp
from steerserve.lab.training.settings import ReLUConfig


class ReLU(Objective[ReLUConfig]):
    """Encoder and decoder are two matrices."""

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        return torch.relu(pre)

    def loss(self, forward: Forward) -> torch.Tensor:
        l1 = self.config.l1 * ramp(forward.step, self.config.sparsity_warmup_steps)
        return forward.fvu + l1 * forward.f.sum(-1).mean() / forward.variance


class Tied(ReLU):
    """The encoder is the decoder's transpose; one matrix, trained in both places."""

    def initialise(self, x: torch.Tensor) -> None:
        del self.W_enc

    def encoder(self) -> torch.Tensor:
        return self.W_dec.T
