"""TopK (Gao et al. 2024), BatchTopK (Bussmann et al. 2024) and Matryoshka (Bussmann et al. 2025).

TopK keeps the k largest activations of each token. BatchTopK keeps the k · n largest of a batch, so that a token may
use more features where it needs them. Serving must not depend on the batch: a running average of the smallest
survivor becomes the threshold of an equivalent JumpReLU SAE, exact on any subset of features. It decays by
``threshold_decay`` a step, faster in a run of under 3,600 steps: the first batch, whose weights are untrained, is to
count for e^-3.6 = 2.7 % at most in the end. Matryoshka is BatchTopK in which every prefix of the features reconstructs
by itself, so that the first ones stay general.

In all of them, dead features are trained to explain what the live ones leave (AuxK).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeVar

import torch

from steerserve.lab.training.objective import Forward, Objective, Thresholded, mean_square, mixed_precision
from steerserve.lab.training.settings import BatchTopKConfig, MatryoshkaConfig, TopKConfig

INITIAL_SHARE_EXPONENT = 3.6
"""The first batch's share of the threshold that is saved is e to the minus this, or less."""

AnyTopK = TypeVar("AnyTopK", bound=TopKConfig)
AnyBatchTopK = TypeVar("AnyBatchTopK", bound=BatchTopKConfig)


class _TopKBase(Objective[AnyTopK]):
    def pre_activation(self, x: torch.Tensor) -> torch.Tensor:
        return super().pre_activation(x).relu_()

    def loss(self, forward: Forward) -> torch.Tensor:
        return forward.fvu + self.config.aux_coefficient * self.auxiliary_loss(forward)

    def auxiliary_loss(self, forward: Forward) -> torch.Tensor:
        """Share of the residual's variance that the largest activations of dead features leave unexplained."""
        pre, residual = forward.pre, forward.residual.detach()
        dead = self.dead().nonzero().flatten()
        if len(dead) == 0:
            return pre.new_zeros(())
        top = pre[:, dead].topk(min(len(dead), max(pre.shape[1] // 16, 1)), dim=1)
        f = torch.zeros_like(pre[:, dead]).scatter(1, top.indices, top.values)
        explained = f @ self.W_dec[dead]
        return mean_square(residual - explained) / mean_square(residual - residual.mean(0))


class TopK(_TopKBase[TopKConfig]):
    """The saved SAE is a TopK SAE: a feature's activation depends on the others'."""

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        top = pre.topk(self.config.k, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values)

    @property
    def features_per_token(self) -> int:
        return self.config.k


class _BatchTopKBase(_TopKBase[AnyBatchTopK]):
    threshold: torch.Tensor
    """Running average of the smallest survivor; NaN before the first batch."""

    def initialise(self, x: torch.Tensor) -> None:
        self.register_buffer("threshold", torch.tensor(math.nan))

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        cutoff = self._cutoff(pre.detach(), self.config.k * len(pre))
        decay = min(self.config.threshold_decay, max(1 - INITIAL_SHARE_EXPONENT / self.config.steps, 0))
        self.threshold = torch.where(self.threshold.isnan(), cutoff, decay * self.threshold + (1 - decay) * cutoff)
        return torch.where(pre >= cutoff, pre, 0.0)

    def _cutoff(self, pre: torch.Tensor, count: int) -> torch.Tensor:
        """The ``count``-th largest entry; searches the few above half the running threshold first."""
        candidates = pre.masked_select(pre > 0.5 * self.threshold)
        if len(candidates) >= count:
            return torch.kthvalue(candidates, len(candidates) - count + 1).values
        return torch.kthvalue(pre.flatten(), pre.numel() - count + 1).values

    def thresholded(self) -> Thresholded:
        return Thresholded(self.encoder().detach(), self.b_enc.detach(), self.threshold.expand(self.config.d_sae))


class BatchTopK(_BatchTopKBase[BatchTopKConfig]):
    """The default."""


class Matryoshka(_BatchTopKBase[MatryoshkaConfig]):
    """The loss is the mean over the prefixes; which features fire is decided over all of them together."""

    def loss(self, forward: Forward) -> torch.Tensor:
        ends = [round(share * self.config.d_sae) for share in self.config.prefix_shares]
        residual, squares = forward.residual, [mean_square(forward.residual)]
        for begin, end in reversed(list(pairwise(ends))):
            with mixed_precision(residual.device):
                block = forward.f[:, begin:end] @ self.W_dec[begin:end]
            residual = residual + block.float()
            squares.append(mean_square(residual))
        fvu = torch.stack(squares).mean() / forward.variance
        return fvu + self.config.aux_coefficient * self.auxiliary_loss(forward)
