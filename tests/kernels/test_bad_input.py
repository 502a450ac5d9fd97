"""Wrong arguments: every one is refused by name before anything is written, or does what the reference does.

A comparison does not see a read beyond a tensor. So half of the calls have their tensors end where unmapped memory
begins, which vector instructions cannot pass either, and all run again on a build with AddressSanitizer, which sees
both ends but not the masked vector instructions.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    KERNELS,
    REFERENCES,
    Call,
    assert_same_bits,
    decode_call,
    encode_call,
    head_call,
    splice_call,
    steer_call,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from steerserve.kernels.native import C

NUM_EXAMPLES = 500
ROOT = Path(__file__).parents[2]
LIBC = ctypes.CDLL(None, use_errno=True)

DIMS: dict[str, dict[str, str]] = {
    "steer_delta_": {
        "x": "N d", "ptr": "N", "slot": "E K", "op": "E", "value": "E", "score_index": "E G", "W_enc": "K d",
        "b_enc": "K", "threshold": "K", "max_norm": "K", "normalization": "K", "W_dec": "K d", "score_ptr": "N",
        "score_threshold": "G", "score": "G", "activation": "E", "edit": "E", "x_norm": "N",
    },
    "sae_encode": {
        "x": "B d", "W_enc": "F d", "b_enc": "F", "threshold": "F", "max_norm": "", "k": "C", "indices": "B C",
        "values": "B C", "count": "B",
    },
    "sae_decode": {
        "indices": "B C F", "values": "B C", "count": "B", "W_dec": "F d", "b_dec": "d", "out": "B d",
    },
    "sae_splice_": {
        "x": "N d", "rows": "R N", "ptr": "R", "feature": "E F", "op": "E", "value": "E", "W_enc": "F d", "b_enc": "F",
        "threshold": "F", "W_dec": "F d", "b_dec": "d", "max_norm": "", "normalization": "", "k": "C",
        "indices": "R C", "values": "R C", "count": "R", "activation": "E", "edit": "E", "x_norm": "R",
    },
    "head_scale_": {"z": "N H D", "ptr": "N E", "head": "E H", "scale": "E", "z_norm": "E"},
}  # fmt: skip
"""What each argument's size has to agree with: where one is damaged, any that shares a letter may be named."""

SEEN_THROUGH = {
    ("steer_delta_", "ptr"): {"score_index"},  # entries get another owner, whose score it is not
    ("steer_delta_", "score_ptr"): {"score_index"},
    ("sae_decode", "count"): {"indices"},  # beyond the row's features there are none
}
"""Arguments whose elements become wrong through those of another."""

NOT_FINITE = {"x", "z", "value", "scale", "threshold", "max_norm", "values", "score", "score_threshold"}
"""Float arguments whose elements may be anything; weights are checked when they are loaded."""

BAD_NUMBERS: dict[str, list[float]] = {
    "k": [-(2**63), -1, 2, 10**6, 2**63 - 1],
    "max_norm": [torch.nan, -torch.inf, -1.0, 0.0, 4.0],
    "normalization": [-1, 3, 2**32],
}


@st.composite
def valid_calls(draw: st.DrawFn) -> Call:
    """A call of any operator, with numbers on which it and its reference agree to the bit."""
    name = draw(st.sampled_from(sorted(KERNELS)))
    lengths = draw(st.lists(st.integers(0, 5), max_size=5))
    d, d_sae = draw(st.integers(1, 40)), draw(st.integers(1, 50))
    capacity = draw(st.integers(0, 20))
    types = {"dtype": draw(st.sampled_from(DTYPES)), "w_dtype": draw(st.sampled_from(DTYPES))}
    common = {"exact": True, "seed": draw(st.integers(0, 999))}
    if name == "steer_delta_":
        return steer_call(lengths, d, d_sae, **types, **common)
    if name == "head_scale_":
        return head_call(lengths, 3, d, dtype=types["dtype"], **common)
    if name == "sae_decode":
        return decode_call([min(n, capacity) for n in lengths], capacity, d, d_sae, **types, **common)
    k = draw(st.integers(0, capacity))
    if name == "sae_encode":
        return encode_call(len(lengths), d, d_sae, k=k, capacity=capacity, **types, **common)
    return splice_call(lengths, d, d_sae, k=k, capacity=capacity, **types, **common)


