"""Train a BatchTopK SAE (Bussmann et al. 2024) on harvested activations.

Per batch the ``k · batch_size`` largest activations survive, so a token may use more features where
it needs them. Serving must not depend on the batch: a running average of the smallest surviving
activation becomes the threshold of an equivalent JumpReLU SAE, exact on any subset of features.

Training runs on x · sqrt(d)/mean|x| so that settings carry over between sites. The scale is folded
on export: decoder rows have unit norm and f is in units of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from steerserve.errors import InvalidRequestError
from steerserve.lab.activations import MASSIVE_NORM_RATIO
from steerserve.lab.store import ActivationStore
from steerserve.sae.model import SAE


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
        d_sae: number of features.
        k: mean number of active features per token during training.
        steps: optimiser steps of ``batch_size`` rows each; the store is repeated as often as needed.
        dead_after_rows: a feature that has not fired for so many rows is dead and is trained by the
            auxiliary loss (Gao et al. 2024) to explain what the live ones leave.
    """

    d_sae: int = 4608
    k: int = 48
    steps: int = 6000
    batch_size: int = 2048
    learning_rate: float = 6e-4
    warmup_steps: int = 200
    decay_fraction: float = 0.25
    aux_coefficient: float = 1 / 32
    dead_after_rows: int = 400_000
    threshold_decay: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k > self.d_sae:
            raise InvalidRequestError("k", self.k, f"at most d_sae, {self.d_sae}")


@dataclass(frozen=True)
class TrainStats:
    """Progress of a run: fraction of variance unexplained and share of dead features, on the last batch."""

    step: int
    fvu: float
    dead_share: float


def train_batch_topk(
    store: ActivationStore, config: TrainConfig, name: str, report: Callable[[TrainStats], None]
) -> SAE:
    """Train on ``store`` and return the equivalent thresholded SAE in residual-stream units."""
    torch.manual_seed(config.seed)
    rows = _endless(store, config.batch_size)
    first = next(rows)
    norms = first.norm(dim=-1)
    scale = first.shape[1] ** 0.5 / norms.mean()
    trainee = _BatchTopK(first * scale, config)
    optimizer = torch.optim.Adam(trainee.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, config))
    for step in range(config.steps):
        x = next(rows) * scale
        loss, fvu = trainee.losses(x)
        optimizer.zero_grad()
        loss.backward()
        trainee.keep_decoder_gradient_tangent()
        optimizer.step()
        trainee.normalise_decoder()
        schedule.step()
        if step % 50 == 0 or step == config.steps - 1:
            report(TrainStats(step + 1, fvu, trainee.dead().float().mean().item()))
    return trainee.export(store, name, scale.item(), max_norm=MASSIVE_NORM_RATIO * norms.median().item())


class _BatchTopK(nn.Module):
    def __init__(self, sample: torch.Tensor, config: TrainConfig) -> None:
        super().__init__()
        d_in = sample.shape[1]
        directions = F.normalize(torch.randn(config.d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(directions.clone())
        self.W_enc = nn.Parameter(directions.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(sample.mean(0))
        self.config = config
        self.threshold: torch.Tensor | None = None
        self.rows_since_fired = torch.zeros(config.d_sae, dtype=torch.long)

    def losses(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Loss of one batch, and its fraction of variance unexplained."""
        with torch.autocast("cpu", torch.bfloat16):
            pre = (x - self.b_dec) @ self.W_enc
        pre = torch.relu(pre.float() + self.b_enc)
        cutoff = self._cutoff(pre.detach(), self.config.k * len(x))
        f = pre * (pre >= cutoff)
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction = f @ self.W_dec
        residual = x - self.b_dec - reconstruction.float()
        self._remember(f.detach(), cutoff)
        variance = (x - x.mean(0)).square().sum(-1).mean()
        mse = residual.square().sum(-1).mean()
        loss = mse / variance.detach() + self.config.aux_coefficient * self._auxiliary_loss(pre, residual.detach())
        return loss, (mse / variance).item()

    def dead(self) -> torch.Tensor:
        """Mask ``[d_sae]`` of features that have not fired for ``dead_after_rows`` rows."""
        return self.rows_since_fired > self.config.dead_after_rows

    def _cutoff(self, pre: torch.Tensor, count: int) -> torch.Tensor:
        """The ``count``-th largest entry; searches the few above half the running threshold first."""
        if self.threshold is not None:
            candidates = pre[pre > 0.5 * self.threshold]
            if len(candidates) >= count:
                return torch.kthvalue(candidates, len(candidates) - count + 1).values
        return torch.kthvalue(pre.flatten(), pre.numel() - count + 1).values

    @torch.no_grad()
    def _remember(self, f: torch.Tensor, cutoff: torch.Tensor) -> None:
        decay = self.config.threshold_decay
        self.threshold = cutoff if self.threshold is None else decay * self.threshold + (1 - decay) * cutoff
        self.rows_since_fired += len(f)
        self.rows_since_fired[(f > 0).any(0)] = 0

    def _auxiliary_loss(self, pre: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        dead = self.dead().nonzero().flatten()
        if len(dead) == 0:
            return pre.new_zeros(())
        top = pre[:, dead].topk(min(len(dead), pre.shape[1] // 16), dim=1)
        f = torch.zeros_like(pre[:, dead]).scatter(1, top.indices, top.values)
        explained = f @ self.W_dec[dead]
        centred = residual - residual.mean(0)
        return (residual - explained).square().sum(-1).mean() / centred.square().sum(-1).mean()

    @torch.no_grad()
    def keep_decoder_gradient_tangent(self) -> None:
        """Remove from the decoder's gradient what would only change row norms."""
        assert self.W_dec.grad is not None
        radial = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad -= radial * self.W_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Rows of W_dec back to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def export(self, store: ActivationStore, name: str, scale: float, max_norm: float) -> SAE:
        """The trained weights with the input scale folded in."""
        assert self.threshold is not None
        return SAE(
            name=name,
            site=store.site,
            W_enc=self.W_enc.detach().clone(),
            b_enc=self.b_enc.detach() / scale,
            W_dec=self.W_dec.detach().clone(),
            b_dec=self.b_dec.detach() / scale,
            threshold=(self.threshold / scale).expand(self.config.d_sae).clone(),
            max_norm=max_norm,
            metadata={
                "model_name": store.manifest.model_name,
                "context_size": store.manifest.context_length,
                "model_fingerprint": store.manifest.model_fingerprint,
            },
        )


def _learning_rate_factor(step: int, config: TrainConfig) -> float:
    remaining = (config.steps - step) / (config.decay_fraction * config.steps)
    return min(1.0, (step + 1) / config.warmup_steps, max(remaining, 0.0))


def _endless(store: ActivationStore, batch_size: int) -> Iterator[torch.Tensor]:
    while True:
        yield from store.batches(batch_size)
