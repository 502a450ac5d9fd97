"""What nvcc made of csrc/cuda, read from the built module: no GPU is needed to see what a kernel will cost one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import files
from pathlib import Path

import pytest
import torch

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
SM_LIMITS = {80: (2048, 164), 90: (2048, 228), 100: (2048, 228), 120: (1536, 100)}
"""Threads, and KB of shared memory, that an SM of each architecture holds."""
SM_REGISTERS = 65536
RESERVED_SHARED_BYTES = 1024
"""Of each block, for the system."""


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel for one architecture."""

    arch: int
    name: str
    loads_16_bytes: bool
    rows: int | None
    """R of encode_kernel."""
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: str

    @property
    def label(self) -> str:
        """As in the headers' statements."""
        return self.name if self.rows is None else f"{self.name} R={self.rows}"


@dataclass(frozen=True)
class Occupancy:
    """A header's statement of how many blocks of a kernel run on an SM side by side."""

    num_threads: int
    blocks_per_sm: int
    dynamic_shared_bytes: int


def cuda_module() -> Path:
    spec = importlib.util.find_spec("steerserve.kernels._cuda")
    if spec is None:
        assert os.environ.get("STEERSERVE_CUDA") != "1", "STEERSERVE_CUDA=1, but the CUDA module was not built"
        pytest.skip("built without nvcc")
    assert spec.origin is not None
    return Path(spec.origin)


def cuobjdump(*arguments: str) -> str:
    tool = next(file for file in files("nvidia-cuda-cuobjdump") or [] if file.name == "cuobjdump").locate()
    disassembler = next(file for file in files("nvidia-cuda-nvdisasm") or [] if file.name == "nvdisasm").locate()
    path = os.pathsep.join([str(Path(str(disassembler)).parent), os.environ["PATH"]])
    command = [str(tool), *arguments, str(cuda_module())]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True).stdout


def by_architecture(dump: str) -> Iterator[tuple[int, str]]:
    for section in dump.split("Fatbin elf code:")[1:]:
        arch = re.search(r"^arch = sm_(\d+)$", section, re.MULTILINE)
        assert arch is not None
        yield int(arch[1]), section


@cache
def kernels() -> list[Kernel]:
    """Every kernel of the module, for every architecture."""
    code: dict[tuple[int, str], str] = {}
    for arch, section in by_architecture(cuobjdump("-sass")):
        for function in section.split("Function : ")[1:]:
            symbol, _, code[arch, symbol] = function.partition("\n")
    found = []
    for arch, section in by_architecture(cuobjdump("-res-usage")):
        usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for symbol, *numbers in re.findall(usage, section):
            registers, stack, shared, local = map(int, numbers)
            # steerserve::name<weight, V, R>(...)
            mangled = re.fullmatch(
                r"_ZN10steerserve\d+(\w+?_kernel)(?:I(\w+?)Li(\d+)E(?:Li(\d+)E)?E)?(?:v|EN|E).*", symbol
            )
            assert mangled is not None, symbol
            name, weight, weights_per_load, rows = mangled.groups()
            found.append(
                Kernel(
                    arch=arch,
                    name=name,
                    loads_16_bytes=weight is not None and int(weights_per_load) > 1,
                    rows=int(rows) if rows else None,
                    registers=registers,
                    stack_bytes=stack,
                    local_bytes=local,
                    shared_bytes=shared,
                    instructions=code[arch, symbol],
                )
            )
    return found


def stated_occupancies() -> dict[str, Occupancy]:
    statement = re.compile(
        r"^// occupancy: (.+): (\d+) threads, (\d+) blocks? per SM(?: with (\d+) KB of dynamic shared memory each)?",
        re.MULTILINE,
    )
    return {
        label: Occupancy(int(threads), int(blocks), int(kilobytes or 0) * 1024)
        for header in CUDA_SOURCES.glob("*.cuh")
        for label, threads, blocks, kilobytes in statement.findall(header.read_text())
    }


def possible_blocks(kernel: Kernel, num_threads: int, dynamic_shared_bytes: int) -> int:
    """How many blocks an SM holds; registers are given out 256 at a time, a warp in one of four partitions."""
    max_threads, shared_kilobytes = SM_LIMITS[kernel.arch]
    num_warps = num_threads // 32
    registers_per_warp = -(-kernel.registers * 32 // 256) * 256
    warps = SM_REGISTERS // 4 // registers_per_warp * 4
    block_bytes = kernel.shared_bytes + dynamic_shared_bytes + RESERVED_SHARED_BYTES
    return min(max_threads // num_threads, warps // num_warps, shared_kilobytes * 1024 // block_bytes)


def test_every_architecture_is_built() -> None:
    built = re.findall(r"\.sm_(\d+)\.cubin", cuobjdump("--list-elf"))
    assert {int(arch) for arch in built} == set(SM_LIMITS)
    names = {
        arch: {(kernel.label, kernel.loads_16_bytes) for kernel in kernels() if kernel.arch == arch}
        for arch in SM_LIMITS
    }
    assert len(names[90]) >= 16
    assert all(names[arch] == names[90] for arch in SM_LIMITS)
    assert f".sm_{max(SM_LIMITS)}.ptx" in cuobjdump("--list-ptx"), "newer cards compile this"


def test_no_kernel_uses_local_memory() -> None:
    for kernel in kernels():
        assert kernel.stack_bytes == kernel.local_bytes == 0, kernel.label
        assert not re.search(r"\b(LDL|STL)\b", kernel.instructions), kernel.label
        assert "EXIT" in kernel.instructions, kernel.label


def test_weights_are_read_16_bytes_at_a_time() -> None:
    vectorized = [kernel for kernel in kernels() if kernel.loads_16_bytes]
    assert {kernel.name for kernel in vectorized} == {
        "steer_delta_kernel",
        "encode_kernel",
        "sae_decode_kernel",
        "splice_kernel",
    }
    for kernel in vectorized:
        assert re.search(r"\bLDG\.E\.128\.CONSTANT\b", kernel.instructions), (kernel.arch, kernel.label)


def test_occupancy_is_what_the_headers_state() -> None:
    stated = stated_occupancies()
    assert {kernel.label for kernel in kernels()} == set(stated)
    for kernel in kernels():
        occupancy = stated[kernel.label]
        possible = possible_blocks(kernel, occupancy.num_threads, occupancy.dynamic_shared_bytes)
        assert possible >= occupancy.blocks_per_sm, (kernel.arch, kernel.label, kernel.registers)


def test_the_module_loads_without_a_driver_and_says_so() -> None:
    cuda_module()
    script = "from steerserve.kernels import _cuda; print(_cuda.device_count(), _cuda.unavailable_reason())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, _, reason = done.stdout.strip().partition(" ")
    if int(count) > 0:
        pytest.skip("there is a GPU")
    assert reason.startswith("no CUDA device: cudaError"), reason


def test_tensors_elsewhere_are_refused() -> None:
    cuda_module()
    from steerserve.kernels import _cuda

    z, ptr, entry = torch.zeros(1, 1, 4), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1)
    with pytest.raises(ValueError, match=r"^z: got a tensor on cpu, expected cuda$"):
        _cuda.head_scale(z, ptr, entry.int(), entry, entry.clone(), 0)
