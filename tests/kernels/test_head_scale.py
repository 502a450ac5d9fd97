"""head_scale against its definition in float64, and the guarantees that its callers rest on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_compiles, assert_same_bits, head_call
from kernel_formulas import assert_is_the_formula

from steerserve.kernels.head_scale import head_scale_, head_scale_ref_

KERNELS = [head_scale_, head_scale_ref_]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_head", [1, 7, 33, 64])
def test_every_shape_and_type_is_the_formula(level: str, d_head: int, dtype: torch.dtype) -> None:
    call = head_call([3, 0, 9, 1, 4], 5, d_head, dtype=dtype, seed=d_head)
    assert_is_the_formula(call, call.run())


@given(
    lengths=st.lists(st.integers(0, 7), max_size=7),
    num_heads=st.integers(1, 6),
    d_head=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_batch_is_the_formula(
    lengths: list[int], num_heads: int, d_head: int, dtype: torch.dtype, seed: int
) -> None:
    call = head_call(lengths, num_heads, d_head, dtype=dtype, seed=seed)
    for kernel in KERNELS:
        assert_is_the_formula(call, call.run(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_one_reads_and_keeps_the_bits(level: str, dtype: torch.dtype, kernel: Callable[..., None]) -> None:
    call = head_call([4, 4], dtype=dtype)
    call.scale.fill_(1.0)
    call.z[0, 0, :3] = torch.tensor([-0.0, torch.nan, torch.inf])
    after = call.run(kernel)
    assert_same_bits(after.z, call.z)
    assert (after.z_norm[4:] > 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_head_named_twice_is_scaled_twice_in_order(level: str, kernel: Callable[..., None]) -> None:
    call = head_call([3], 2, 8)
    call.head[:] = 1
    call.scale[:] = torch.tensor([0.5, 0.0, 3.0])
    after = call.run(kernel)
    norm = call.z[0, 1].norm()
    torch.testing.assert_close(after.z_norm, torch.stack([norm, norm / 2, norm * 0]))
    assert (after.z[0, 1] == 0).all()
    assert_same_bits(after.z[0, 0], call.z[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_or_threads(level: str, dtype: torch.dtype, four_threads: None) -> None:
    lengths = [32, 0, 17, 31, 1, 30] * 4
    call = head_call(lengths, 32, 257, dtype=dtype)  # enough work for several threads
    threaded = call.run()
    torch.set_num_threads(1)
    single = call.run()
    assert_same_bits(threaded.z, single.z)
    assert_same_bits(threaded.z_norm, single.z_norm)
    alone = head_call([17], 32, 257)
    own = slice(32, 49)
    alone = alone.replaced(z=call.z[2:3], head=call.head[own], scale=call.scale[own]).run()
    assert_same_bits(alone.z[0], threaded.z[2])
    assert_same_bits(alone.z_norm, threaded.z_norm[own])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_and_nothing_beside_them_is_written(level: str, dtype: torch.dtype) -> None:
    call = head_call([3, 0, 9], 3, 13, dtype=dtype)
    surrounding = torch.full((7, 5, 13), 3.0, dtype=dtype)
    window = surrounding[1:7:2, 1:4]
    window.copy_(call.z)
    head_scale_(*call.copy().replaced(z=window).arguments.values())
    assert_same_bits(window, call.run().z)
    window.fill_(3.0)
    assert (surrounding == 3.0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_entries_beyond_the_last_offset_are_spare_room(level: str, kernel: Callable[..., None]) -> None:
    call = head_call([3, 2])
    spare = torch.tensor([99, -1], dtype=torch.int32)
    roomy = call.replaced(
        head=torch.cat([call.head, spare]),
        scale=torch.cat([call.scale, torch.tensor([torch.nan, 2.0])]),
        z_norm=torch.cat([call.z_norm, torch.tensor([7.0, 7.0])]),
    ).run(kernel)
    assert_same_bits(roomy.z, call.run(kernel).z)
    assert roomy.z_norm[5:].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("num_rows", "num_heads"), [(0, 4), (3, 0), (3, 4)])
def test_nothing_to_do_is_fine(level: str, num_rows: int, num_heads: int, kernel: Callable[..., None]) -> None:
    call = head_call([0] * num_rows, num_heads)
    assert_same_bits(call.run(kernel).z, call.z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_registration(dtype: torch.dtype) -> None:
    call = head_call([3, 0, 5], dtype=dtype)
    torch.library.opcheck(call.overload, tuple(call.arguments.values()))


def test_a_compiled_graph_scales() -> None:
    assert_compiles(head_call([3, 0, 5]))
