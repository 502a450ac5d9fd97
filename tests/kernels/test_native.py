"""The extension shares torch's OpenMP runtime. Looked at in a fresh process: others may load more runtimes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from steerserve.kernels.native import C

PROBE = """
import json, os, torch
from steerserve.kernels.native import loaded_openmp_libraries
from steerserve.kernels.steer_delta import OpCode, steer_delta_

{before}
num_rows, k, d = 8, 64, 1024
arguments = (
    torch.randn(num_rows, d), torch.arange(0, num_rows * k + 1, k, dtype=torch.int32),
    torch.arange(num_rows * k, dtype=torch.int32) % k, torch.full((num_rows * k,), OpCode.ADD, dtype=torch.uint8),
    torch.ones(num_rows * k), torch.full((num_rows * k,), -1, dtype=torch.int32),
    torch.randn(k, d), torch.zeros(k), torch.zeros(k), torch.full((k,), torch.inf),
    torch.zeros(k, dtype=torch.uint8), torch.randn(k, d),
    torch.zeros(num_rows + 1, dtype=torch.int32), torch.empty(0), torch.empty(0),
    torch.zeros(num_rows * k), torch.zeros(num_rows * k), torch.zeros(num_rows),
)
def num_os_threads():
    return len(os.listdir("/proc/self/task"))
start = num_os_threads()
steer_delta_(*arguments)
steered = num_os_threads()
torch.randn(1 << 22).exp_()
print(json.dumps({{
    "openmp": [str(path) for path in loaded_openmp_libraries()],
    "threads": [start, steered, num_os_threads()],
}}))
"""


def probe(before: str) -> dict[str, Any]:
    code = PROBE.format(before=before)
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=240)
    result: dict[str, Any] = json.loads(output.stdout)
    return result


def test_there_is_one_openmp_runtime_and_one_thread_pool() -> None:
    result = probe("torch.set_num_threads(3)")
    assert len(result["openmp"]) == 1
    start, steered, after_torch = result["threads"]
    assert steered == start + 2, "the kernel did not use torch's number of threads"
    assert after_torch == steered, "torch started a second pool beside the kernel's"


def test_torch_set_to_one_thread_is_honoured() -> None:
    start, steered, _ = probe("torch.set_num_threads(1)")["threads"]
    assert steered == start


def test_a_runtime_loaded_by_another_library_is_left_alone() -> None:
    pytest.importorskip("sklearn")
    result = probe("import sklearn.cluster, sklearn.utils._openmp_helpers; torch.set_num_threads(3)")
    assert "torch" in result["openmp"][0]
    start, steered, after_torch = result["threads"]
    assert after_torch == steered == start + 2


def test_an_instruction_set_this_cpu_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="avx1024"):
        C.set_simd_level("avx1024")
    assert C.simd_level() == C.supported_simd_levels()[-1]
