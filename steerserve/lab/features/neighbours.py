"""Features that belong together: by when they fire, and by what they write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from rich.progress import track

FEATURES_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Of each feature the k others that are most like it: ``ids`` and ``likeness`` ``[F, k]``, descending."""

    ids: torch.Tensor
    likeness: torch.Tensor


def correlated(activations: scipy.sparse.csr_array, features: torch.Tensor, k: int) -> Neighbours:
    """Others with the largest Pearson correlation over the positions of ``activations`` ``[m, d_sae]``.

    Positions where neither fires count. A feature that never fires there has correlation 0 with all.
    """
    num_positions = activations.shape[0]
    mean = np.asarray(activations.mean(axis=0)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(activations.power(2).mean(axis=0)).ravel() - mean**2, 0))
    columns = activations.tocsc()

    def correlation(chosen: torch.Tensor) -> torch.Tensor:
        ids = chosen.numpy()
        products = (columns[:, ids].T @ activations).toarray() / num_positions
        spread = np.outer(deviation[ids], deviation)
        centred = products - np.outer(mean[ids], mean)
        return torch.from_numpy(np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0))

    return _most_alike(features, k, "correlation", correlation)


def nearest(W_dec: torch.Tensor, features: torch.Tensor, k: int) -> Neighbours:
    """Others with the largest cosine between decoder rows ``[d_sae, d_out]``."""
    directions = F.normalize(W_dec.float(), dim=1)
    return _most_alike(features, k, "decoder cosine", lambda chosen: directions[chosen] @ directions.T)


def _most_alike(
    features: torch.Tensor, k: int, title: str, likeness: Callable[[torch.Tensor], torch.Tensor]
) -> Neighbours:
    """``likeness`` of some features to all, ``[n, d_sae]``, is asked for in parts; none is its own neighbour."""
    values, ids = [], []
    for chosen in track(features.split(FEATURES_AT_ONCE), title):
        alike = likeness(chosen)
        alike[torch.arange(len(chosen)), chosen] = -torch.inf
        best = alike.topk(min(k, alike.shape[1] - 1), dim=1)
        values.append(best.values)
        ids.append(best.indices)
    return Neighbours(torch.cat(ids), torch.cat(values))
