"""head_scale: scale attention heads' outputs in place, each row by its own plan.

The maths is in ``csrc/ops.h``. ``head_scale_`` is the operator, ``head_scale_ref_`` the same in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerserve.kernels.backend import Operator


def head_scale_(z: Tensor, ptr: Tensor, head: Tensor, scale: Tensor, z_norm: Tensor) -> None:
    """z[n, head_j, :] *= scale_j for row n's entries j in ``ptr[n] : ptr[n + 1]``, in order.

    Args:
        z: ``[N, H, d_head]`` float32 or bfloat16 (float16 too on a GPU), each row's heads contiguous. Edited; a scale
            of 1 keeps the bits.
        ptr: ``[N + 1]`` int32, ascending from 0 to at most nnz; entries beyond its end are spare room.
        head: ``[nnz]`` int32.
        scale: ``[nnz]`` float32, finite; 0 silences the head.
        z_norm: ``[nnz]`` float32. Written: |z[n, head, :]| before the entry.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape, strides, device or range; the message names it. Nothing is
            written. On a GPU elements are not looked at: a bad head or scale makes its z_norm NaN and scales nothing.
    """
    _head_scale(z, ptr, head, scale, z_norm)


def head_scale_ref_(z: Tensor, ptr: Tensor, head: Tensor, scale: Tensor, z_norm: Tensor) -> None:
    """``head_scale_`` in torch operators, on any device: same arguments, same results within rounding."""
    row = torch.repeat_interleave(ptr.diff().long())
    place = torch.arange(len(row), device=z.device) - ptr[row]
    for turn in place.unique():
        entries = (place == turn).nonzero().squeeze(1)
        at = row[entries], head[entries].long()
        seen = z[at].float()
        z_norm[entries] = torch.linalg.vector_norm(seen, dim=-1)
        factor = scale[entries, None]
        z[at] = torch.where(factor == 1, z[at], (factor * seen).to(z.dtype))


_head_scale = Operator(
    "head_scale_(Tensor(a!) z, Tensor ptr, Tensor head, Tensor scale, Tensor(b!) z_norm) -> ()",
)
