"""sae_splice: replace activations by their reconstruction from edited features, in place.

The maths and the guarantees are in ``csrc/ops.h``. ``sae_splice_`` is the operator, ``sae_splice_ref_`` the same in
plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerserve.kernels.backend import Operator
from steerserve.kernels.sae_encode import SparseFeatures, write_active
from steerserve.kernels.steer_delta import Normalization, edit_of, normalization_scales


def sae_splice_(
    x: Tensor,
    rows: Tensor,
    ptr: Tensor,
    feature: Tensor,
    op: Tensor,
    value: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    max_norm: float,
    normalization: int,
    k: int,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
    activation: Tensor,
    edit: Tensor,
    x_norm: Tensor,
) -> None:
    """Set some rows of ``x`` to s·(Σ_j f'_j · W_dec[j] + b_dec) + μ, with f' the encoded row after its own edits.

    Row ``rows[i]`` has the edits ``ptr[i] : ptr[i + 1]``; edits of one feature add up, each seeing the unedited f.
    Beyond ``max_norm`` f is 0 and only s·Σ_j (f'_j − f_j) · W_dec[j] is added to the row. A row that is not finite, or
    has more than ``capacity`` active features, is left alone. A row's result does not depend on the contents of the
    other rows or on the number of threads.

    Args:
        x: ``[N, d]`` float32 or bfloat16 (float16 too on a GPU), rows contiguous. Edited.
        rows: ``[R]`` int32, ascending and distinct; no other row of ``x`` is read or written.
        ptr: ``[R + 1]`` int32, ascending from 0 to at most nnz; entries beyond its end are spare room.
        feature: ``[nnz]`` int32, row of the SAE.
        op: ``[nnz]`` uint8, an ``OpCode``.
        value: ``[nnz]`` float32, finite; the operand.
        W_enc: ``[d_sae, d]`` float32 or bfloat16, one feature a row; under ``LAYER_NORM`` its rows must be centred.
        b_enc: ``[d_sae]`` float32.
        threshold: ``[d_sae]`` float32, not NaN.
        W_dec: ``[d_sae, d]``, of the dtype of ``W_enc``.
        b_dec: ``[d]`` float32.
        max_norm: the largest |x| that the SAE is defined on; infinity for no limit.
        normalization: a ``Normalization``; it gives s, and μ = mean(x) under ``LAYER_NORM``, else 0.
        k: 0 for no limit, else at most the capacity: the SAE is a TopK.
        indices: ``[R, capacity]`` int32. Written with ``values`` and ``count``: what ``sae_encode`` writes, before
            any edit.
        values: ``[R, capacity]`` float32.
        count: ``[R]`` int32.
        activation: ``[nnz]`` float32. Written: f; NaN where the row was left alone.
        edit: ``[nnz]`` float32. Written: f' − f; 0 where f is not finite.
        x_norm: ``[R]`` float32. Written: |x| before the splice.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape, strides, device or range; the message names it. Nothing is
            written. On a GPU elements are not looked at: a bad index or operand makes its activation NaN and edits
            nothing, a bad row or offset gives count −1.
    """
    _sae_splice(
        x, rows, ptr, feature, op, value, W_enc, b_enc, threshold, W_dec, b_dec, max_norm, normalization, k,
        indices, values, count, activation, edit, x_norm,
    )  # fmt: skip


def sae_splice_ref_(
    x: Tensor,
    rows: Tensor,
    ptr: Tensor,
    feature: Tensor,
    op: Tensor,
    value: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    max_norm: float,
    normalization: int,
    k: int,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
    activation: Tensor,
    edit: Tensor,
    x_norm: Tensor,
) -> None:
    """``sae_splice_`` in torch operators, on any device: same arguments, same results within rounding."""
    seen = x[rows.long()].float()
    norm = torch.linalg.vector_norm(seen, dim=-1)
    scale = normalization_scales(seen, norm)[:, normalization, None]
    features = SparseFeatures(indices, values, count)
    write_active(seen @ W_enc.float().T / scale + b_enc, norm, threshold, max_norm, k, features)
    f = features.to_dense(W_enc.shape[0])

    row = torch.repeat_interleave(ptr.diff().long())
    entries, chosen = slice(len(row)), feature[: len(row)].long()
    activation[entries] = f[row, chosen]
    edit[entries] = edit_of(op[entries], f[row, chosen], value[entries])
    x_norm.copy_(norm)

    e = torch.zeros_like(f).index_put_((row, chosen), edit[entries], accumulate=True)
    center = seen.mean(-1, keepdim=True) if normalization == Normalization.LAYER_NORM else 0.0
    spliced = scale * ((f + e) @ W_dec.float() + b_dec) + center
    inside = norm <= max_norm
    result = torch.where(inside[:, None], spliced, seen + scale * (e @ W_dec.float()))
    known = (count >= 0) & (count <= indices.shape[1])
    changed = known & (inside | (e != 0).any(-1))
    x[rows[changed].long()] = result[changed].to(x.dtype)


_sae_splice = Operator(
    "sae_splice_(Tensor(a!) x, Tensor rows, Tensor ptr, Tensor feature, Tensor op, Tensor value, Tensor W_enc, "
    "Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec, float max_norm, int normalization, int k, "
    "Tensor(b!) indices, Tensor(c!) values, Tensor(d!) count, Tensor(e!) activation, Tensor(f!) edit, "
    "Tensor(g!) x_norm) -> ()",
    workspace_for=lambda x, rows, ptr, feature, op, value, W_enc, *_: (rows.shape[0], W_enc.shape[0]),
)
