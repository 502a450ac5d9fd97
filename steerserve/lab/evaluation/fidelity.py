"""How faithful an SAE is to its activation, and what the model loses when it is spliced in.

* L0: mean number of active features per token.
* FVU: |y − ŷ|² / |y − mean y|², summed over held-out tokens; y is the activation that the SAE's output ŷ stands for.
* ΔCE: rise of the model's cross-entropy (nats per token) when ŷ replaces y.
* CE recovered: 1 − ΔCE / (rise when the mean of y replaces y).

Positions outside of what the SAE is for (see ``splice``) count in no figure but the cross-entropies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

from steerserve.errors import AssetError
from steerserve.lab.evaluation.splice import Substitute, reconstruct, substituted
from steerserve.lab.tokens import pack_contexts
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

BATCH_SIZE = 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
L0_BINS = 40


@dataclass(frozen=True, eq=False)
class Fidelity:
    """The figures above.

    Attributes:
        num_active: ``[n]`` active features of each token that counts.
        fvu: of those tokens.
        ce_clean, ce_spliced, ce_mean_ablated: over all tokens.
        held_out_tokens: all tokens that were read.
    """

    num_active: torch.Tensor
    fvu: float
    ce_clean: float
    ce_spliced: float
    ce_mean_ablated: float
    held_out_tokens: int

    @property
    def l0(self) -> float:
        """Mean number of active features per token."""
        return self.num_active.double().mean().item()

    @property
    def delta_ce(self) -> float:
        """Nats per token that splicing costs."""
        return self.ce_spliced - self.ce_clean

    @property
    def ce_recovered(self) -> float | None:
        """None where replacing y by its mean costs nothing: there is nothing to recover."""
        lost = self.ce_mean_ablated - self.ce_clean
        return 1 - self.delta_ce / lost if lost > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the figures, and how L0 is distributed over tokens."""
        largest = int(self.num_active.max())
        width = math.ceil((largest + 1) / L0_BINS)  # a whole number: as many counts fall into each bin
        counts, edges = np.histogram(self.num_active.numpy(), bins=np.arange(0, largest + width + 1, width) - 0.5)
        quantiles = torch.quantile(self.num_active.double(), torch.tensor(QUANTILES, dtype=torch.float64))
        return {
            "l0": self.l0,
            "fvu": self.fvu,
            "ce_clean": self.ce_clean,
            "ce_spliced": self.ce_spliced,
            "ce_mean_ablated": self.ce_mean_ablated,
            "delta_ce": self.delta_ce,
            "ce_recovered": self.ce_recovered,
            "held_out_tokens": self.held_out_tokens,
            "excluded_share": 1 - len(self.num_active) / self.held_out_tokens,
            "l0_quantiles": {str(q): value for q, value in zip(QUANTILES, quantiles.tolist(), strict=True)},
            "l0_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }


def held_out_contexts(model: LoadedModel, texts: Iterable[str], context_length: int, max_tokens: int) -> torch.Tensor:
    """The first full contexts ``[n, context_length]`` of ``texts`` with at most ``max_tokens`` tokens in all.

    Raises:
        AssetError: there is not one.
    """
    contexts = list(islice(pack_contexts(model, texts, context_length), max_tokens // context_length))
    if not contexts:
        raise AssetError(f"the held-out texts, cut at {max_tokens} tokens, fill no context of {context_length}")
    return torch.stack(contexts)


@torch.inference_mode()
def measure_fidelity(model: LoadedModel, sae: SAE, contexts: torch.Tensor) -> Fidelity:
    """Measure ``sae`` on held-out ``contexts`` ``[n, T]``.

    Raises:
        AssetError: an activation is not finite, or all are the same.
    """
    sums = _Sums(sae)
    clean = _cross_entropy(model, sae, contexts, lambda x, y: y, "cross-entropy, clean")
    spliced = _cross_entropy(model, sae, contexts, sums.reconstruct, "cross-entropy, spliced")
    fvu, mean = sums.fvu(), sums.mean().float()
    ablated = _cross_entropy(model, sae, contexts, lambda x, y: mean.expand_as(y), "cross-entropy, mean-ablated")
    return Fidelity(torch.cat(sums.num_active), fvu, clean, spliced, ablated, contexts.numel())


class _Sums:
    """Replaces y by ŷ, and adds up what L0 and FVU need: the spliced run reads the same y as the clean one."""

    def __init__(self, sae: SAE) -> None:
        self.num_active: list[torch.Tensor] = []
        self._sae = sae
        self._total = torch.zeros(sae.d_out, dtype=torch.float64)
        self._squares = self._error = 0.0
        self._num_rows = 0

    def reconstruct(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y_hat, num_active = reconstruct(self._sae, x)
        self.num_active.append(num_active)
        self._total += y.sum(0)
        self._squares += y.double().square().sum().item()
        self._error += (y - y_hat).double().square().sum().item()
        self._num_rows += len(y)
        return y_hat

    def mean(self) -> torch.Tensor:
        """``[d_out]`` float64."""
        return self._total / max(self._num_rows, 1)

    def fvu(self) -> float:
        variance = self._squares - self._num_rows * self.mean().square().sum().item()
        if variance <= 1e-9 * self._squares:
            raise AssetError(
                f"the {self._num_rows} activations at {self._sae.out_site} that count do not vary: "
                "the held-out texts hold too little, or the model is broken"
            )
        return self._error / variance


def _cross_entropy(model: LoadedModel, sae: SAE, contexts: torch.Tensor, substitute: Substitute, title: str) -> float:
    """Mean next-token cross-entropy with ``substitute`` applied wherever the SAE is defined."""
    total = 0.0
    for tokens in track(contexts.long().split(BATCH_SIZE), title):
        with transformed(model, substituted(sae, substitute)):
            logits = model.model(tokens, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return total / contexts[:, 1:].numel()
