"""linear against its definition in float64, and the guarantee that batches rest on: a row's bits are its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_same_bits
from test_bad_input import against_a_guard_page
from torch import Tensor

from steerserve.kernels.linear import linear, linear_ref

LINEARS = [linear, linear_ref]

# Within, at and beyond the steps of every kernel: 4 features, 16 lanes, tiles of 32 x 32, blocks of 1024.
SHAPES = [(1, 1), (7, 3), (16, 31), (32, 32), (33, 40), (577, 65), (64, 300), (1537, 49)]


def numbers(num_rows: int, d_in: int, d_out: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in [(num_rows, d_in), (d_out, d_in), (d_out,)])
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def assert_is_the_formula(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of a float32 sum in any order, and of the one to the type of ``out``."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = size * (2 + weight.shape[1] / 8) * torch.finfo(torch.float32).eps + exact.abs() * torch.finfo(out.dtype).eps
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_every_shape_and_type_is_the_formula(
    level: str, num_rows: int, d_in: int, d_out: int, dtype: torch.dtype
) -> None:
    x, weight, bias = numbers(num_rows, d_in, d_out, dtype)
    assert_is_the_formula(linear(x, weight, bias), x, weight, bias)
    assert_is_the_formula(linear(x, weight), x, weight, None)


@given(
    num_rows=st.integers(0, 40),
    d_in=st.integers(0, 150),
    d_out=st.integers(0, 100),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_shape_is_the_formula_and_reads_no_further(
    num_rows: int, d_in: int, d_out: int, with_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    x, weight, bias = map(against_a_guard_page, numbers(num_rows, d_in, d_out, dtype, seed))
    arguments = (x, weight, bias if with_bias else None)
    assert_is_the_formula(linear(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 31), (45, 100), (1100, 129)])
def test_a_row_has_the_same_bits_in_any_batch(
    level: str, d_in: int, d_out: int, dtype: torch.dtype, four_threads: None
) -> None:
    x, weight, bias = numbers(300, d_in, d_out, dtype)
    alone = torch.cat([linear(row[None], weight, bias) for row in x])
    for num_rows in [2, 3, 6, 7, 15, 16, 17, 31, 32, 33, 48, 300]:
        assert_same_bits(linear(x[:num_rows], weight, bias), alone[:num_rows])
        assert_same_bits(linear(x[-num_rows:], weight, bias), alone[-num_rows:])
    torch.set_num_threads(1)
    assert_same_bits(linear(x, weight, bias), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(level: str, dtype: torch.dtype) -> None:
    x, weight, bias = numbers(20, 70, 50, dtype)
    clean = linear(x, weight, bias)
    x[7], x[11] = torch.nan, torch.inf
    out = linear(x, weight, bias)
    others = [row for row in range(20) if row not in (7, 11)]
    assert_same_bits(out[others], clean[others])
    assert out[7].isnan().all()
    assert not out[11].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_under_any_leading_axes(level: str, dtype: torch.dtype) -> None:
    x, weight, bias = numbers(24, 45, 40, dtype)
    wide = torch.zeros(24, 61, dtype=dtype)
    wide[:, 9:54] = x
    expected = linear(x, weight, bias)
    assert_same_bits(linear(wide[:, 9:54], weight, bias), expected)
    assert_same_bits(linear(wide.view(2, 3, 4, 61)[..., 9:54], weight, bias), expected.view(2, 3, 4, 40))
    assert_same_bits(linear(x.view(1, 24, 1, 45), weight, bias), expected.view(1, 24, 1, 40))
    assert_same_bits(linear(x[3], weight, bias), expected[3])


@pytest.mark.parametrize("linear", LINEARS)
def test_no_rows_no_inputs_and_no_outputs(level: str, linear: Callable[..., Tensor]) -> None:
    assert linear(torch.ones(0, 5), torch.ones(3, 5), torch.ones(3)).shape == (0, 3)
    assert linear(torch.ones(2, 5), torch.ones(0, 5), torch.ones(0)).shape == (2, 0)
    assert torch.equal(linear(torch.ones(2, 0), torch.ones(3, 0), torch.ones(3)), torch.ones(2, 3))


VALID = {"x": torch.ones(4, 6), "weight": torch.ones(5, 6), "bias": torch.ones(5)}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": torch.ones(4, 6).half()}, TypeError, r"x: got torch\.float16"),
        ({"x": torch.ones(4, 6).bfloat16()}, TypeError, r"weight: got torch\.float32, expected torch\.bfloat16"),
        ({"weight": torch.ones(5, 6, dtype=torch.int64)}, TypeError, r"weight: got torch\.int64"),
        ({"bias": torch.ones(5, dtype=torch.float64)}, TypeError, r"bias: got torch\.float64"),
        ({"x": torch.ones(4, 7)}, ValueError, r"x: got shape \(4, 7\), expected \[\.\.\., 6\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: got shape \(\)"),
        ({"weight": torch.ones(6)}, ValueError, r"weight: got shape \(6,\)"),
        ({"bias": torch.ones(6)}, ValueError, r"bias: got shape \(6,\), expected \(5,\)"),
        ({"weight": torch.ones(6, 5).T}, ValueError, "weight: got strides"),
        ({"bias": torch.ones(10)[::2]}, ValueError, "bias: got strides"),
        ({"x": torch.ones(6, 4).T}, ValueError, "x: got elements of a row that lie apart"),
        ({"x": torch.ones(2, 3, 9, 6)[:, :2, ::4]}, ValueError, "x: got rows that lie unevenly apart"),
        ({"weight": torch.ones(5, 6, requires_grad=True)}, ValueError, "weight: requires grad"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Tensor], error: type[Exception], message: str) -> None:
    assert linear(**VALID).shape == (4, 5)
    with pytest.raises(error, match=message):
        linear(**VALID | wrong)


def test_without_autograd_a_parameter_is_a_weight_like_any_other() -> None:
    weight = torch.nn.Parameter(torch.ones(5, 6))
    with torch.no_grad():
        assert torch.equal(linear(torch.ones(2, 6), weight), torch.full((2, 5), 6.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_registration(dtype: torch.dtype) -> None:
    x, weight, bias = numbers(5, 20, 40, dtype)
    for arguments in [(x, weight, bias), (x.view(1, 5, 20), weight, None)]:
        torch.library.opcheck(torch.ops.steerserve.linear.default, arguments)


def test_a_compiled_graph_has_the_same_bits_whatever_the_batch() -> None:
    _, weight, bias = numbers(1, 20, 40, torch.bfloat16)
    compiled = torch.compile(
        lambda x: linear(x * 2, weight, bias) + 1, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for num_rows in (1, 5, 17):
        x, *_ = numbers(num_rows, 20, 40, torch.bfloat16)
        assert_same_bits(compiled(x), linear(x * 2, weight, bias) + 1)
