"""The hooks through which every edit and every reading happens.

Each site has buffers that are allocated once, and every step writes its plan into them: the hook, and what a compiler
makes of it, calls the same kernel on the same memory whatever the step holds.

Editing in place is safe at every site of the supported families: the activation is the fresh
result of an addition, a matmul, a norm or an embedding lookup, never a weight or an input that is
read again unedited. ``resid_pre`` of a layer and ``resid_post`` of the one before are one tensor,
which is what makes the residual stream carry the edit on.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from steerserve.kernels.steer_delta import steer_delta_
from steerserve.models.families import FamilyAdapter, HookPoint
from steerserve.types import Site

STAGES = 2
"""Segments of a token at a site: the request's entries, then the policies'."""

_LIBRARY = torch.library.Library("steerserve", "FRAGMENT")


@dataclass(frozen=True, eq=False)
class SiteBank:
    """The features that entries at one site may refer to, as in ``steer_delta_``: ``[K, d]`` and ``[K]``."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor
    max_norm: torch.Tensor
    normalization: torch.Tensor
    W_dec: torch.Tensor


class ScoreBuffers:
    """The scores of a step, which all sites share: a gate reads at one site and edits at it or a later one.

    Attributes:
        ptr: ``[max_tokens + 1]`` int32: token t owns the scores ``ptr[t] : ptr[t + 1]``.
        threshold, score: ``[max_scores]`` float32, as in ``steer_delta_``.
    """

    def __init__(self, max_tokens: int, max_scores: int) -> None:
        self.ptr = torch.zeros(max_tokens + 1, dtype=torch.int32)
        self.threshold = torch.zeros(max_scores)
        self.score = torch.zeros(max_scores)

    @property
    def num_bytes(self) -> int:
        """Size of the buffers."""
        return self.ptr.nbytes + self.threshold.nbytes + self.score.nbytes


class SiteBuffers:
    """A step's entries at one site, where the kernel leaves what it read and did, and the hook that calls it.

    Token t owns the segments ``ptr[2 * t : 2 * t + 3]`` of the entries. Shapes as in ``steer_delta_``:
    ``ptr[2 * max_tokens + 1]``; ``slot``, ``op``, ``value``, ``score_index``, ``activation``, ``edit``
    ``[max_entries]``; ``x_norm[2 * max_tokens]``.

    Attributes:
        active: the hook does nothing unless it is set.
        handle: how ``torch.ops.steerserve.steer_site_`` finds the buffers.
    """

    def __init__(self, point: HookPoint, scores: ScoreBuffers, max_tokens: int, max_entries: int) -> None:
        self.active = False
        self.ptr = torch.zeros(STAGES * max_tokens + 1, dtype=torch.int32)
        self.slot = torch.empty(max_entries, dtype=torch.int32)
        self.op = torch.empty(max_entries, dtype=torch.uint8)
        self.value = torch.empty(max_entries)
        self.score_index = torch.empty(max_entries, dtype=torch.int32)
        self.activation = torch.empty(max_entries)
        self.edit = torch.empty(max_entries)
        self.x_norm = torch.empty(STAGES * max_tokens)
        self._scores = scores
        self._bank: SiteBank | None = None
        self._arguments: dict[int, tuple[torch.Tensor, ...]] = {}
        self._point = point
        self._hook: RemovableHandle | None = None
        # The lowest free one: compiled code that names it is the same, and cached, in every process.
        self.handle = next(handle for handle in itertools.count() if handle not in _SITES)
        _SITES[self.handle] = self

    @property
    def bank(self) -> SiteBank | None:
        """What the entries refer to; set before the first active step, and to nothing else later. Sets the hook."""
        return self._bank

    @bank.setter
    def bank(self, bank: SiteBank) -> None:
        assert self._bank is None or self._bank is bank
        self._bank = bank
        self.install()

    @property
    def num_bytes(self) -> int:
        """Size of the buffers, without the bank."""
        entries = (self.slot, self.op, self.value, self.score_index, self.activation, self.edit)
        return sum(buffer.nbytes for buffer in (self.ptr, *entries, self.x_norm))

    def apply_(self, hidden: torch.Tensor) -> None:
        """Edit ``hidden [1, N, d]`` in place."""
        x = hidden.view(-1, hidden.shape[-1])  # a view or an error: an edit of a copy would be lost
        arguments = self._arguments.get(len(x)) or self._arguments_for(len(x))
        steer_delta_(x, *arguments)

    def install(self) -> None:
        """Set the hook. It costs a little of every pass even while inactive, so that only sites in use have one."""
        if self._hook is None:
            module = self._point.module
            if self._point.side == "input":
                self._hook = module.register_forward_pre_hook(self._on_input)
            else:
                self._hook = module.register_forward_hook(self._on_output)

    def remove(self) -> None:
        """Take the hook off, and give the handle back."""
        if self._hook is not None:
            self._hook.remove()
        if _SITES.get(self.handle) is self:
            del _SITES[self.handle]

    def _on_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._splice(args[0])

    def _on_output(self, module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self._splice(output[0] if isinstance(output, tuple) else output)

    def _splice(self, hidden: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            # Compiled code keeps the operator, whatever ``active`` was when it was compiled.
            torch.ops.steerserve.steer_site_(hidden, self.handle)
        elif self.active:
            self.apply_(hidden)

    def _arguments_for(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        bank, scores = self._bank, self._scores
        assert bank is not None
        arguments = self._arguments[num_tokens] = (
            self.ptr[: STAGES * num_tokens + 1],
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
            scores.ptr[: num_tokens + 1],
            scores.threshold,
            scores.score,
            self.activation,
            self.edit,
            self.x_norm[: STAGES * num_tokens],
        )
        return arguments


_SITES: weakref.WeakValueDictionary[int, SiteBuffers] = weakref.WeakValueDictionary()
"""Live buffers by handle."""


def _steer_site(x: torch.Tensor, site: int) -> None:
    buffers = _SITES[site]
    if buffers.active:
        buffers.apply_(x)


_LIBRARY.define("steer_site_(Tensor(a!) x, int site) -> ()")
_LIBRARY.impl("steer_site_", _steer_site, "CPU")
torch.library.register_fake("steerserve::steer_site_", lambda x, site: None, lib=_LIBRARY)


class Splicer:
    """The splices of one model.

    Attributes:
        scores: shared by all sites.
        buffers: of every site that can be steered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: FamilyAdapter,
        sites: Sequence[Site],
        *,
        max_tokens: int,
        max_entries: int,
        max_scores: int,
    ) -> None:
        self.scores = ScoreBuffers(max_tokens, max_scores)
        self.buffers = {
            site: SiteBuffers(adapter.hook_point(model, site), self.scores, max_tokens, max_entries) for site in sites
        }

    def install(self) -> None:
        """Set all hooks, as must be done before the model is compiled."""
        for buffers in self.buffers.values():
            buffers.install()

    @property
    def num_bytes(self) -> int:
        """Size of all buffers, without the banks."""
        return self.scores.num_bytes + sum(buffers.num_bytes for buffers in self.buffers.values())

    def remove(self) -> None:
        """Take the hooks off the model."""
        for buffers in self.buffers.values():
            buffers.remove()
