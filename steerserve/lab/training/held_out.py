"""L0 and FVU of finished SAEs on rows that they were not trained on, encoded as they will be served."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerserve.lab.store import Pair
from steerserve.sae.model import SAE

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class HeldOutFigures:
    """Over ``num_rows`` rows.

    Attributes:
        l0: mean number of active features per row.
        fvu: Σ |y − ŷ|² / Σ |y − mean y|².
        dead_share: share of features that are active on none of the rows.
    """

    l0: float
    fvu: float
    dead_share: float
    num_rows: int


@torch.inference_mode()
def held_out_figures(sae: SAE, rows: Pair) -> HeldOutFigures:
    """Measure ``sae`` on ``rows``, which are of ``sae.site`` and ``sae.out_site``; sums are in float64."""
    x, target = rows
    num_active, unexplained = torch.zeros(sae.d_sae, dtype=torch.long), 0.0
    for part, wanted in zip(x.split(ROWS_AT_ONCE), target.split(ROWS_AT_ONCE), strict=True):
        f = sae.encode(part)
        num_active += (f > 0).sum(0)
        unexplained += (wanted - sae.decode(f, part)).double().square().sum().item()
    variance = (target.double() - target.double().mean(0)).square().sum().item()
    return HeldOutFigures(
        l0=num_active.sum().item() / len(x),
        fvu=unexplained / variance,
        dead_share=(num_active == 0).float().mean().item(),
        num_rows=len(x),
    )
