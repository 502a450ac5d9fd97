"""What an operator asks of its tensors before their addresses leave Python.

The compiled launches trust every address, so an address is only to be had from a check. Elements are not looked at
here: the CPU launches check indices and operands themselves, a GPU reports a bad one as NaN (csrc/ops.h).

An error starts with the argument's name: TypeError for a dtype, ValueError for everything else. A good tensor costs
one expression, about half a microsecond, and is told from a bad one before anybody asks what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""``DType`` of csrc/ops.h."""

_WEIGHTS = (torch.float32, torch.bfloat16)
_ACTIVATIONS_ON_CPU = (torch.float32, torch.bfloat16)
_ACTIVATIONS = (*_ACTIVATIONS_ON_CPU, torch.float16)


class Checks:
    """The checks of one call, whose tensors all have to be on ``device``.

    Args:
        address: how to get a tensor's address; tensors without memory, as a tracer passes them, have none.
    """

    __slots__ = ("_address", "_device")

    def __init__(self, device: torch.device, address: Callable[[Tensor], int] = Tensor.data_ptr) -> None:
        self._device = device
        self._address = address

    def shape(self, name: str, tensor: Tensor, *dims: str) -> torch.Size:
        """Sizes of a tensor that has these dimensions; they define what the others must have."""
        if tensor.dim() != len(dims):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [{', '.join(dims)}]")
        return tensor.shape

    def tensor(self, name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
        """Address of a contiguous tensor."""
        address = self._address(tensor)
        if (
            tensor.dtype is dtype
            and tensor.shape == shape
            and tensor.is_contiguous()
            and tensor.device == self._device
            and not address % dtype.itemsize
        ):
            return address
        raise self._what_is_wrong(name, tensor, (dtype,), shape, "a contiguous tensor")

    def rows(self, name: str, tensor: Tensor, *shape: int) -> tuple[int, int, int]:
        """Address, dtype code and row stride of activations: rows may lie apart, but each is contiguous."""
        dtypes = _ACTIVATIONS_ON_CPU if self._device.type == "cpu" else _ACTIVATIONS
        address = self._address(tensor)
        if (
            tensor.dtype in dtypes
            and tensor.shape == shape
            and (tensor.is_contiguous() or _has_contiguous_rows(tensor))
            and tensor.device == self._device
            and not address % tensor.itemsize
        ):
            return address, DTYPE_CODES[tensor.dtype], tensor.stride(0)
        raise self._what_is_wrong(name, tensor, dtypes, shape, "contiguous rows that do not overlap")

    def weights(self, name: str, tensor: Tensor, *shape: int) -> tuple[int, int]:
        """Address and dtype code of a contiguous weight matrix."""
        if tensor.dtype not in _WEIGHTS:
            raise self._what_is_wrong(name, tensor, _WEIGHTS, shape, "a contiguous tensor")
        return self.tensor(name, tensor, tensor.dtype, *shape), DTYPE_CODES[tensor.dtype]

    def _what_is_wrong(
        self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], layout: str
    ) -> Exception:
        if tensor.dtype not in dtypes:
            return TypeError(f"{name}: got {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if tensor.shape != shape:
            return ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != self._device:
            return ValueError(f"{name}: is on {tensor.device}, expected {self._device} like the first argument")
        if self._address(tensor) % tensor.itemsize:
            return ValueError(f"{name}: its address is not a multiple of {tensor.itemsize}, the size of an element")
        return ValueError(f"{name}: got strides {tensor.stride()}, expected {layout}")


def _has_contiguous_rows(tensor: Tensor) -> bool:
    size = 1
    for extent, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if extent > 1 and stride != size:
            return False
        size *= extent
    return tensor.shape[0] <= 1 or tensor.stride(0) >= size