@dataclass(frozen=True)
class Damaged:
    """A call with one argument replaced: the errors that may follow, the names they may give, whether one must."""

    call: Call
    errors: set[type[Exception]]
    names: set[str]
    is_fatal: bool


@st.composite
def damages(draw: st.DrawFn, call: Call, name: str) -> Damaged:
    value = call.arguments[name]
    if not isinstance(value, Tensor):
        number = draw(st.sampled_from(BAD_NUMBERS[name]))
        return Damaged(call.replaced(**{name: number}), {ValueError}, {name}, is_fatal=False)
    damage = draw(
        st.sampled_from([of_other_elements, of_other_dtype, of_other_shape, swapped, strided, moved, misaligned])
    )
    return damage(draw, call, name, value)


def of_other_elements(draw: st.DrawFn, call: Call, name: str, value: Tensor) -> Damaged:
    changed = value.clone()
    if value.is_floating_point():
        bad = [torch.nan, torch.inf, -torch.inf] if name in NOT_FINITE else [0.0]
    else:
        bad = [0, 2, 6, 255] if value.dtype == torch.uint8 else [-(2**31), -2, -1, 0, 1, 3, 50, 2**31 - 1]
    if value.numel():
        changed.view(-1)[draw(st.integers(0, value.numel() - 1))] = draw(st.sampled_from(bad))
    names = {name} | SEEN_THROUGH.get((call.name, name), set())
    return Damaged(call.replaced(**{name: changed}), {ValueError}, names, is_fatal=False)


def of_other_dtype(draw: st.DrawFn, call: Call, name: str, value: Tensor) -> Damaged:
    never, perhaps = [torch.float64, torch.float16, torch.int64, torch.bool], [torch.float32, torch.bfloat16]
    dtype = draw(st.sampled_from(never + perhaps))
    names = {"W_enc", "W_dec"} if name in {"W_enc", "W_dec"} else {name}
    return Damaged(call.replaced(**{name: value.to(dtype)}), {TypeError}, names, dtype in never)


def of_other_shape(draw: st.DrawFn, call: Call, name: str, value: Tensor) -> Damaged:
    axis = draw(st.integers(0, value.dim() - 1))
    shorter = value.narrow(axis, 0, max(value.shape[axis] - 1, 0)).contiguous()
    longer = torch.cat([value, value.narrow(axis, 0, min(value.shape[axis], 1))], axis)
    changed = draw(st.sampled_from([shorter, longer, value[None], value.flatten(), value.sum().to(value.dtype)]))
    return Damaged(call.replaced(**{name: changed}), {ValueError}, of_same_size(call, name), is_fatal=False)


def swapped(draw: st.DrawFn, call: Call, name: str, value: Tensor) -> Damaged:
    tensors = [argument for argument in call.arguments.values() if isinstance(argument, Tensor)]
    other = draw(st.sampled_from(range(len(tensors))))
    names = of_same_size(call, name) | SEEN_THROUGH.get((call.name, name), set()) | {"W_enc", "W_dec"}
    return Damaged(call.replaced(**{name: tensors[other].clone()}), {TypeError, ValueError}, names, is_fatal=False)


def strided(draw: st.DrawFn, call: Call, name: str, value: Tensor) -> Damaged:
    columns = value.T.contiguous().T if value.dim() == 2 else value.repeat_interleave(2, 0)[::2]
    rows_apart = torch.cat([value, value], -1)[..., : value.shape[-1]]
    changed = draw(st.sampled_from([columns, rows_apart]))
    return Damaged(call.replaced(**{name: changed}), {ValueError}, {name}, is_fatal=False)


def moved(draw: st.DrawFn, call: Call, name: str, value: Tensor) -> Damaged:
    is_first = name == next(iter(call.arguments))
    names = set(call.arguments) if is_first else {name}  # the others are not where the first is
    return Damaged(call.replaced(**{name: value.to("meta")}), {ValueError}, names, is_fatal=True)


def misaligned(draw: st.DrawFn, call: Call, name: str, value: Tensor) -> Damaged:
    if value.numel() == 0 or value.itemsize == 1:
        return Damaged(call, set(), set(), is_fatal=False)
    memory = torch.frombuffer(bytearray(value.nbytes + 1), dtype=value.dtype, offset=1)
    changed = memory.view(value.shape).copy_(value)
    return Damaged(call.replaced(**{name: changed}), {ValueError}, {name}, is_fatal=True)


