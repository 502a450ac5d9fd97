"""Registration of the operators with torch: one set of checks, and behind it a CPU and a CUDA backend.

``_C`` (CPU) and ``_cuda`` bind the same signatures (csrc/bind_ops.h). So an operator states its checks and the order
of its launch arguments once; what differs is where it runs, on a number of threads or on a stream, and the workspace.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from steerserve.kernels.checks import Checks
from steerserve.kernels.native import C

_LIBRARY = torch.library.Library("steerserve", "FRAGMENT")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Operator:
    """What torch calls for an operator.

    Attributes:
        kernel: its name in the compiled modules.
        launch_arguments: checks the operator's arguments, given a ``Checks`` and them, and returns those of the
            compiled launch up to its workspace.
        workspace_for: of an operator that has a workspace, the (num_rows, d_sae) that size it on a GPU.
    """

    kernel: str
    launch_arguments: Callable[..., tuple[int | float, ...]]
    workspace_for: Callable[..., tuple[int, int]] | None

    def run_on_cpu(self, *arguments: Any) -> None:
        numbers = self.launch_arguments(Checks(_CPU), *arguments)
        workspace = () if self.workspace_for is None else (0,)
        getattr(C, self.kernel)(*numbers, *workspace, torch.get_num_threads())

    def run_on_cuda(self, *arguments: Any) -> None:
        device = arguments[0].device
        numbers = self.launch_arguments(Checks(device), *arguments)
        cuda = cuda_module()
        with torch.cuda.device(device):
            if self.workspace_for is not None:
                num_bytes = getattr(cuda, f"{self.kernel}_workspace")(*self.workspace_for(*arguments))
                # Freed when this returns, yet safe: torch hands it out again only for later work of this stream.
                workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
                numbers = (*numbers, workspace.data_ptr())
            getattr(cuda, self.kernel)(*numbers, torch.cuda.current_stream(device).cuda_stream)

    def check_traced(self, *arguments: Any) -> None:
        self.launch_arguments(Checks(arguments[0].device, address=lambda _: 0), *arguments)


OPERATORS: dict[str, Operator] = {}
"""By name in ``torch.ops.steerserve``."""


def register(
    schema: str,
    launch_arguments: Callable[..., tuple[int | float, ...]],
    workspace_for: Callable[..., tuple[int, int]] | None = None,
) -> None:
    """Make ``torch.ops.steerserve.<name>`` of a schema, which declares what the operator writes.

    A plain registration costs 3 µs a call, torch.library.custom_op about 45 µs: as much as a kernel itself.
    """
    name = schema[: schema.index("(")]
    operator = OPERATORS[name] = Operator(name.rstrip("_"), launch_arguments, workspace_for)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, operator.run_on_cpu, "CPU")
    _LIBRARY.impl(name, operator.run_on_cuda, "CUDA")
    torch.library.register_fake(f"steerserve::{name}", operator.check_traced, lib=_LIBRARY)


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
