"""sae_encode against its definition in float64, and the guarantees that its callers rest on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BUILT_IN, DTYPES, Call, assert_compiles, assert_same_bits, encode_call, unwritten
from kernel_formulas import assert_encoded_exactly, assert_is_the_formula

from steerserve.kernels.sae_encode import SparseFeatures, sae_encode, sae_encode_ref
from steerserve.sae.registry import load_sae

KERNELS = [sae_encode, sae_encode_ref]


def features_of(call: Call) -> SparseFeatures:
    return SparseFeatures(call.indices, call.values, call.count)


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "d_sae"), [(1, 3), (7, 64), (33, 1), (64, 77), (577, 130)])
def test_every_shape_and_type_is_the_formula(
    level: str, d: int, d_sae: int, dtype: torch.dtype, w_dtype: torch.dtype, k: int
) -> None:
    for num_rows in (1, 5):
        call = encode_call(num_rows, d, d_sae, k=min(k, d_sae), dtype=dtype, w_dtype=w_dtype, seed=d)
        assert_is_the_formula(call, call.run())
        call = encode_call(num_rows, d, d_sae, k=min(k, d_sae), dtype=dtype, w_dtype=w_dtype, exact=True, seed=d)
        assert_encoded_exactly(call, call.run())


@given(
    num_rows=st.integers(0, 19),
    d=st.integers(1, 70),
    d_sae=st.integers(1, 300),
    k=st.integers(0, 12),
    room=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from(DTYPES),
    exact=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_batch_is_the_formula(
    num_rows: int,
    d: int,
    d_sae: int,
    k: int,
    room: int,
    dtype: torch.dtype,
    w_dtype: torch.dtype,
    exact: bool,
    seed: int,
) -> None:
    call = encode_call(num_rows, d, d_sae, k=k, capacity=k + room, dtype=dtype, w_dtype=w_dtype, exact=exact, seed=seed)
    for kernel in KERNELS:
        assert_is_the_formula(call, call.run(kernel))
        if exact:
            assert_encoded_exactly(call, call.run(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_of_equal_values_the_lower_index_is_larger(level: str, kernel: Callable[..., None]) -> None:
    call = encode_call(2, 32, 200, k=7, exact=True)
    call.W_enc[:] = call.W_enc[:1].clone()
    call.b_enc.zero_()
    call.x[:] = call.W_enc[:2]
    call.b_enc[150] = 1.0
    after = call.run(kernel)
    assert after.indices[:, :7].tolist() == [[0, 1, 2, 3, 4, 5, 150]] * 2
    assert_encoded_exactly(call, after)


def test_top_k_is_torch_topk(level: str) -> None:
    call = encode_call(6, 64, 500, k=10)
    call.threshold.fill_(-torch.inf)
    after = call.run()
    values, indices = (call.x @ call.W_enc.T + call.b_enc).topk(10)
    expected = torch.zeros(6, 500).scatter_(1, indices, values)
    assert after.count.tolist() == [10] * 6
    torch.testing.assert_close(features_of(after).to_dense(500), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capacity", [0, 4])
def test_a_row_that_does_not_fit_says_how_many_there_are(
    level: str, capacity: int, kernel: Callable[..., None]
) -> None:
    call = encode_call(3, 16, 300, capacity=capacity, exact=True)
    after = call.run(kernel)
    assert (after.count > capacity).all()
    assert_encoded_exactly(call, after)
    assert features_of(after).to_dense(300).isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_row_whose_norm_is_not_finite_has_no_count(
    level: str, poison: float, dtype: torch.dtype, kernel: Callable[..., None]
) -> None:
    call = encode_call(3, dtype=dtype)
    healthy = call.run(kernel)
    call.x[1, 3] = poison
    after = call.run(kernel)
    assert after.count.tolist() == [int(healthy.count[0]), -1, int(healthy.count[2])]
    assert_same_bits(after.indices[1], call.indices[1])
    for row in (0, 2):
        assert_same_bits(after.indices[row], healthy.indices[row])
        assert_same_bits(after.values[row], healthy.values[row])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", [0, 3])
def test_nothing_is_active_beyond_the_largest_norm(level: str, k: int, kernel: Callable[..., None]) -> None:
    call = encode_call(2, 64, k=k, max_norm=50.0)
    call.x[0] *= 100  # an attention sink
    call.x[1] *= 50.0 / call.x[1].norm() * (1 - 1e-6)
    after = call.run(kernel)
    assert after.count[0] == 0
    assert after.count[1] > 0
    assert_same_bits(after.values[0], call.values[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_threshold_is_exclusive_and_the_largest_norm_inclusive(level: str, kernel: Callable[..., None]) -> None:
    call = encode_call(1, 40, 50, exact=True)
    call.x.zero_()
    call.x[0, :2] = torch.tensor([3.0, 4.0])  # of norm 5
    below_5 = torch.nextafter(torch.tensor(5.0), torch.tensor(0.0)).item()
    pre = (call.x @ call.W_enc.T + call.b_enc)[0]
    call.threshold.copy_(pre)
    call.threshold[::3] = torch.nextafter(pre[::3], torch.tensor(-torch.inf))
    after = call.replaced(max_norm=5.0).run(kernel)
    assert after.indices[0, : after.count[0]].tolist() == list(range(0, 50, 3))
    assert call.replaced(max_norm=below_5).run(kernel).count.tolist() == [0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_thresholds_reach_from_everything_to_nothing(level: str, kernel: Callable[..., None]) -> None:
    call = encode_call(4, 33, 70)
    call.threshold[:35], call.threshold[35:] = -torch.inf, torch.inf
    after = call.run(kernel)
    assert after.count.tolist() == [35] * 4
    assert (after.values[:, :35] < 0).any()
    expected = call.x @ call.W_enc.T + call.b_enc
    torch.testing.assert_close(after.values[:, :35], expected[:, :35])


@pytest.mark.parametrize("k", [0, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_a_row_does_not_depend_on_its_neighbours_or_threads(
    level: str, num_rows: int, dtype: torch.dtype, k: int, four_threads: None
) -> None:
    call = encode_call(num_rows, 301, 1500, k=k, dtype=dtype)  # enough work for several threads
    threaded = call.run()
    torch.set_num_threads(1)
    assert_same_written(call.run(), threaded, range(num_rows))
    other = encode_call(num_rows, 301, 1500, k=k, dtype=dtype, seed=1).x
    other[num_rows // 2] = call.x[num_rows // 2]
    assert_same_written(call.replaced(x=other).run(), threaded, [num_rows // 2])


def assert_same_written(a: Call, b: Call, rows: range | list[int]) -> None:
    for name in ("indices", "values", "count"):
        assert_same_bits(getattr(a, name)[rows], getattr(b, name)[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "d_sae"), [(577, 300), (1100, 45)])
def test_a_row_has_the_same_bits_in_any_batch(level: str, d: int, d_sae: int, dtype: torch.dtype) -> None:
    call = encode_call(70, d, d_sae, dtype=dtype, w_dtype=dtype)
    whole = call.run()
    for num_rows in (1, 2, 5, 16, 17, 33):
        part = call.replaced(x=call.x[-num_rows:], **vars(unwritten(num_rows, d_sae))).run()
        for name in ("indices", "values", "count"):
            assert_same_bits(part.arguments[name], whole.arguments[name][-num_rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(level: str, dtype: torch.dtype) -> None:
    call = encode_call(3, 45, dtype=dtype)
    surrounding = torch.full((7, 61), torch.nan, dtype=dtype)
    window = surrounding[1:7:2, 9:54]
    window.copy_(call.x)
    apart = call.replaced(x=window)
    sae_encode(*apart.arguments.values())
    assert_same_written(apart, call.run(), range(3))


@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_built_in_sae_encodes_as_its_equations_say(level: str, num_rows: int) -> None:
    sae = load_sae(BUILT_IN)
    x = 40 * torch.randn(num_rows, sae.d_in, generator=torch.Generator().manual_seed(0))
    x[1:2] *= 1e4  # beyond its domain
    features = unwritten(num_rows, sae.d_sae)
    sae_encode(x, sae.W_enc.T.contiguous(), sae.encoder_bias(), sae.threshold, sae.max_norm, 0, *features)
    expected = sae.encode(x)
    assert (features.count > 10).tolist() == [True, False, True, True][:num_rows]
    dense = features.to_dense(sae.d_sae)
    on_the_edge = ((dense == 0) != (expected == 0)) & (
        (x @ sae.W_enc + sae.encoder_bias() - sae.threshold).abs() < 1e-3
    )
    assert on_the_edge.sum() <= 1
    torch.testing.assert_close(dense[~on_the_edge], expected[~on_the_edge], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("num_rows", "d_sae"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_do_is_fine(level: str, num_rows: int, d_sae: int, kernel: Callable[..., None]) -> None:
    after = encode_call(num_rows, 16, d_sae).run(kernel)
    assert after.count.tolist() == [0] * num_rows


def test_dense_features_tell_what_is_not_known() -> None:
    features = SparseFeatures.empty(4, 2)
    features.indices[:] = torch.tensor([[1, 4], [-9, -9], [-9, -9], [-9, -9]])
    features.values[:] = torch.tensor([[2.0, 3.0], [torch.nan, 1.0], [5.0, 6.0], [7.0, 8.0]])
    features.count[:] = torch.tensor([2, 0, -1, 3])
    dense = features.to_dense(5)
    assert dense[:2].tolist() == [[0, 2, 0, 0, 3], [0, 0, 0, 0, 0]]
    assert dense[2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_registration(dtype: torch.dtype) -> None:
    call = encode_call(3, k=2, capacity=4, dtype=dtype)
    torch.library.opcheck(call.overload, tuple(call.arguments.values()))


def test_a_compiled_graph_encodes() -> None:
    assert_compiles(encode_call(3, k=2, capacity=4))
