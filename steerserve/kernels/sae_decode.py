"""sae_decode: reconstruct activations from sparse features.

The maths is in ``csrc/ops.h``. ``sae_decode`` is the operator, ``sae_decode_ref`` the same in plain torch.
"""

from __future__ import annotations

from torch import Tensor

from steerserve.kernels.backend import Operator
from steerserve.kernels.sae_encode import SparseFeatures


def sae_decode(indices: Tensor, values: Tensor, count: Tensor, W_dec: Tensor, b_dec: Tensor, out: Tensor) -> None:
    """Write out = Σ_j values_j · W_dec[indices_j] + b_dec per row, summed in float32.

    A row does not depend on the other rows or on the number of threads.

    Args:
        indices: ``[B, capacity]`` int32; with ``values`` and ``count`` the fields of ``SparseFeatures``. An index may
            occur twice: its values add up.
        values: ``[B, capacity]`` float32.
        count: ``[B]`` int32. A row whose count is negative or above the capacity is not known: its output is NaN.
        W_dec: ``[d_sae, d]`` float32 or bfloat16.
        b_dec: ``[d]`` float32.
        out: ``[B, d]`` float32 or bfloat16 (float16 too on a GPU), rows contiguous. Written.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape, strides, device or range; the message names it. Nothing is
            written. On a GPU elements are not looked at: an index outside of ``W_dec`` makes its row NaN.
    """
    _sae_decode(indices, values, count, W_dec, b_dec, out)


def sae_decode_ref(indices: Tensor, values: Tensor, count: Tensor, W_dec: Tensor, b_dec: Tensor, out: Tensor) -> None:
    """``sae_decode`` in torch operators, on any device: same arguments, same results within rounding."""
    f = SparseFeatures(indices, values, count).to_dense(W_dec.shape[0])
    out.copy_(f @ W_dec.float() + b_dec)


_sae_decode = Operator(
    "sae_decode(Tensor indices, Tensor values, Tensor count, Tensor W_dec, Tensor b_dec, Tensor(a!) out) -> ()",
)
