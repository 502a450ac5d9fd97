"""Gated SAE (Rajamanoharan et al. 2024): whether a feature is on, and how much, are decided apart.

    gate  = (x − b_dec) W_enc + b_gate                       (``pre`` and ``b_enc`` of the common equations)
    f     = 1[gate > 0] · relu(e^r · (gate − b_gate) + b_mag)
    loss  = |x − x̂|² + l1 · Σ relu(gate) + |x − x̂(relu(gate))|²      (over the variance of x)

The last term, with the decoder frozen, is all that trains the gate to be useful. e^r > 0 makes the two halves one
threshold: with b_enc = b_mag and W_enc · e^r, the gate is open where pre > b_mag − e^r · b_gate.
"""

from __future__ import annotations

import torch
from torch import nn

from steerserve.lab.training.objective import Forward, Objective, Thresholded, mean_square, mixed_precision, ramp
from steerserve.lab.training.settings import GatedConfig


class Gated(Objective[GatedConfig]):
    """Saved as the JumpReLU SAE that it equals."""

    def initialise(self, x: torch.Tensor) -> None:
        self.r_mag = nn.Parameter(torch.zeros(self.config.d_sae))
        self.b_mag = nn.Parameter(self.b_enc.detach().clone())

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        magnitude = torch.relu(self.r_mag.exp() * (pre - self.b_enc) + self.b_mag)
        return magnitude * (pre > 0)

    def loss(self, forward: Forward) -> torch.Tensor:
        l1 = self.config.l1 * ramp(forward.step, self.config.sparsity_warmup_steps)
        gate = torch.relu(forward.pre)
        with mixed_precision(gate.device):
            reconstruction = gate @ self.W_dec.detach()
            if self.W_skip is not None:
                reconstruction = reconstruction + forward.x @ self.W_skip.detach().T
        auxiliary = mean_square(forward.target - self.b_dec.detach() - reconstruction.float())
        return forward.fvu + (l1 * gate.sum(-1).mean() + auxiliary) / forward.variance

    def thresholded(self) -> Thresholded:
        growth, b_mag = self.r_mag.detach().exp(), self.b_mag.detach()
        threshold = (b_mag - growth * self.b_enc.detach()).clamp(min=0)
        return Thresholded(self.encoder().detach() * growth, b_mag, threshold)
