"""Every operator on a GPU does what it does on the CPU; the CPU runs the same tests, so that they are known to work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import (
    KERNELS,
    OPERATORS,
    REFERENCES,
    Call,
    assert_same_bits,
    decode_call,
    encode_call,
    head_call,
    splice_call,
    steer_call,
)
from kernel_formulas import assert_is_the_formula
from torch import Tensor

from steerserve.kernels import backend
from steerserve.kernels.native import C
from steerserve.kernels.steer_delta import Normalization

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PLACES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.float32, marks=GPU),
    pytest.param("cuda", torch.bfloat16, marks=GPU),
    pytest.param("cuda", torch.float16, marks=GPU),
]
W_DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [([0, 3, 1], 1), ([2], 7), ([5, 0, 9, 1, 4] * 4, 64), ([40, 70], 576), ([1, 0, 2], 2304)]
"""Entries of each row, and d."""

MAKERS: dict[str, Callable[..., list[Call]]] = {
    "steer_delta_": lambda lengths, d, **options: [steer_call(lengths, d, **options)],
    "sae_encode": lambda lengths, d, **options: [
        encode_call(len(lengths), d, 200, k=k, capacity=capacity, **options)
        for k, capacity in ((0, 200), (7, 9), (0, 6))
    ],
    "sae_decode": lambda lengths, d, **options: [decode_call([*lengths, -1, 99], 64, d, 200, **options)],
    "sae_splice_": lambda lengths, d, **options: [
        splice_call(lengths, d, 200, k=k, capacity=capacity, **options) for k, capacity in ((0, 200), (7, 9), (0, 60))
    ],
    "head_scale_": lambda lengths, d, w_dtype, **options: [head_call(lengths, 4, d, **options)],
}


def assert_same_written(a: Call, b: Call) -> None:
    for name in a.written:
        torch.testing.assert_close(
            a.arguments[name].cpu(), b.arguments[name].cpu(), rtol=0, atol=0, equal_nan=True, msg=f"{name} differs"
        )


@pytest.mark.parametrize("w_dtype", W_DTYPES)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_on_exact_numbers_it_is_the_reference_to_the_bit(
    name: str, shape: tuple[list[int], int], device: str, dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    for call in MAKERS[name](*shape, dtype=dtype, w_dtype=w_dtype, exact=True):
        assert_same_written(call.to(device).run(), call.run(REFERENCES[name]))


@pytest.mark.parametrize("w_dtype", W_DTYPES)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_on_any_numbers_it_is_the_formula(
    name: str, shape: tuple[list[int], int], device: str, dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    for call in MAKERS[name](*shape, dtype=dtype, w_dtype=w_dtype):
        assert_is_the_formula(call, call.to(device).run())


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("normalization", Normalization)
def test_splice_normalizes(device: str, dtype: torch.dtype, normalization: Normalization) -> None:
    for max_norm in (torch.inf, 8.0):
        call = splice_call([3, 0, 9, 1], 64, 200, normalization=normalization, max_norm=max_norm, dtype=dtype)
        assert_is_the_formula(call, call.to(device).run())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KERNELS)
def test_the_same_call_gives_the_same_bits(name: str, device: str) -> None:
    for call in MAKERS[name]([5, 0, 9, 1, 4] * 9, 577, dtype=torch.bfloat16, w_dtype=torch.float32):
        once, again = call.to(device).run(), call.to(device).run()
        for written in call.written:
            assert_same_bits(once.arguments[written].cpu(), again.arguments[written].cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_lie_apart(device: str) -> None:
    call = splice_call([5, 0, 2], 45, dtype=torch.bfloat16).to(device)
    surrounding = torch.full((len(call.x), 61), 3.0, dtype=torch.bfloat16, device=device)
    window = surrounding[:, 9:54]  # rows that no 16-byte load may start at
    window.copy_(call.x)
    KERNELS[call.name](*call.copy().replaced(x=window).arguments.values())
    assert_same_bits(window.cpu(), call.run().x.cpu())
    window.fill_(3.0)
    assert (surrounding == 3.0).all()


def recorded(call: Call) -> Callable[[], None]:
    """The call, to be run again on the same buffers; on a GPU a captured graph."""

    def launch() -> None:
        KERNELS[call.name](*call.arguments.values())

    if next(iter(call.arguments.values())).device.type == "cpu":
        return launch
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        launch()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


PLANS = [[5, 0, 9, 2], [0, 16, 0, 0], [4, 4, 4, 4], [16, 0, 0, 0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_captured_graph_serves_every_plan(name: str, device: str) -> None:
    calls = [
        MAKERS[name](plan, 96, dtype=torch.bfloat16, w_dtype=torch.bfloat16, exact=True, seed=seed)[0]
        for seed, plan in enumerate(PLANS)
    ]
    buffers = calls[0].to(device).copy()
    replay = recorded(buffers)
    for call in (*calls, calls[0]):
        for argument, value in call.arguments.items():
            if isinstance(value, Tensor):
                buffers.arguments[argument].copy_(value)
        replay()
        assert_same_written(buffers, call.run(REFERENCES[name]))


@pytest.mark.gpu
def test_it_runs_on_the_current_stream() -> None:
    call = encode_call(4, 512, 4000, exact=True).to("cuda")
    call.run()  # loads the kernel, which takes longer than the sleep below
    done, other = call.copy(), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.cuda._sleep(10**8)  # the kernel has to wait for it
        KERNELS[call.name](*done.arguments.values())
    torch.cuda.current_stream().synchronize()
    assert not other.query()
    assert_same_bits(done.count, call.count)
    other.synchronize()
    assert_same_written(done, call.to("cpu").run(REFERENCES[call.name]))


BAD_ELEMENTS: list[tuple[Call, str, Any, str]] = [
    (steer_call([3, 2]), "slot", -1, "activation"),
    (steer_call([3, 2]), "slot", 9, "activation"),
    (steer_call([3, 2]), "op", 6, "activation"),
    (steer_call([3, 2]), "value", torch.nan, "activation"),
    (splice_call([3, 2]), "feature", -1, "activation"),
    (splice_call([3, 2]), "feature", 77, "activation"),
    (splice_call([3, 2]), "op", 6, "activation"),
    (splice_call([3, 2]), "value", torch.inf, "activation"),
    (head_call([3, 2]), "head", 4, "z_norm"),
    (head_call([3, 2]), "scale", torch.nan, "z_norm"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "name", "bad", "report"), BAD_ELEMENTS)
def test_a_bad_element_is_reported_as_nan_and_edits_nothing(call: Call, name: str, bad: Any, report: str) -> None:
    call, entry = call.copy(), 1
    call.arguments[name][entry] = bad
    after = call.to("cuda").run().to("cpu")
    assert after.arguments[report].isnan().tolist() == [i == entry for i in range(5)]
    if "edit" in call.arguments:
        assert after.edit[entry] == 0


@pytest.mark.gpu
def test_an_index_outside_of_the_dictionary_decodes_to_nan() -> None:
    call = decode_call([3, 2, 4])
    call.indices[1, 1] = 77
    assert call.to("cuda").run().out.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("row", [-1, 2**31 - 1])
def test_a_row_outside_of_the_activations_is_left_out(row: int) -> None:
    call = splice_call([3, 2], rows=[0, 1])
    call.rows[0 if row < 0 else 1] = row
    after = call.to("cuda").run().to("cpu")
    assert after.count.tolist().count(-1) == 1
    assert_same_bits(after.x[2:], call.x[2:])


@pytest.mark.parametrize("name", KERNELS)
def test_the_gpu_path_launches_what_the_cpu_path_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's kernels in place of the GPU's, which bind the same signatures."""
    sizes = []

    def workspace(*size: int) -> int:
        sizes.append(size)
        return 64

    def on_a_stream(kernel: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            assert arguments[-1] == 1234
            kernel(*arguments[:-1], 1)

        return launch

    kernels = ("steer_delta", "sae_encode", "sae_decode", "sae_splice", "head_scale")
    stand_in = SimpleNamespace(sae_encode_workspace=workspace, sae_splice_workspace=workspace)
    for kernel in kernels:
        setattr(stand_in, kernel, on_a_stream(getattr(C, kernel)))
    monkeypatch.setattr(backend, "cuda_module", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    call = MAKERS[name]([3, 0, 2], 64, dtype=torch.float32, w_dtype=torch.float32)[0]
    done = call.copy()
    OPERATORS[name].run_on_cuda(*done.arguments.values())
    assert_same_written(done, call.run())
    assert sizes == ([(3, 200)] if OPERATORS[name].workspace_for else [])


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "steerserve.kernels._cuda", None)
    backend.cuda_module.cache_clear()
    with pytest.raises(RuntimeError, match="built without CUDA kernels"):
        backend.cuda_module()
