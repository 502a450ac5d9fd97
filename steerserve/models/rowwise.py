"""Layers of a model whose result for a token depends on that token alone, to the bit.

Two kinds of torch's own do not have that property. A matrix product sums in an order that depends on the number of
rows. And an activation function computes what is left over at the end of a thread's share, when it does not fill the
vector registers, with other code than the rest; which elements these are depends on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steerserve.kernels.linear import linear

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
"""Python modules whose classes are activation functions."""

SHARE = 16384
"""Elements up to which torch computes every activation function in one thread. A wider row is shared out alike in
every pass."""

REGISTERS = 64
"""Elements of the narrowest type that the inner loop of such an operator takes at a time."""

Activation = Callable[[torch.Tensor], torch.Tensor]


class RowLinear(nn.Linear):
    """``nn.Linear`` with one order of summation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., d_in]`` to ``[..., d_out]``."""
        return linear(input, self.weight, self.bias)


class RowConv1D(Conv1D):
    """``Conv1D`` of GPT-2 with one order of summation; ``weight.T`` is contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d_in]`` to ``[..., d_out]``."""
        return linear(x, self.weight.T, self.bias)


def row_activation(activation: Activation) -> Activation:
    """An elementwise function ``[..., d]`` that meets no end of a thread's share inside a row."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return activation(x)  # compiled code has no such ends
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        if width % REGISTERS:
            rows = F.pad(rows, (0, -width % REGISTERS))
        num_rows = max(1, SHARE // rows.shape[1])
        if len(rows) > num_rows:
            rows = torch.cat([activation(part) for part in rows.split(num_rows)])
        else:
            rows = activation(rows)
        return rows[:, :width].reshape(x.shape)

    return apply


class RowwiseLayers:
    """A model of such layers, until ``remove``. No weight is copied."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules: list[Any] = list(model.modules())
        self._linears = [module for module in modules if type(module) is nn.Linear]
        self._conv1ds = [module for module in modules if type(module) is Conv1D]
        self._activations = [module for module in modules if type(module).__module__ in ACTIVATIONS]
        for linear_layer in self._linears:
            linear_layer.__class__ = RowLinear
        for conv1d in self._conv1ds:
            conv1d.__class__ = RowConv1D
            # [d_in, d_out] as before, stored the other way round.
            conv1d.weight.data = conv1d.weight.data.T.contiguous().T
        for activation in self._activations:
            activation.forward = row_activation(activation.forward)

    def remove(self) -> None:
        """Give the model its own layers back."""
        for linear_layer in self._linears:
            linear_layer.__class__ = nn.Linear
        for conv1d in self._conv1ds:
            conv1d.__class__ = Conv1D
            conv1d.weight.data = conv1d.weight.data.contiguous()
        for activation in self._activations:
            del activation.forward
