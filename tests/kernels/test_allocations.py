"""The hot path allocates nothing: a launch that has work to do calls malloc as often as one that has none.

The second is what pybind11 or torch's dispatcher allocates for its arguments. An operator that returns a tensor also
allocates the memory of it. Counted in a process of its own, under a malloc that counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COUNTING_MALLOC = """
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static atomic_long num_allocations;

long allocations(void) { return num_allocations; }

void *malloc(size_t size) { return ++num_allocations, __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return ++num_allocations, __libc_calloc(count, size); }
void *realloc(void *memory, size_t size) { return ++num_allocations, __libc_realloc(memory, size); }
void *memalign(size_t alignment, size_t size) { return ++num_allocations, __libc_memalign(alignment, size); }
void *aligned_alloc(size_t alignment, size_t size) { return ++num_allocations, __libc_memalign(alignment, size); }
int posix_memalign(void **memory, size_t alignment, size_t size) {
  *memory = aligned_alloc(alignment, size);
  return *memory ? 0 : ENOMEM;
}
"""

PROBE = """
import ctypes, itertools, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from kernel_cases import OPERATORS, decode_call, encode_call, head_call, splice_call, steer_call
from steerserve.kernels.attend import AttentionState, attend
from steerserve.kernels.linear import linear
from steerserve.kernels.native import C

allocations = ctypes.CDLL(None).allocations
allocations.restype = ctypes.c_long
NUM_CALLS = 5

def count(function, arguments):
    before = allocations()
    for _ in itertools.repeat(None, NUM_CALLS):
        function(*arguments)
    return allocations() - before

def launch_of(call, num_threads):
    operator = OPERATORS[call.name]
    workspace = (0,) if operator.workspace_for else ()
    return getattr(C, operator.kernel), (*call.arguments.values(), *workspace, num_threads)

def report(what, busy, idle, outputs):
    first = count(*busy)  # the first of them grows the scratch
    print(json.dumps({
        "call": what, "first": first, "busy": count(*busy), "idle": count(*idle), "outputs": outputs * NUM_CALLS,
    }))

def linear_call(num_rows, dtype):
    return linear, tuple(torch.randn(size).to(dtype) for size in [(num_rows, 256), (500, 256), (500,)])

STATES = {
    dtype: AttentionState(
        *(torch.zeros(64, 2, 16, 64, dtype=dtype) for _ in range(2)),
        *(torch.arange(64).view(size).int() for size in [(2, 32), (64,), (64,)]),
    )
    for dtype in (torch.float32, torch.bfloat16)
}
for state in STATES.values():
    state.row.zero_()
    state.position += 400

def attend_call(num_rows, dtype):
    q, k, v = (torch.randn(num_rows, heads, 64).to(dtype) for heads in (4, 2, 2))
    return attend, (q, k, v, STATES[dtype].handle, 1.0)

def make_calls(num_rows, dtype):
    lengths, d, d_sae = [40] * num_rows, 256, 1000  # enough work for several threads
    types = {"dtype": dtype, "w_dtype": dtype}
    return [
        steer_call(lengths, d, d_sae, **types),
        encode_call(num_rows, d, d_sae, **types),
        encode_call(num_rows, d, d_sae, k=30, **types),
        decode_call([400] * num_rows, 400, d, d_sae, **types),
        splice_call(lengths, d, d_sae, **types),
        splice_call(lengths, d, d_sae, k=30, **types),
        head_call(lengths, 16, 512, dtype=dtype),
    ]

for level in C.supported_simd_levels():
    C.set_simd_level(level)
    for dtype, num_rows, num_threads in itertools.product((torch.float32, torch.bfloat16), (1, 17), (1, 2)):
        what = [level, str(dtype), num_rows, num_threads]
        for busy, idle in zip(make_calls(num_rows, dtype), make_calls(0, dtype), strict=True):
            name = [busy.name, busy.arguments.get("k")]
            report([*name, *what], launch_of(busy, num_threads), launch_of(idle, num_threads), outputs=0)
        torch.set_num_threads(num_threads)
        for make in (linear_call, attend_call):
            report([make.__name__, *what], make(num_rows, dtype), make(0, dtype), outputs=1)
"""


def test_a_warm_launch_allocates_nothing(tmp_path: Path) -> None:
    library = tmp_path / "counting_malloc.so"
    (tmp_path / "counting_malloc.c").write_text(COUNTING_MALLOC)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "counting_malloc.c"], check=True)
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, Path(__file__).parent],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert probe.returncode == 0, probe.stderr
    counts = [json.loads(line) for line in probe.stdout.splitlines()]
    assert any(each["first"] > each["busy"] for each in counts), "growing the scratch was not counted"
    assert [each for each in counts if each["busy"] != each["idle"] + each["outputs"]] == []
