"""Features or directions at one site, in the kernel's terms, as tensors that values can be fitted through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from steerserve.sae.model import SAE
from steerserve.types import Op, Site

COLUMNS = ("W_enc", "b_enc", "threshold", "max_norm", "W_dec", "max_activation")
MIN_ACTIVATION = 1e-3
"""A feature that was hardly seen still has a scale."""


@dataclass(frozen=True, eq=False)
class SiteRows:
    """``k`` rows: f = pre if pre > threshold and |x| <= max_norm else 0, pre = x · W_enc + b_enc.

    Attributes:
        feature_ids: ``[k]`` dimensions of ``sae``; −1 for a direction or a probe.
        W_enc, W_dec: ``[k, d]`` float32; ``b_enc``, ``threshold``, ``max_norm``, ``max_activation`` are ``[k]``.
        sae: where features come from; None for directions.
    """

    site: Site
    feature_ids: tuple[int, ...]
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor
    max_norm: torch.Tensor
    W_dec: torch.Tensor
    max_activation: torch.Tensor
    sae: SAE | None = None

    @classmethod
    def of_sae(cls, sae: SAE, features: Sequence[int], max_activation: torch.Tensor) -> SiteRows:
        """Features of an SAE; ``max_activation`` is ``[k]``.

        Raises:
            IncompatibleError: an SAE whose features cannot be edited one by one.
        """
        W_enc, b_enc, threshold, max_norm, W_dec = sae.rows(features)
        largest = max_activation.float().clamp(min=MIN_ACTIVATION)
        return cls(sae.site, tuple(features), W_enc, b_enc, threshold, max_norm, W_dec, largest, sae)

    @classmethod
    def of_direction(
        cls, site: Site, reads: torch.Tensor, writes: torch.Tensor, bias: float = 0.0, max_norm: float = math.inf
    ) -> SiteRows:
        """One row that is always active: f = x · reads + bias; ``reads`` and ``writes`` are ``[d]``."""
        return cls(
            site=site,
            feature_ids=(-1,),
            W_enc=reads.float()[None],
            b_enc=torch.tensor([bias]),
            threshold=torch.tensor([-math.inf]),
            max_norm=torch.tensor([max_norm]),
            W_dec=writes.float()[None],
            max_activation=torch.ones(1),
        )

    def __len__(self) -> int:
        return len(self.feature_ids)

    def take(self, index: Sequence[int]) -> SiteRows:
        """Some of the rows, in the order of ``index``."""
        chosen: dict[str, Any] = {name: getattr(self, name)[list(index)] for name in COLUMNS}
        return replace(self, feature_ids=tuple(self.feature_ids[i] for i in index), **chosen)

    def joined(self, other: SiteRows) -> SiteRows:
        """The rows of both, which are of one site."""
        columns: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in COLUMNS}
        return replace(self, feature_ids=self.feature_ids + other.feature_ids, **columns)

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., k]`` f at ``x`` ``[..., d]``, float32."""
        pre = x.float() @ self.W_enc.T + self.b_enc
        return torch.where((pre > self.threshold) & self._defined(x), pre, 0.0)

    def _defined(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., k]`` where |x| is in the rows' domain."""
        defined: torch.Tensor = x.float().norm(dim=-1, keepdim=True) <= self.max_norm
        return defined

    def edited(self, x: torch.Tensor, op: Op, value: torch.Tensor) -> torch.Tensor:
        """x' = x + Σ (f' − f) W_dec, as a policy does it; differentiable in ``value`` ``[k]`` and the rows.

        ``op`` is CLAMP (where active), CLIP (where active, or a direction is defined) or ADD (everywhere).
        """
        f = self.activations(x)
        match op:
            case Op.CLAMP:
                edit = torch.where(f > 0, value - f, 0.0)
            case Op.CLIP:
                clipped = (f > 0) | (self.threshold.isneginf() & self._defined(x))
                edit = torch.where(clipped, (value - f).clamp(max=0), 0.0)
            case _:
                assert op is Op.ADD, op
                edit = value.expand_as(f)
        return (x.float() + edit @ self.W_dec).to(x.dtype)
