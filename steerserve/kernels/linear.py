"""linear: x · weightᵀ + bias whose rows do not depend on the batch.

The maths and the guarantee are in ``csrc/ops.h``. ``linear`` is the operator, ``linear_ref`` the same in plain torch,
without the guarantee.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from steerserve.kernels.backend import define, refuse_gradients


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[..., d_out]``, contiguous: x · weightᵀ + bias, summed in float32 and rounded once.

    On the CPU a row has the same bits alone, at any place in any batch and on any number of threads. Weights are read
    where they lie. On a GPU this is ``linear_ref``.

    Args:
        x: ``[..., d_in]`` float32 or bfloat16, rows contiguous and evenly apart.
        weight: ``[d_out, d_in]`` of the same dtype, contiguous.
        bias: ``[d_out]`` of the same dtype.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape or strides, or requires grad; the message names it.
    """
    refuse_gradients(x=x, weight=weight, bias=bias)
    result: Tensor = _linear(x, weight, bias)
    return result


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` as torch has it, on any device: same arguments, same results within rounding."""
    return F.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_linear = define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", fake=_fake, on_cuda=linear_ref)
