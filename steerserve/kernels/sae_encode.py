"""sae_encode: the active features of activations, as sparse rows.

The maths and the guarantees are in ``csrc/ops.h``. ``sae_encode`` is the operator, ``sae_encode_ref`` the same in
plain torch, ``SparseFeatures`` a place for what they write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.kernels.backend import Operator


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """Features of B activations; row n's are the first ``count[n]`` of ``indices[n]`` and ``values[n]``.

    It unpacks into the three arguments of the operators.
    """

    indices: Tensor
    """``[B, capacity]`` int32, ascending."""
    values: Tensor
    """``[B, capacity]`` float32."""
    count: Tensor
    """``[B]`` int32. −1: the activation is not finite, or a weight or threshold is NaN. Above the capacity: the true
    number, of which the first ``capacity`` are stored."""

    @classmethod
    def empty(cls, num_rows: int, capacity: int, device: torch.device | str = "cpu") -> SparseFeatures:
        """Room for at most ``capacity`` features a row, not initialised."""
        return cls(
            torch.empty(num_rows, capacity, dtype=torch.int32, device=device),
            torch.empty(num_rows, capacity, dtype=torch.float32, device=device),
            torch.empty(num_rows, dtype=torch.int32, device=device),
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.indices, self.values, self.count))

    def to_dense(self, d_sae: int) -> Tensor:
        """``[B, d_sae]`` float32; a row that is broken or did not fit is NaN."""
        num_rows, capacity = self.indices.shape
        known = (self.count >= 0) & (self.count <= capacity)
        used = torch.arange(capacity, device=known.device) < (self.count * known)[:, None]
        row, place = used.nonzero(as_tuple=True)
        dense = torch.zeros(num_rows, d_sae, device=known.device)
        dense.index_put_((row, self.indices[row, place].long()), self.values[row, place], accumulate=True)
        dense[~known] = torch.nan
        return dense


def sae_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    max_norm: float,
    k: int,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
) -> None:
    """Write each row's features with pre = x·W_enc + b_enc > threshold, or the k largest of them.

    Nothing is active where |x| > max_norm. Of equal values the one with the lower index is the larger. A row does not
    depend on the other rows or on the number of threads.

    Args:
        x: ``[B, d]`` float32 or bfloat16 (float16 too on a GPU), rows contiguous.
        W_enc: ``[d_sae, d]`` float32 or bfloat16, one feature a row: the transpose of what SAELens stores.
        b_enc: ``[d_sae]`` float32, with b_dec folded in where the SAE subtracts it from x.
        threshold: ``[d_sae]`` float32; 0 for ReLU.
        max_norm: the largest |x| that the SAE is defined on; infinity for no limit.
        k: 0 for no limit, else at most the capacity: the SAE is a TopK.
        indices: ``[B, capacity]`` int32. Written with ``values`` and ``count``: the fields of ``SparseFeatures``.
            What lies beyond a row's count is left as it is.
        values: ``[B, capacity]`` float32.
        count: ``[B]`` int32.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape, strides, device or range; the message names it. Nothing is
            written.
    """
    _sae_encode(x, W_enc, b_enc, threshold, max_norm, k, indices, values, count)


def sae_encode_ref(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    max_norm: float,
    k: int,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
) -> None:
    """``sae_encode`` in torch operators, on any device: same arguments, same results within rounding."""
    pre = x.float() @ W_enc.float().T + b_enc
    norm = torch.linalg.vector_norm(x.float(), dim=-1)
    write_active(pre, norm, threshold, max_norm, k, SparseFeatures(indices, values, count))


def write_active(
    pre: Tensor, norm: Tensor, threshold: Tensor, max_norm: float, k: int, features: SparseFeatures
) -> None:
    """Select from dense ``pre`` ``[B, d_sae]`` of rows of ``norm`` ``[B]`` and write what is active."""
    known = norm.isfinite() & ~(pre.isnan() | threshold.isnan()).any(-1)
    active = (pre > threshold) & ((norm <= max_norm) & known)[:, None]
    if k:
        ranked = torch.where(active, pre, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        active &= torch.zeros_like(active).scatter_(1, ranked[:, :k], True)
    row, index = active.nonzero(as_tuple=True)
    place = active.cumsum(-1)[row, index] - 1
    fits = place < features.indices.shape[1]
    row, index, place = row[fits], index[fits], place[fits]
    features.indices[row, place] = index.int()
    features.values[row, place] = pre[row, index]
    features.count.copy_(torch.where(known, active.sum(-1), -1))


_sae_encode = Operator(
    "sae_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, float max_norm, int k, "
    "Tensor(a!) indices, Tensor(b!) values, Tensor(c!) count) -> ()",
    workspace_for=lambda x, W_enc, *_: (x.shape[0], W_enc.shape[0]),
)
