"""The sparse autoencoder: its tensors and its equations.

    z    = normalised(x)                        (x itself unless the SAE normalises at run time)
    pre  = (z − b_dec) W_enc + b_enc            (without b_dec if not ``apply_b_dec_to_input``)
    f    = pre · 1[pre > threshold] · 1[|x| ≤ max_norm] · 1[pre among the k largest]   (the last for TopK alone)
    x̂    = denormalised(f W_dec + b_dec) + W_skip x

ReLU has threshold 0, JumpReLU and BatchTopK their own; gated SAEs become JumpReLU when they are loaded.
A *transcoder* writes to another site than it reads: x̂ stands for the activation there, has ``d_out``
entries and is never denormalised, since what was taken off belongs to the site that was read.

``max_norm`` bounds the SAE's domain: it was not trained on *massive activations* (attention sinks whose
norm exceeds the others' a hundredfold), where most of its features would fire at meaningless values. It is
infinite unless the SAE's file states it.

A thresholded encode is exact on any subset of features, which is what makes serving cheap: a policy
over 8 features needs 8 encoder columns, not the whole matrix. ``W_enc`` therefore lies in memory feature
after feature, each column of it in one piece, whatever the strides of the tensor it was given as.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch

from steerserve.errors import IncompatibleError
from steerserve.types import Site, Stream

LAYER_NORM_EPS = 1e-5


class Normalisation(StrEnum):
    """What happens to every activation before it is encoded; the values are SAELens' names."""

    NONE = "none"
    LAYER_NORM = "layer_norm"
    """(x − mean) / (std + 1e-5), std with Bessel's correction; undone by · std + mean."""
    CONSTANT_NORM_RESCALE = "constant_norm_rescale"
    """x · √d / |x|; undone by · |x| / √d."""

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised ``x`` ``[..., d]``; mean and scale ``[..., 1]`` that undo it as z · scale + mean.

        A row of zeros stays one.
        """
        if self is Normalisation.LAYER_NORM:
            mean = x.mean(dim=-1, keepdim=True)
            std = x.std(dim=-1, keepdim=True)
            return (x - mean) / (std + LAYER_NORM_EPS), mean, std
        scale = torch.ones_like(x[..., :1])
        if self is Normalisation.CONSTANT_NORM_RESCALE:
            scale = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            x = x / scale.clamp(min=torch.finfo(x.dtype).tiny)
        return x, torch.zeros_like(scale), scale


@dataclass(frozen=True, eq=False)
class SAE:
    """A trained SAE.

    Attributes:
        site: where it reads, and where its output belongs unless ``transcodes_to`` says otherwise.
        W_enc: ``[d_in, d_sae]``, the transpose of a contiguous tensor; ``b_enc`` and ``threshold`` are ``[d_sae]``.
        W_dec: ``[d_sae, d_out]``; ``b_dec`` is ``[d_out]``.
        max_norm: largest |x| that the SAE is defined on.
        max_activation: ``[d_sae]`` largest activation seen in evaluation, or None if not recorded.
        sha256: hash of all that decides what it computes: weight file, equations, sites; empty if not from disk.
        metadata: the format's own extras (model name, training settings, evaluation).
        k: number of features that a TopK SAE keeps; None for a thresholded one.
        W_skip: ``[d_out, d_in]``, or None.
        transcodes_to: a transcoder's output site.
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
    k: int | None = None
    normalisation: Normalisation = Normalisation.NONE
    W_skip: torch.Tensor | None = None
    transcodes_to: Site | None = None

    def __post_init__(self) -> None:
        assert not (self.transcodes_to and self.apply_b_dec_to_input), "a transcoder's b_dec belongs to its output"
        object.__setattr__(self, "W_enc", self.W_enc.T.contiguous().T)

    @property
    def d_in(self) -> int:
        """Width of the activation it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of its output; ``d_in`` but for a transcoder."""
        return self.W_dec.shape[1]

    @property
    def out_site(self) -> Site:
        """Where the output belongs: ``site``, but for a transcoder."""
        return self.transcodes_to or self.site

    @property
    def normalises(self) -> bool:
        """Whether it normalises every activation at run time."""
        return self.normalisation is not Normalisation.NONE

    @property
    def is_thresholded(self) -> bool:
        """Whether each feature is active or not by itself, whatever the others are."""
        return self.k is None

    def why_not_steerable(self) -> str | None:
        """What keeps single features from being edited while the model runs; None if nothing does."""
        if self.k is not None:
            return f"is a TopK SAE (k = {self.k}), in which a feature's activation depends on all the others"
        if self.normalises:
            return f"normalises each activation by itself ({self.normalisation}), which a policy over rows cannot"
        if self.transcodes_to is not None:
            return f"is a transcoder: it reads {self.site} and writes {self.transcodes_to}"
        if self.W_skip is not None:
            return "has a skip connection from its input to its output"
        if self.site.stream is Stream.MLP_IN:
            return f"reads {self.site}, which can be read and not edited"
        return None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations ``[..., d_sae]`` of ``x`` ``[..., d_in]``."""
        x = x.to(self.W_enc.dtype)
        z = self.normalisation.of(x)[0] if self.normalises else x
        pre = z @ self.W_enc + self.encoder_bias()
        active = (pre > self.threshold) & (x.norm(dim=-1, keepdim=True) <= self.max_norm)
        if self.k is not None:
            active &= torch.zeros_like(active).scatter_(-1, pre.topk(self.k, dim=-1).indices, True)
        f: torch.Tensor = pre * active
        return f

    def decode(self, f: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Output ``[..., d_out]`` of feature activations ``f`` ``[..., d_sae]``, in the units of ``out_site``.

        ``x`` ``[..., d_in]``, which they were read from, is needed with run-time normalisation or a skip connection.
        """
        out = f @ self.W_dec + self.b_dec
        if self.normalises and not self.transcodes_to:
            _, mean, scale = self.normalisation.of(self._source(x))
            out = out * scale + mean
        return out if self.W_skip is None else out + self._source(x) @ self.W_skip.T

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """The SAE's output ``[..., d_out]`` for ``x`` ``[..., d_in]``, in the units of ``out_site``."""
        return self.decode(self.encode(x), x)

    def _source(self, x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None, "this SAE's output depends on x beyond its features"
        return x.to(self.W_enc.dtype)

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

        Raises:
            IncompatibleError: rows do not say all that the SAE does; see ``why_not_steerable``.
        """
        if reason := self.why_not_steerable():
            raise IncompatibleError("sae", self.name, f"one whose features can be edited singly; {self.name} {reason}")
        index = torch.as_tensor(features, dtype=torch.long)
        b_enc = self.encoder_bias()[index]
        max_norm = torch.full_like(b_enc, self.max_norm)
        return self.W_enc.T[index], b_enc, self.threshold[index], max_norm, self.W_dec[index]