def of_same_size(call: Call, name: str) -> set[str]:
    dims = DIMS[call.name]
    return {other for other in dims if set(dims[other].split()) & set(dims[name].split())}


def test_a_damaged_call_is_refused_by_name_or_does_what_the_reference_does() -> None:
    outcomes: Counter[tuple[str, str]] = Counter()

    @given(data=st.data(), level=st.sampled_from(C.supported_simd_levels()), is_guarded=st.booleans())
    @settings(deadline=None, derandomize=True, max_examples=NUM_EXAMPLES, database=None)
    def attempt(data: st.DataObject, level: str, is_guarded: bool) -> None:
        call, errors, names, is_fatal = data.draw(valid_calls()), set(), set(), False
        for name in data.draw(st.lists(st.sampled_from(sorted(DIMS[call.name])), unique=True, max_size=2)):
            damage = data.draw(damages(call, name))
            call, is_fatal = damage.call, is_fatal or damage.is_fatal
            errors, names = errors | damage.errors, names | damage.names
        call = guarded(call) if is_guarded else call
        C.set_simd_level(level)
        outcomes[call.name, run_and_judge(call, errors, names, is_fatal)] += 1

    best = C.simd_level()
    try:
        attempt()
    finally:
        C.set_simd_level(best)
    for name in KERNELS:
        for outcome in ("refused", "done"):
            assert outcomes[name, outcome] >= NUM_EXAMPLES // 50, outcomes


def guarded(call: Call) -> Call:
    """The call with each contiguous tensor moved to the end of a page whose successor faults when touched."""
    return call.replaced(
        **{name: against_a_guard_page(v) if isinstance(v, Tensor) else v for name, v in call.arguments.items()}
    )


def against_a_guard_page(tensor: Tensor) -> Tensor:
    in_place = tensor.device.type == "meta" or not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize
    if in_place or tensor.numel() == 0:
        return tensor
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory, size))
    if LIBC.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)


def run_and_judge(call: Call, errors: set[type[Exception]], names: set[str], is_fatal: bool) -> str:
    before = call.copy()
    refusal = refusal_of(call)
    if refusal is None:
        assert not is_fatal, f"{names} passed"
        assert_same_arguments(call, before.run(REFERENCES[call.name]))
        return "done"
    assert type(refusal) in errors, f"{refusal!r}, not one of {errors}"
    assert re.split(r"[:\[]", str(refusal))[0] in names, f"{refusal!r} names none of {names}"
    assert_same_arguments(call, before)
    return "refused"


def refusal_of(call: Call) -> Exception | None:
    try:
        KERNELS[call.name](*call.arguments.values())
    except (TypeError, ValueError) as error:
        return error
    return None


