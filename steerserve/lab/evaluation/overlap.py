"""How many features two SAEs share, as two seeds of one training should if the features were in the model.

The live features of both are matched one to one so that the sum of the cosines of their decoder rows is largest
(Hungarian algorithm; Paulo & Belrose 2025). A feature is *shared* if that cosine is at least 0.7.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from steerserve.errors import AssetError, IncompatibleError
from steerserve.lab.evaluation.features import feature_stats, harvested_rows
from steerserve.sae.model import SAE

SHARED_COSINE = 0.7
HISTOGRAM_BINS = 40


@dataclass(frozen=True, eq=False)
class Overlap:
    """Pairs of matched features, ``m`` = the smaller number of live ones.

    Attributes:
        live: number of live features of each SAE.
        pairs: ``[m, 2]`` feature of the first and of the second.
        decoder_cosine, encoder_cosine: ``[m]``.
        nearest: ``[live features of the first]`` the largest decoder cosine, whoever else has it.
        correlation: ``[m]`` Pearson's, of the activations over ``num_tokens``; NaN where one does not vary there. None
            without activations.
    """

    live: tuple[int, int]
    pairs: torch.Tensor
    decoder_cosine: torch.Tensor
    encoder_cosine: torch.Tensor
    nearest: torch.Tensor
    correlation: torch.Tensor | None = None
    num_tokens: int = 0

    @property
    def shared(self) -> torch.Tensor:
        """``[m]`` whether a pair is one feature in both."""
        return self.decoder_cosine >= SHARED_COSINE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; shares are of the matched pairs."""
        counts, edges = np.histogram(self.decoder_cosine.numpy(), bins=HISTOGRAM_BINS, range=(-1, 1))
        both = self.shared & (self.encoder_cosine >= SHARED_COSINE)
        figures: dict[str, Any] = {
            "live_features": list(self.live),
            "matched": len(self.pairs),
            "shared_share": self.shared.double().mean().item(),
            "shared_by_encoder_too": both.double().mean().item(),
            "mean_decoder_cosine": self.decoder_cosine.mean().item(),
            "median_decoder_cosine": self.decoder_cosine.median().item(),
            "mean_nearest_cosine": self.nearest.mean().item(),
            "mean_encoder_cosine": self.encoder_cosine.mean().item(),
            "shared_cosine": SHARED_COSINE,
            "cosine_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }
        if self.correlation is not None:
            figures["correlation_tokens"] = self.num_tokens
            for name, chosen in (("shared", self.shared), ("other", ~self.shared)):
                value = self.correlation[chosen].nanmean().item()
                figures[f"mean_correlation_{name}"] = None if np.isnan(value) else value
        return figures


def match_features(first: SAE, second: SAE, live: tuple[torch.Tensor, torch.Tensor]) -> Overlap:
    """Match the features that ``live`` ``[d_sae]`` of each SAE says are alive.

    Takes memory for two matrices of live × live numbers, and time that grows with the third power of their number.

    Raises:
        IncompatibleError: the SAEs have other widths, or record other models.
        AssetError: one of them has no live feature.
    """
    from scipy.optimize import linear_sum_assignment

    check_comparable(first, second)
    ids = [mask.nonzero().squeeze(1) for mask in live]
    for sae, alive in zip((first, second), ids, strict=True):
        if not len(alive):
            raise AssetError(f"{sae.name} has no live feature to match")
    cosine = _cosines(first.W_dec[ids[0]], second.W_dec[ids[1]])
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cosine.numpy(), maximize=True))
    pairs = torch.stack([ids[0][rows], ids[1][columns]], dim=1)
    encoders = first.W_enc.T[pairs[:, 0]], second.W_enc.T[pairs[:, 1]]
    return Overlap(
        live=(len(ids[0]), len(ids[1])),
        pairs=pairs,
        decoder_cosine=cosine[rows, columns],
        encoder_cosine=F.cosine_similarity(*encoders),
        nearest=cosine.amax(1),
    )


@torch.inference_mode()
def pair_correlations(
    first: SAE, second: SAE, pairs: torch.Tensor, harvest: Path, max_tokens: int
) -> tuple[torch.Tensor, int]:
    """Pearson correlation ``[m]`` of the activations of each of ``pairs`` over a harvest, and over how many tokens.

    NaN where one of the two does not vary.

    Raises:
        AssetError: the harvest lacks a site, or holds activations that are not finite.
    """
    sums = torch.zeros(5, len(pairs), dtype=torch.float64)  # of a, b, a², b², ab
    count = 0
    for x, y in harvested_rows(harvest, (first.site, second.site), max_tokens, "correlation"):
        a, b = first.encode(x)[:, pairs[:, 0]].double(), second.encode(y)[:, pairs[:, 1]].double()
        sums += torch.stack([term.sum(0) for term in (a, b, a * a, b * b, a * b)])
        count += len(x)
    mean_a, mean_b, square_a, square_b, product = sums / count
    variances = (square_a - mean_a.square()).clamp(min=0) * (square_b - mean_b.square()).clamp(min=0)
    return ((product - mean_a * mean_b) / variances.sqrt()).masked_fill(variances == 0, torch.nan), count


def live_features(sae: SAE, harvest: Path | None, max_tokens: int) -> torch.Tensor:
    """Mask ``[d_sae]`` of features that fire in a harvest; without one, of those with a recorded activation, or all."""
    if harvest is not None:
        return feature_stats(sae, harvest, max_tokens).density > 0
    return torch.ones(sae.d_sae, dtype=torch.bool) if sae.max_activation is None else sae.max_activation > 0


def check_comparable(first: SAE, second: SAE) -> None:
    """Refuse SAEs of other widths, or that record other models; raises IncompatibleError."""
    if first.d_out != second.d_out or first.d_in != second.d_in:
        widths = f"the widths of {first.name}, {first.d_in} and {first.d_out}"
        raise IncompatibleError(f"{second.name}: d_in, d_out", (second.d_in, second.d_out), widths)
    prints = [sae.metadata.get("model_fingerprint") for sae in (first, second)]
    if None not in prints and prints[0] != prints[1]:
        raise IncompatibleError(
            f"{second.name}: metadata.model_fingerprint", prints[1], f"that of {first.name}, {prints[0]}"
        )


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[n, m]`` of the rows of ``a`` ``[n, d]`` and ``b`` ``[m, d]``; 0 with a row of zeros."""
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).clamp(-1, 1)  # rounding goes beyond
