"""What all objectives share: weights, reconstruction, silent features, and unit decoder rows.

    pre  = (x − b_dec) W_enc + b_enc            (x W_enc + b_enc for a transcoder)
    f    = activation(pre)
    x̂    = f W_dec + b_dec + W_skip x           (W_skip if the settings ask for it)

An objective says what ``activation`` is, what is minimised, and which thresholded SAE it amounts to. Decoder rows are
kept at unit norm: without it an L1 penalty is paid off by small activations and large rows, and everywhere else a
feature's activation is then the length of what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from steerserve.lab.training.settings import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True)
class Forward:
    """One batch of ``n`` rows in training units.

    Attributes:
        step: number of the optimiser step, from 0.
        pre: ``[n, d_sae]`` before the activation function; ``f`` ``[n, d_sae]`` behind it.
        residual: ``[n, d_out]`` target − reconstruction.
        variance: mean squared distance of the targets from their mean.
        fvu: fraction of variance unexplained, which the reconstruction is trained by.
    """

    step: int
    x: torch.Tensor
    target: torch.Tensor
    pre: torch.Tensor
    f: torch.Tensor
    residual: torch.Tensor
    variance: torch.Tensor
    fvu: torch.Tensor


@dataclass(frozen=True)
class Thresholded:
    """Encoder of the equivalent SAE, in training units: ``W_enc`` ``[d_in, d_sae]``, the others ``[d_sae]``."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 products, but not on a CPU without instructions for them: it takes four times as long as in float32."""
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    is_fast = device.type != "cpu" or any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=is_fast)


class Objective(nn.Module, Generic[Config]):
    """An SAE in training.

    Args:
        x: ``[n, d_in]`` a batch to start from; ``target`` ``[n, d_out]`` what it is to become.
        transcodes: whether the two are of different sites.
        generator: draws the first weights.
    """

    rows_since_fired: torch.Tensor
    """``[d_sae]``."""

    def __init__(
        self, config: Config, x: torch.Tensor, target: torch.Tensor, transcodes: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        self.transcodes = transcodes
        directions = _unit_rows(config.d_sae, target.shape[1], generator)
        readers = _unit_rows(config.d_sae, x.shape[1], generator) if transcodes else directions
        self.W_dec = nn.Parameter(directions.clone())
        self.W_enc = nn.Parameter(readers.T.contiguous())
        self.b_enc = nn.Parameter(-x.mean(0) @ self.W_enc.detach() if transcodes else torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(target.mean(0))
        self.W_skip = nn.Parameter(torch.zeros(target.shape[1], x.shape[1])) if config.skip else None
        self.register_buffer("rows_since_fired", torch.zeros(config.d_sae, dtype=torch.long))
        self.initialise(x)

    def initialise(self, x: torch.Tensor) -> None:
        """Set up what an objective has beside the common weights."""

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        """``f`` ``[n, d_sae]`` of ``pre``."""
        raise NotImplementedError

    def loss(self, forward: Forward) -> torch.Tensor:
        """The scalar to minimise."""
        raise NotImplementedError

    def thresholded(self) -> Thresholded:
        """The encoder that is saved."""
        return Thresholded(self.encoder().detach(), self.b_enc.detach(), torch.zeros(self.config.d_sae))

    @property
    def features_per_token(self) -> int | None:
        """How many features the saved SAE keeps of each token, where no threshold decides that."""
        return None

    def forward(self, x: torch.Tensor, target: torch.Tensor, step: int) -> Forward:
        """Encode, reconstruct, and note which features fired."""
        pre = self.pre_activation(x)
        f = self.activation(pre)
        with mixed_precision(x.device):
            reconstruction = f @ self.W_dec
            if self.W_skip is not None:
                reconstruction = reconstruction + x @ self.W_skip.T
        residual = target - self.b_dec - reconstruction.float()
        self._note_firing(f.detach())
        variance = (target - target.mean(0)).square().sum(-1).mean()
        return Forward(step, x, target, pre, f, residual, variance, mean_square(residual) / variance)

    def pre_activation(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, d_sae]``."""
        with mixed_precision(x.device):
            product = (x if self.transcodes else x - self.b_dec) @ self.encoder()
        return product.float().add_(self.b_enc)  # in place, as there is no larger tensor

    def encoder(self) -> torch.Tensor:
        """``[d_in, d_sae]``."""
        return self.W_enc

    def dead(self) -> torch.Tensor:
        """Mask ``[d_sae]`` of features that have not fired for ``dead_after_rows`` rows."""
        return self.rows_since_fired > self.config.dead_after_rows

    @torch.no_grad()
    def _note_firing(self, f: torch.Tensor) -> None:
        self.rows_since_fired += len(f)
        self.rows_since_fired[f.amax(0) > 0] = 0

    @torch.no_grad()
    def keep_decoder_gradient_tangent(self) -> None:
        """Remove from the decoder's gradient what would only change row norms."""
        assert self.W_dec.grad is not None
        radial = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad -= radial * self.W_dec

    @torch.no_grad()
    def project(self) -> None:
        """Put the weights back to where they may be, after an optimiser step."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def mean_square(residual: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the squared norm."""
    return residual.square().sum(-1).mean()


def ramp(step: int, num_steps: int) -> float:
    """Rises from 0 to 1 in ``num_steps`` steps."""
    return min(1.0, (step + 1) / num_steps)


def _unit_rows(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)