def assert_same_arguments(call: Call, other: Call) -> None:
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and value.device.type != "meta":
            torch.testing.assert_close(
                value, other.arguments[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs"
            )


ENCODE, DECODE = encode_call(k=2, capacity=9), decode_call([3, 0, 9])
SPLICE, HEADS = splice_call([3, 2], rows=[1, 3], capacity=9), head_call([3, 2])
RULES: list[tuple[Call, str, Any, type[Exception], str]] = [
    (ENCODE, "x", ENCODE.x.half(), TypeError, "x: got torch.float16, expected torch.float32 or torch.bfloat16"),
    (ENCODE, "x", ENCODE.x[0], ValueError, "x: got shape (64,), expected [B, d]"),
    (ENCODE, "x", ENCODE.x[:1].expand(3, -1), ValueError, "x: got strides (0, 1), expected contiguous rows"),
    (ENCODE, "W_enc", ENCODE.W_enc.T, ValueError, "W_enc: got shape (64, 77), expected (64, 64)"),
    (ENCODE, "W_enc", ENCODE.W_enc.T.contiguous().T, ValueError, "W_enc: got strides (1, 77), expected a contiguous"),
    (
        ENCODE,
        "W_enc",
        ENCODE.W_enc.to("meta"),
        ValueError,
        "W_enc: got torch.strided tensor on meta that cannot be read",
    ),
    (ENCODE, "threshold", ENCODE.threshold.bfloat16(), TypeError, "threshold: got torch.bfloat16, expected torch.fl"),
    (ENCODE, "max_norm", torch.nan, ValueError, "max_norm: got NaN, expected a number"),
    (ENCODE, "k", 10, ValueError, "k: got 10, expected 0 for no limit, or at most 9, the capacity of indices"),
    (ENCODE, "k", -1, ValueError, "k: got -1, expected 0 for no limit"),
    (ENCODE, "values", ENCODE.values[:, 1:], ValueError, "values: got shape (3, 8), expected (3, 9)"),
    (DECODE, "indices", DECODE.indices + 80, ValueError, "indices["),
    (DECODE, "count", DECODE.count.long(), TypeError, "count: got torch.int64, expected torch.int32"),
    (DECODE, "out", DECODE.out[:, 1:], ValueError, "out: got shape (3, 63), expected (3, 64)"),
    (SPLICE, "rows", torch.tensor([3, 1]).int(), ValueError, "rows[1]: got 1, expected"),
    (SPLICE, "rows", torch.tensor([1, 1]).int(), ValueError, "rows[1]: got 1, expected"),
    (SPLICE, "rows", torch.tensor([1, 5]).int(), ValueError, "rows[1]: got 5, expected"),
    (SPLICE, "rows", torch.tensor([-1, 1]).int(), ValueError, "rows[0]: got -1, expected"),
    (SPLICE, "ptr", torch.tensor([0, 4, 3]).int(), ValueError, "ptr[2]: got 3, expected at least 4"),
    (SPLICE, "ptr", torch.tensor([0, 4, 6]).int(), ValueError, "ptr[2]: got 6, expected at most 5"),
    (SPLICE, "feature", SPLICE.feature + 77, ValueError, "feature[0]: got"),
    (SPLICE, "op", SPLICE.op * 0 + 6, ValueError, "op[0]: got 6, expected a code below 6"),
    (SPLICE, "value", SPLICE.value / 0, ValueError, "value[0]: got"),
    (SPLICE, "W_dec", SPLICE.W_dec.bfloat16(), TypeError, "W_dec: got torch.bfloat16, expected torch.float32"),
    (SPLICE, "normalization", 3, ValueError, "normalization: got 3, expected a Normalization"),
    (SPLICE, "k", 10, ValueError, "k: got 10, expected 0 for no limit, or at most 9"),
    (HEADS, "z", HEADS.z.transpose(1, 2), ValueError, "z: got strides"),
    (HEADS, "head", HEADS.head + 4, ValueError, "head[0]: got"),
    (HEADS, "scale", HEADS.scale * torch.nan, ValueError, "scale[0]: got"),
]


@pytest.mark.parametrize(("call", "name", "value", "error", "message"), RULES)
def test_an_error_says_what_is_wrong_with_which_argument(
    call: Call, name: str, value: Any, error: type[Exception], message: str
) -> None:
    bad = call.copy().replaced(**{name: value})
    before = bad.copy()
    with pytest.raises(error, match=re.escape(message)):
        KERNELS[call.name](*bad.arguments.values())
    assert_same_arguments(bad, before)


@pytest.mark.parametrize("call", [ENCODE, DECODE, SPLICE, HEADS, steer_call([3, 2])], ids=lambda call: call.name)
def test_a_call_without_memory_is_traced_and_half_of_one_refused(call: Call) -> None:
    traced = call.to("meta")
    KERNELS[call.name](*traced.arguments.values())
    last = list(call.arguments)[-1]
    for mixed in (traced.replaced(**{last: call.arguments[last]}), call.replaced(**{last: traced.arguments[last]})):
        with pytest.raises(ValueError, match=f"^{last}: "):
            KERNELS[call.name](*mixed.arguments.values())


def freed(tensor: Tensor) -> Tensor:
    """The tensor with its memory given back, as sharding libraries do."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W_enc", freed(ENCODE.W_enc), "W_enc: got torch.strided tensor on cpu that cannot be read"),
        ("W_enc", FakeTensorMode().from_tensor(ENCODE.W_enc), "W_enc: got torch.strided tensor on cpu that cannot"),
        ("x", torch._neg_view(ENCODE.x), "x: got a view of negated memory"),
        ("x", ENCODE.x.numpy(), "x: got numpy.ndarray, expected a torch.Tensor"),
        ("count", None, "count: got NoneType, expected a torch.Tensor"),
        ("values", ENCODE.values.clone().requires_grad_(), "values: requires grad"),
        ("threshold", ENCODE.threshold.to(torch.float8_e4m3fn), "threshold: got a 8-bit dtype, expected torch.float32"),
    ],
)
def test_what_only_looks_like_a_tensor_of_numbers_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        KERNELS["sae_encode"](*ENCODE.replaced(**{name: value}).arguments.values())


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold"])
@pytest.mark.parametrize("k", [0, 3])
def test_a_bank_with_a_nan_is_seen_by_encode_and_splice(name: str, k: int) -> None:
    for make in (lambda: encode_call(3, k=k), lambda: splice_call([3, 2], k=k)):
        call = make()
        call.arguments[name].view(-1)[70] = torch.nan
        after = call.run()
        assert (after.count == -1).all()
        assert_same_bits(after.indices, call.indices)
        assert_same_bits(after.x, call.x)
        if "activation" in call.arguments:
            assert after.activation.isnan().all()


@pytest.mark.parametrize("call", [ENCODE, DECODE, SPLICE, HEADS, steer_call([3, 2])], ids=lambda call: call.name)
def test_a_trace_holds_the_operator(call: Call) -> None:
    names = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]

    def run(*tensors: Tensor) -> Tensor:
        KERNELS[call.name](*(call.arguments | dict(zip(names, tensors, strict=True))).values())
        return tensors[0]

    graph = make_fx(run)(*call.copy().tensors)
    assert call.overload in [node.target for node in graph.graph.nodes]


def test_a_launch_without_memory_is_an_error_and_not_the_end() -> None:
    """Of a thread of the team too, whose exceptions must not leave it."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, Path(__file__).parent], capture_output=True, text=True)
    assert done.stdout.strip() == "MemoryError", done.stderr


OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from kernel_cases import KERNELS, encode_call
torch.set_num_threads(2)
KERNELS["sae_encode"](*encode_call(64, 64, 8192).arguments.values())
arguments = encode_call(1500, 64, 8192, k=8000, capacity=8000).arguments.values()
with open("/proc/self/statm") as statm:
    size = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20),) * 2)
