"""What an SAE is worth: sparsity, reconstruction, and what the model loses when it is spliced in.

* L0: mean number of active features per token.
* FVU: |x − x̂|² / |x − mean x|², summed over held-out tokens.
* ΔCE: rise of the model's cross-entropy (nats per token) when x̂ replaces x at the site.
* CE recovered: 1 − ΔCE / (rise when the mean activation replaces x).
* dead share: features that fire on none of the tokens looked at.

Positions with massive activations are outside of what the SAE is for (see ``activations``): they
are left as they are and count in no figure but the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, ordinary_rows, pack_contexts
from steerserve.lab.store import ActivationStore
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

BATCH_SIZE = 16
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class SAEEvaluation:
    """The figures above, and over how many tokens they were taken."""

    l0: float
    fvu: float
    ce_clean: float
    ce_spliced: float
    ce_mean_ablated: float
    delta_ce: float
    ce_recovered: float
    held_out_tokens: int
    dead_share: float
    density_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Over a harvest: ``density[d_sae]`` share of tokens on which each feature fires, and its largest value."""

    density: torch.Tensor
    max_activation: torch.Tensor
    num_tokens: int


@torch.inference_mode()
def feature_stats(sae: SAE, harvest: Path, max_tokens: int) -> FeatureStats:
    """Density and largest activation of every feature over the first ``max_tokens`` rows of a harvest."""
    store = ActivationStore(harvest, sae.site, seed=0)
    fired = torch.zeros(sae.d_sae, dtype=torch.long)
    largest = torch.zeros(sae.d_sae)
    count = 0
    for number in track(range(len(store.manifest.shards)), "density"):
        for rows in store.shard(number).split(ROWS_AT_ONCE):
            f = sae.encode(rows[: max_tokens - count])
            fired += (f > 0).sum(0)
            largest = torch.maximum(largest, f.amax(0))
            count += len(f)
            if count >= max_tokens:
                return FeatureStats(fired / count, largest, count)
    return FeatureStats(fired / count, largest, count)


def evaluate_sae(
    model: LoadedModel, sae: SAE, texts: Iterable[str], stats: FeatureStats, context_length: int, max_tokens: int
) -> SAEEvaluation:
    """Evaluate ``sae`` on held-out ``texts``; ``stats`` supplies the share of dead features.

    Raises:
        AssetError: texts or ``max_tokens`` do not fill one context.
    """
    contexts = list(islice(pack_contexts(model, texts, context_length), max_tokens // context_length))
    if not contexts:
        raise AssetError(f"the held-out texts, cut at {max_tokens} tokens, fill no context of {context_length}")
    batches = torch.stack(contexts).split(BATCH_SIZE)
    l0, fvu, mean = _reconstruction(model, sae, batches)
    clean = _cross_entropy(model, sae, batches, lambda x: x, "cross-entropy, clean")
    spliced = _cross_entropy(model, sae, batches, lambda x: sae.decode(sae.encode(x)), "cross-entropy, spliced")
    ablated = _cross_entropy(model, sae, batches, lambda x: mean.expand_as(x), "cross-entropy, mean-ablated")
    return SAEEvaluation(
        l0=l0,
        fvu=fvu,
        ce_clean=clean,
        ce_spliced=spliced,
        ce_mean_ablated=ablated,
        delta_ce=spliced - clean,
        ce_recovered=(ablated - spliced) / (ablated - clean),
        held_out_tokens=len(contexts) * context_length,
        dead_share=(stats.density == 0).float().mean().item(),
        density_tokens=stats.num_tokens,
    )


@torch.inference_mode()
def _reconstruction(
    model: LoadedModel, sae: SAE, batches: tuple[torch.Tensor, ...]
) -> tuple[float, float, torch.Tensor]:
    """L0, FVU, and the mean activation ``[d]``."""
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    squares = error = active = count = 0.0
    for tokens in track(batches, "reconstruction"):
        x = activations_of(model, tokens, (sae.site,))[sae.site]
        x = x[ordinary_rows(x)].float()
        f = sae.encode(x)
        total += x.sum(0)
        squares += x.square().sum().item()
        error += (x - sae.decode(f)).square().sum().item()
        active += (f > 0).sum().item()
        count += len(x)
    mean = total / count
    variance = squares - count * mean.square().sum().item()
    return active / count, error / variance, mean.float()


@torch.inference_mode()
def _cross_entropy(
    model: LoadedModel,
    sae: SAE,
    batches: tuple[torch.Tensor, ...],
    replace: Callable[[torch.Tensor], torch.Tensor],
    title: str,
) -> float:
    """Mean next-token cross-entropy with ``replace`` applied to the ordinary rows of the site."""

    def splice(x: torch.Tensor) -> torch.Tensor:
        keep = ordinary_rows(x)
        result = x.clone()
        result[keep] = replace(x[keep].float()).to(x.dtype)
        return result

    total = count = 0.0
    for tokens in track(batches, title):
        with transformed(model, {sae.site: splice}):
            logits = model.model(tokens.long(), use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].long().flatten(), reduction="sum").item()
        count += tokens[:, 1:].numel()
    return total / count
