"""Run a model with an SAE's output in the place of the activation, through the kernel of reconstruct mode.

The kernel computes every SAE that needs nothing of x but its features. What it cannot express (run-time
normalisation, a skip connection, a transcoder) is computed by ``SAE.encode`` and ``SAE.decode``.

Positions outside of what an SAE is for keep their own activation: those with massive activations (see
``activations``), and those beyond the SAE's ``max_norm``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from steerserve.errors import AssetError
from steerserve.kernels.sae_encode import SparseFeatures
from steerserve.kernels.sae_splice import sae_splice_
from steerserve.kernels.steer_delta import Normalization
from steerserve.lab.activations import ordinary_rows
from steerserve.models.hooks import SiteFunction
from steerserve.sae.model import SAE
from steerserve.types import Site

FEATURES_AT_ONCE = 2**22
"""Features, active or not, of the rows that one call encodes: bounds memory, however wide the SAE."""

Substitute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From rows ``[n, d_in]`` at ``sae.site`` and ``[n, d_out]`` at ``sae.out_site`` to what goes on ``[n, d_out]``."""


def reconstruct(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ ``[n, d_out]`` float32 and the number of active features ``[n]`` of finite rows ``x`` ``[n, d_in]``."""
    compute = _by_kernel if kernel_computes(sae) else _by_formula
    parts = [compute(sae, rows) for rows in x.float().split(max(1, FEATURES_AT_ONCE // sae.d_sae))]
    return torch.cat([x_hat for x_hat, _ in parts]), torch.cat([count for _, count in parts])


def kernel_computes(sae: SAE) -> bool:
    """Whether the kernel computes all that ``sae`` does."""
    return not sae.normalises and sae.W_skip is None and sae.transcodes_to is None


def substituted(sae: SAE, substitute: Substitute) -> dict[Site, SiteFunction]:
    """Functions for ``hooks.transformed`` that put ``substitute(x, y)`` in the place of y wherever the SAE applies."""
    read: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        read[:] = [x]
        return x

    def replace(y: torch.Tensor) -> torch.Tensor:
        x = read.pop()
        rows = domain(sae, x, y)
        result = y.clone()
        result[rows] = substitute(x[rows].float(), y[rows].float()).to(y.dtype)
        return result

    if sae.site == sae.out_site:
        return {sae.site: lambda x: replace(keep(x))}
    return {sae.site: keep, sae.out_site: replace}


def domain(sae: SAE, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mask ``[B, T]`` of the positions on which the SAE is defined, of ``x`` at its site and ``y`` at its output's.

    Raises:
        AssetError: an activation is not finite.
    """
    check_finite(x, sae.site)
    check_finite(y, sae.out_site)
    inside: torch.Tensor = x.float().norm(dim=-1) <= sae.max_norm
    return inside & ordinary_rows(x) & ordinary_rows(y)


def check_finite(x: torch.Tensor, site: Site) -> None:
    """Raise AssetError if an activation of ``x`` ``[B, T, d]`` is NaN or infinite."""
    broken = ~x.isfinite().all(dim=-1)
    if broken.any():
        context = int(broken.any(dim=1).nonzero()[0])
        raise AssetError(
            f"the activation at {site} is not finite in context {context} of its batch: "
            "the model's weights are damaged, or its numbers overflow"
        )


def _by_kernel(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_hat, num_rows = x.clone(), len(x)
    features = SparseFeatures.empty(num_rows, sae.d_sae)  # a row that did not fit would be left as it is
    no_edits = torch.empty(0)
    sae_splice_(
        x_hat,
        rows=torch.arange(num_rows, dtype=torch.int32),
        ptr=torch.zeros(num_rows + 1, dtype=torch.int32),
        feature=no_edits.int(),
        op=no_edits.to(torch.uint8),
        value=no_edits,
        W_enc=sae.W_enc.T,
        b_enc=sae.encoder_bias(),
        threshold=sae.threshold,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        max_norm=sae.max_norm,
        normalization=Normalization.NONE,
        k=sae.k or 0,
        indices=features.indices,
        values=features.values,
        count=features.count,
        activation=torch.empty(0),
        edit=torch.empty(0),
        x_norm=torch.empty(num_rows),
    )
    return x_hat, features.count.long()


def _by_formula(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    f = sae.encode(x)
    return sae.decode(f, x), (f > 0).sum(-1)
