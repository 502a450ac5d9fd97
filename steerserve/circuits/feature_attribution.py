"""Which SAE features a behaviour rests on, to first order: a shortlist of features to clamp.

With g the gradient of a metric (larger is worse) at the SAE's site on the clean run, a feature j has two effects,
summed over positions, mean over prompts:

    removed = Σ −f_j · (g · W_dec[j])             the metric's rise if the feature were clamped to 0
    swapped = Σ (f'_j − f_j) · (g · W_dec[j])     if it took its value f' on the corrupted prompt (Marks et al. 2024)

Both are signed: a feature with a positive effect supports the behaviour, one with a negative effect works against it.
The first position, an attention sink that no SAE is made for, is left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import track

from steerserve.circuits.forward import BATCH_SIZE, activations, last_logits
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.prompts import PromptPairs
from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

KL = "kl"


@dataclass(frozen=True)
class AttributedFeature:
    """One feature: its two effects, and the share of clean prompts in which it is active."""

    id: int
    removed: float
    swapped: float
    active: float


@dataclass(frozen=True)
class FeatureAttribution:
    """The features of one SAE, the largest effect of their removal first.

    Attributes:
        total: first-order effect on the metric of swapping the whole activation.
        by_features: the part of ``total`` that goes through features; the rest is in what the SAE does not explain.
    """

    model: str
    sae: str
    sae_sha256: str
    site: str
    pairs: str
    num_pairs: int
    metric: str
    total: float
    by_features: float
    features: tuple[AttributedFeature, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def attribute_features(model: LoadedModel, sae: SAE, pairs: PromptPairs, metric: str, count: int) -> FeatureAttribution:
    """The ``count`` features with the largest |removed|.

    Raises:
        IncompatibleError: features of this SAE cannot be edited singly, so that there is nothing to clamp.
        InvalidRequestError: the metric is KL, which has no slope at the clean run.
    """
    if reason := sae.why_not_steerable():
        raise IncompatibleError("sae", sae.name, f"one whose features can be edited singly; {sae.name} {reason}")
    if metric == KL:
        others = ", ".join(name for name in METRICS if name != KL)
        raise InvalidRequestError("metric", metric, f"one with a slope at the clean run: {others}")
    sums = torch.zeros(3, sae.d_sae, dtype=torch.float64)
    total = 0.0
    for start in track(range(0, len(pairs), BATCH_SIZE), "attribution"):
        batch = pairs.take(range(start, min(start + BATCH_SIZE, len(pairs))))
        x, slope = _slopes(model, sae, batch, metric)
        other = activations(model, batch.corrupted, [sae.site])[sae.site]
        counted = batch.real.clone()
        counted[:, 0] = False
        sums += _effects(sae, x, other, slope, counted)
        total += ((other - x) * slope)[counted].sum().item()
    removed, swapped, active = sums / len(pairs)
    best = removed.abs().topk(min(count, sae.d_sae)).indices
    columns = (each[best].tolist() for each in (removed, swapped, active))
    return FeatureAttribution(
        model=model.name,
        sae=sae.name,
        sae_sha256=sae.sha256,
        site=str(sae.site),
        pairs=pairs.name,
        num_pairs=len(pairs),
        metric=metric,
        total=total / len(pairs),
        by_features=swapped.sum().item(),
        features=tuple(AttributedFeature(*each) for each in zip(best.tolist(), *columns, strict=True)),
    )


def _slopes(model: LoadedModel, sae: SAE, pairs: PromptPairs, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of the clean run and the gradient of the sum over prompts of the metric, ``[N, T, d]``."""
    seen: list[torch.Tensor] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().requires_grad_())
        return seen[0]

    with torch.enable_grad(), transformed(model, {sae.site: watch}):
        logits = last_logits(model, pairs.clean, pairs.last)
        value = METRICS[metric](pairs, logits).per_prompt(logits).sum()
        (slope,) = torch.autograd.grad(value, seen)
    return seen[0].detach(), slope


def _effects(
    sae: SAE, x: torch.Tensor, other: torch.Tensor, slope: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """``[3, d_sae]`` float64 sums over prompts: effect of removal, of swapping, number of prompts where active."""
    f, f_other = (sae.encode(each) * counted[..., None] for each in (x, other))
    slopes = slope.to(sae.W_dec.dtype) @ sae.W_dec.T
    active = (f > 0).any(1).sum(0)
    return torch.stack([(-f * slopes).sum((0, 1)).double(), ((f_other - f) * slopes).sum((0, 1)).double(), active])
