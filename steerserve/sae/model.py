"""The sparse autoencoder: its tensors and its equations.

    pre  = (x − b_dec) W_enc + b_enc          (without b_dec if not ``apply_b_dec_to_input``)
    f    = pre · 1[pre > threshold] · 1[|x| ≤ max_norm]
    x̂    = f W_dec + b_dec

ReLU has threshold 0, JumpReLU and BatchTopK their own. ``max_norm`` bounds the SAE's domain: it was not
trained on *massive activations* (attention sinks whose norm exceeds the others' a hundredfold), where
most of its features would fire at meaningless values. It is infinite unless the SAE's file states it.

A thresholded encode is exact on any subset of features, which is what makes serving cheap: a policy
over 8 features needs 8 encoder columns, not the whole matrix. ``W_enc`` therefore lies in memory feature
after feature, each column of it in one piece, whatever the strides of the tensor it was given as.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from steerserve.types import Site


@dataclass(frozen=True, eq=False)
class SAE:
    """A trained SAE at one site.

    Attributes:
        W_enc: ``[d_in, d_sae]``, the transpose of a contiguous tensor; ``b_enc`` and ``threshold`` are ``[d_sae]``.
        W_dec: ``[d_sae, d_in]``; ``b_dec`` is ``[d_in]``.
        max_norm: largest |x| that the SAE is defined on.
        max_activation: ``[d_sae]`` largest activation seen in evaluation, or None if not recorded.
        sha256: hash of the weight file; empty for an SAE that was not loaded from disk.
        metadata: the format's own extras (model name, training settings, evaluation).
    """

    name: str
    site: Site
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor
    apply_b_dec_to_input: bool = True
    max_norm: float = math.inf
    max_activation: torch.Tensor | None = None
    sha256: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "W_enc", self.W_enc.T.contiguous().T)

    @property
    def d_in(self) -> int:
        """Width of the activation it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations ``[..., d_sae]`` of ``x`` ``[..., d_in]``."""
        x = x.to(self.W_enc.dtype)
        pre = x @ self.W_enc + self.encoder_bias()
        inside = x.norm(dim=-1, keepdim=True) <= self.max_norm
        f: torch.Tensor = pre * ((pre > self.threshold) & inside)
        return f

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Reconstruction ``[..., d_in]`` of feature activations ``[..., d_sae]``."""
        return f @ self.W_dec + self.b_dec

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """The SAE's output ``[..., d_out]`` for ``x`` ``[..., d_in]``, in the units of ``out_site``."""
        return self.decode(self.encode(x))

    @property
    def out_site(self) -> Site:
        """Where the output belongs: ``site``, but for a transcoder."""
        return self.site

    def encoder_bias(self) -> torch.Tensor:
        """``[d_sae]`` b_enc with the subtraction of b_dec folded in."""
        return self._folded_bias

    @cached_property
    def _folded_bias(self) -> torch.Tensor:
        return self.b_enc - self.b_dec @ self.W_enc if self.apply_b_dec_to_input else self.b_enc

    def rows(self, features: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """What the kernels need of some features.

        Returns:
            W_enc ``[k, d_in]`` (row-major), b_enc ``[k]`` (b_dec folded in), threshold ``[k]``, max_norm ``[k]``,
            W_dec ``[k, d_in]``.
        """
        index = torch.as_tensor(features, dtype=torch.long)
        b_enc = self.encoder_bias()[index]
        max_norm = torch.full_like(b_enc, self.max_norm)
        return self.W_enc.T[index], b_enc, self.threshold[index], max_norm, self.W_dec[index]
