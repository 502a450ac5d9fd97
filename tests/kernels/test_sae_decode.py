"""sae_decode against its definition in float64, and the guarantees that its callers rest on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BUILT_IN, DTYPES, assert_compiles, assert_same_bits, decode_call
from kernel_formulas import assert_is_the_formula

from steerserve.kernels.sae_decode import sae_decode, sae_decode_ref
from steerserve.sae.registry import load_sae

KERNELS = [sae_decode, sae_decode_ref]


@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 33, 577])
def test_every_shape_and_type_is_the_formula(level: str, d: int, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    call = decode_call([3, 0, 9, 1, 4], d=d, dtype=dtype, w_dtype=w_dtype, seed=d)
    assert_is_the_formula(call, call.run())


@given(
    counts=st.lists(st.integers(-1, 14), max_size=9),
    capacity=st.integers(0, 12),
    d=st.integers(1, 150),
    d_sae=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_batch_is_the_formula(
    counts: list[int], capacity: int, d: int, d_sae: int, dtype: torch.dtype, w_dtype: torch.dtype, seed: int
) -> None:
    call = decode_call(counts, capacity, d, d_sae, dtype=dtype, w_dtype=w_dtype, seed=seed)
    for kernel in KERNELS:
        assert_is_the_formula(call, call.run(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_known_is_nan_and_its_neighbours_are_not(
    level: str, dtype: torch.dtype, kernel: Callable[..., None]
) -> None:
    after = decode_call([2, -1, 3, 10, 9], capacity=9, dtype=dtype).run(kernel)
    assert after.out.isnan().all(1).tolist() == [False, True, False, True, False]
    assert after.out[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_feature_listed_twice_adds_up(level: str, kernel: Callable[..., None]) -> None:
    call = decode_call([3], exact=True)
    call.indices[:, :3] = 5
    after = call.run(kernel)
    assert torch.equal(after.out[0], call.values[0, :3].sum() * call.W_dec[5] + call.b_dec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 9])
def test_a_row_does_not_depend_on_its_neighbours_or_threads(
    level: str, num_rows: int, dtype: torch.dtype, four_threads: None
) -> None:
    counts = [400, 0, 31, 399, 64, 1, 30, 255, 77][:num_rows]
    call = decode_call(counts, 400, 1201, 500, dtype=dtype)  # enough work for several threads
    threaded = call.run()
    torch.set_num_threads(1)
    assert_same_bits(call.run().out, threaded.out)
    last = num_rows - 1
    other = decode_call([7] * last + [counts[last]], 400, 1201, 500, dtype=dtype, seed=1)
    other.indices[last], other.values[last] = call.indices[last], call.values[last]
    after = other.replaced(W_dec=call.W_dec, b_dec=call.b_dec).run()
    assert_same_bits(after.out[last], threaded.out[last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_and_nothing_beside_them_is_written(level: str, dtype: torch.dtype) -> None:
    call = decode_call([3, 0, 9], d=45, dtype=dtype)
    surrounding = torch.full((7, 61), 3.0, dtype=dtype)
    window = surrounding[1:7:2, 9:54]
    sae_decode(*call.replaced(out=window).arguments.values())
    assert_same_bits(window, call.run().out)
    window.fill_(3.0)
    assert (surrounding == 3.0).all()


@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_built_in_sae_decodes_as_its_equations_say(level: str, num_rows: int) -> None:
    sae = load_sae(BUILT_IN)
    call = decode_call([60] * num_rows, 64, sae.d_in, sae.d_sae)
    call = call.replaced(W_dec=sae.W_dec, b_dec=sae.b_dec)
    f = torch.zeros(num_rows, sae.d_sae)
    f.scatter_add_(1, call.indices[:, :60].long(), call.values[:, :60])
    torch.testing.assert_close(call.run().out, sae.decode(f), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("num_rows", "capacity"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_add_is_the_bias(level: str, num_rows: int, capacity: int, kernel: Callable[..., None]) -> None:
    call = decode_call([0] * num_rows, capacity)
    assert torch.equal(call.run(kernel).out, call.b_dec.expand(num_rows, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_registration(dtype: torch.dtype) -> None:
    call = decode_call([3, 0, -1], dtype=dtype)
    torch.library.opcheck(call.overload, tuple(call.arguments.values()))


def test_a_compiled_graph_decodes() -> None:
    assert_compiles(decode_call([3, 0, -1]))
