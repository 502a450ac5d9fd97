"""The hooks through which every edit and every reading happens.

A ``Splicer`` hooks each site of a model once. A hook does nothing unless the forward pass that is
running was given work for its site; then it calls ``steer_delta_`` on the activation itself.

Editing in place is safe at every site of the supported families: the activation is the fresh
result of an addition, a matmul, a norm or an embedding lookup, never a weight or an input that is
read again unedited. ``resid_pre`` of a layer and ``resid_post`` of the one before are one tensor,
which is what makes the residual stream carry the edit on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from steerserve.kernels.steer_delta import steer_delta_
from steerserve.models.families import FamilyAdapter
from steerserve.types import Site


@dataclass(frozen=True, eq=False)
class SiteBank:
    """The features that entries at one site may refer to, as in ``steer_delta_``: ``[K, d]`` and ``[K]``."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor
    max_norm: torch.Tensor
    normalization: torch.Tensor
    W_dec: torch.Tensor


@dataclass(frozen=True, eq=False)
class SiteWork:
    """One forward pass's entries at one site, and where the kernel leaves what it read and did.

    Shapes as in ``steer_delta_``: ``ptr[N*S+1]``; ``slot``, ``op``, ``value``, ``score_index``, ``activation``,
    ``edit`` ``[nnz]``; ``score_ptr[N+1]``; ``score_threshold``, ``score`` ``[G]``; ``x_norm[N*S]``, with N the
    positions of the pass in row-major order.
    """

    bank: SiteBank
    ptr: torch.Tensor
    slot: torch.Tensor
    op: torch.Tensor
    value: torch.Tensor
    score_index: torch.Tensor
    score_ptr: torch.Tensor
    score_threshold: torch.Tensor
    score: torch.Tensor
    activation: torch.Tensor
    edit: torch.Tensor
    x_norm: torch.Tensor

    def apply_(self, hidden: torch.Tensor) -> None:
        """Edit ``hidden[batch, time, d]`` in place."""
        bank = self.bank
        steer_delta_(
            hidden.view(-1, hidden.shape[-1]),  # a view or an error: an edit of a copy would be lost
            self.ptr,
            self.slot,
            self.op,
            self.value,
            self.score_index,
            bank.W_enc,
            bank.b_enc,
            bank.threshold,
            bank.max_norm,
            bank.normalization,
            bank.W_dec,
            self.score_ptr,
            self.score_threshold,
            self.score,
            self.activation,
            self.edit,
            self.x_norm,
        )


class _SiteHook:
    """The hook of one site; ``work`` is what the running forward pass has to do there."""

    __slots__ = ("work",)

    def __init__(self) -> None:
        self.work: SiteWork | None = None

    def on_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.work is not None:
            self.work.apply_(args[0])

    def on_output(self, module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        if self.work is not None:
            self.work.apply_(output[0] if isinstance(output, tuple) else output)


class Splicer:
    """Hooks on every site of one model."""

    def __init__(self, model: PreTrainedModel, adapter: FamilyAdapter) -> None:
        self._hooks: dict[Site, _SiteHook] = {}
        self._handles = []
        for site in adapter.sites(model):
            hook = self._hooks[site] = _SiteHook()
            point = adapter.hook_point(model, site)
            if point.side == "input":
                self._handles.append(point.module.register_forward_pre_hook(hook.on_input))
            else:
                self._handles.append(point.module.register_forward_hook(hook.on_output))

    @contextmanager
    def applying(self, work: Mapping[Site, SiteWork]) -> Iterator[None]:
        """Forward passes inside the block do this work; not reentrant."""
        hooks = [self._hooks[site] for site in work]
        try:
            for hook, site_work in zip(hooks, work.values(), strict=True):
                hook.work = site_work
            yield
        finally:
            for hook in hooks:
                hook.work = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
