"""Registration of the operators with torch, and the short way to them.

Operators that edit in place or write to their arguments are bound for Python (``Operator``). Those that every layer of
a model calls return a tensor and are registered with torch's dispatcher from C++ (``define``): about 1 µs a call,
output included, whether Python calls them or a compiled graph.

``_C`` (CPU) and ``_cuda`` bind the same signatures and check the same things (csrc/bind_ops.h, csrc/tensor.h); what
differs is where they run, on a number of threads or on a stream, and the workspace.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steerserve.kernels.native import C

_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("steerserve", "FRAGMENT")
C.register_torch_kernels()


class Operator:
    """``torch.ops.steerserve.<name>``, made from its schema, which declares what the operator writes.

    Called on the CPU with nothing of torch watching (no trace, no dispatch mode, no tensor subclass) it goes straight
    to the compiled launch: torch's dispatcher would cost several times as much as a small launch itself, and more
    still in cold caches.

    Args:
        workspace_for: of an operator that has a workspace, the (num_rows, d_sae) that size it on a GPU.
    """

    def __init__(self, schema: str, workspace_for: Callable[..., tuple[int, int]] | None = None) -> None:
        self.name = schema[: schema.index("(")]
        self.kernel = self.name.rstrip("_")
        self.workspace_for = workspace_for
        self._launch_on_cpu = getattr(C, self.kernel)
        self._no_workspace = () if workspace_for is None else (0,)
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self.run_on_cpu, "CPU")
        _LIBRARY.impl(self.name, self.run_on_cuda, "CUDA")
        torch.library.register_fake(f"steerserve::{self.name}", self.check_traced, lib=_LIBRARY)
        self._overload = getattr(torch.ops.steerserve, self.name).default
        parameters = enumerate(self._overload._schema.arguments)
        self._written = [place for place, each in parameters if each.alias_info and each.alias_info.is_write]

    def __call__(self, *arguments: Any) -> None:
        first = arguments[0]
        if torch.compiler.is_compiling() or _is_watched(first):
            self._overload(*arguments)
        else:
            self.run_on_cpu(*arguments)

    def run_on_cpu(self, *arguments: Any) -> None:
        """Launch on torch's number of threads."""
        if torch.is_grad_enabled():
            self._refuse_gradients(arguments)
        self._launch_on_cpu(*arguments, *self._no_workspace, torch.get_num_threads())

    def run_on_cuda(self, *arguments: Any) -> None:
        """Launch on the current stream of the first tensor's device."""
        cuda, device = cuda_module(), arguments[0].device
        with torch.cuda.device(device):
            workspace: tuple[int, ...] = ()
            if self.workspace_for is not None:
                num_bytes = getattr(cuda, f"{self.kernel}_workspace")(*self.workspace_for(*arguments))
                # Freed when this returns, yet safe: torch hands it out again only for later work of this stream.
                workspace = (torch.empty(num_bytes, dtype=torch.uint8, device=device).data_ptr(),)
            getattr(cuda, self.kernel)(*arguments, *workspace, torch.cuda.current_stream(device).cuda_stream)

    def _refuse_gradients(self, arguments: tuple[Any, ...]) -> None:
        """The operators have none: an edit that autograd does not see would make those of others wrong."""
        for place in self._written:
            if isinstance(arguments[place], Tensor) and arguments[place].requires_grad:
                name = self._overload._schema.arguments[place].name
                raise ValueError(f"{name}: requires grad, expected torch.no_grad() or a tensor that does not")

    def check_traced(self, *arguments: Any) -> None:
        """Torch takes a call with any meta tensor for one that is only traced; one among real tensors is a mistake."""
        device = arguments[0].device
        for parameter, value in zip(self._overload._schema.arguments, arguments, strict=True):
            if isinstance(value, Tensor) and value.device != device:
                raise ValueError(f"{parameter.name}: is on {value.device}, expected {device} like the first argument")


def define(schema: str, fake: Callable[..., Tensor], on_cuda: Callable[..., Tensor]) -> Any:
    """Declare ``torch.ops.steerserve.<name>``, whose CPU kernel lies in csrc/torch_ops.cpp.

    Args:
        fake: makes an output like the operator's without computing it, for tracing.
        on_cuda: the operator for CUDA tensors.

    Returns:
        The overload to call.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"steerserve::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.steerserve, name).default


def refuse_gradients(**arguments: Tensor | None) -> None:
    """Raise if autograd would have to go through an operator that has no backward pass."""
    if torch.is_grad_enabled():
        for name, value in arguments.items():
            if value is not None and value.requires_grad:
                raise ValueError(f"{name}: requires grad, expected torch.no_grad() or a tensor that does not")


def _is_watched(first: object) -> bool:
    """What is no tensor at all goes to the launch too, which says so."""
    if torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return True
    return isinstance(first, Tensor) and (type(first) not in _PLAIN or not first.is_cpu)


@functools.cache
def cuda_module() -> Any:
    """The compiled CUDA operators, loaded when the first CUDA tensor arrives.

    Raises:
        RuntimeError: this build has none.
    """
    try:
        return importlib.import_module("steerserve.kernels._cuda")
    except ModuleNotFoundError as error:
        raise RuntimeError("steerserve was built without CUDA kernels; rebuild it with nvcc on PATH") from error