try:
    KERNELS["sae_encode"](*arguments)
except MemoryError:
    print("MemoryError")
"""


SANITIZED_RUN = """
import sys
import steerserve.kernels
steerserve.kernels.__path__.insert(0, sys.argv[1])
from steerserve.kernels.native import C
assert C.__file__.startswith(sys.argv[1]), C.__file__
{body}
"""

OVERRUN = """
import torch
C.set_simd_level("scalar")
z, ptr, entry = torch.zeros(1, 1, 9), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1)
z.untyped_storage().resize_(32)  # it says that it has 9 elements, and has 8
C.head_scale(z, ptr, entry.int(), entry, entry.clone(), 1)
"""

TESTS = """
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
SANITIZED_TESTS = [
    "test_bad_input.py::test_a_damaged_call_is_refused_by_name_or_does_what_the_reference_does",
    "test_steer_delta.py::test_ragged_batches_are_the_formula",
    "test_sae_encode.py::test_any_batch_is_the_formula",
    "test_sae_decode.py::test_any_batch_is_the_formula",
    "test_sae_splice.py::test_any_batch_is_the_formula",
    "test_head_scale.py::test_any_batch_is_the_formula",
    "test_linear.py::test_any_shape_is_the_formula_and_reads_no_further",
    "test_attend.py::test_any_step_is_the_formula",
]


def test_the_extension_survives_all_this_under_address_sanitizer(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={tmp_path}/temp", f"--build-lib={tmp_path}"]
    flags = {"CXXFLAGS": "-O1 -g1 -w -fsanitize=address", "STEERSERVE_CUDA": "0"}
    subprocess.run(build, cwd=ROOT, env=os.environ | flags, check=True, timeout=200)

    overrun = run_sanitized(tmp_path, OVERRUN)
    assert overrun.returncode != 0
    assert "heap-buffer-overflow" in overrun.stderr, "the sanitizer does not see this build"

    tests = [f"{Path(__file__).parent}/{test}" for test in SANITIZED_TESTS]
    clean = run_sanitized(tmp_path, TESTS, *tests)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert f"{len(tests)} passed" in clean.stdout


def run_sanitized(build: Path, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # libstdc++ beside it, or the sanitizer would miss the exceptions of a library that is loaded later.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    env = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, "-c", SANITIZED_RUN.format(body=body), f"{build}/steerserve/kernels", *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=200,
    )
