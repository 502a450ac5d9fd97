"""How tokens lie in the residual stream, by layer: their lengths, how much they point one way, in how many dimensions.

Angles and dimensions are of directions x / |x|: a few positions with massive norms would otherwise be all that is
seen. The first position, which is always one of them, is left out.

    participation ratio = (Σλ)² / Σλ²,  λ the eigenvalues of the directions' covariance: 1 for a line, d for a sphere
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerserve.circuits.forward import activations
from steerserve.circuits.lens import residual_sites
from steerserve.errors import InvalidRequestError
from steerserve.models.loading import LoadedModel

EXPLAINED = 0.9


@dataclass(frozen=True)
class LayerGeometry:
    """One site.

    Attributes:
        norm_median, norm_max: of |x|.
        mean_cosine: over all pairs of different positions; 0 if directions are spread evenly.
        participation_ratio: effective number of dimensions; at most the number of positions less one.
        dimensions_90: principal components that hold 90 % of the directions' variance.
        cosine_to_previous: mean cosine between a position's activation here and one layer before; None at the first.
    """

    site: str
    norm_median: float
    norm_max: float
    mean_cosine: float
    participation_ratio: float
    dimensions_90: int
    cosine_to_previous: float | None


@dataclass(frozen=True)
class Geometry:
    """All sites, over the same ``num_positions`` positions."""

    model: str
    texts: str
    num_positions: int
    layers: tuple[LayerGeometry, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def describe_layers(model: LoadedModel, name: str, tokens: torch.Tensor, real: torch.Tensor) -> Geometry:
    """The geometry of ``tokens`` ``[N, T]`` at the positions of the mask ``real``, without the first ones.

    Raises:
        InvalidRequestError: fewer than three positions.
    """
    counted = real.clone()
    counted[:, 0] = False
    num_positions = int(counted.sum())
    if num_positions < 3:
        raise InvalidRequestError("texts", f"{num_positions} positions behind the first", "at least 3")
    layers: list[LayerGeometry] = []
    previous: torch.Tensor | None = None
    for site, x in activations(model, tokens, residual_sites(model)).items():
        rows = x[counted].double()
        layers.append(describe(str(site), rows, previous))
        previous = rows
    return Geometry(model.name, name, num_positions, tuple(layers))


def describe(site: str, rows: torch.Tensor, previous: torch.Tensor | None = None) -> LayerGeometry:
    """The geometry of ``rows`` ``[n, d]`` float64, none of them zero; ``previous`` are theirs one layer before."""
    n = len(rows)
    norms = rows.norm(dim=1)
    directions = rows / norms[:, None]
    centred = directions - directions.mean(0)
    variance = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp(min=0)
    share = variance.cumsum(0) / variance.sum()
    along = None if previous is None else torch.cosine_similarity(rows, previous, dim=1).mean().item()
    return LayerGeometry(
        site=site,
        norm_median=norms.median().item(),
        norm_max=norms.max().item(),
        mean_cosine=((directions.sum(0).square().sum() - n) / (n * (n - 1))).item(),
        participation_ratio=(variance.sum().square() / variance.square().sum()).item(),
        dimensions_90=int((share < EXPLAINED).sum()) + 1,
        cosine_to_previous=along,
    )
