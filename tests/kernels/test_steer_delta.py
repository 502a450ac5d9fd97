"""steer_delta against its definition in float64, and the guarantees that serving rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerserve.kernels.native import C
from steerserve.kernels.steer_delta import OpCode, steer_delta_, steer_delta_ref_

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = ["scalar", "avx2", "avx512"]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    """The arguments of one call, in the order of the signature."""

    x: Tensor
    ptr: Tensor
    slot: Tensor
    op: Tensor
    value: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    max_norm: Tensor
    W_dec: Tensor
    activation: Tensor
    edit: Tensor
    x_norm: Tensor

    def arguments(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def run(self, kernel: Callable[..., None] = steer_delta_) -> Case:
        """A copy of the case after the call; x keeps its strides."""
        done = Case(*(tensor.clone() for tensor in self.arguments()))
        kernel(*done.arguments())
        return done


def make_case(
    lengths: list[int],
    d: int = 64,
    *,
    num_stages: int = 1,
    num_slots: int = 9,
    dtype: torch.dtype = torch.float32,
    op: OpCode | None = None,
    seed: int = 0,
) -> Case:
    """Random activations and bank; segment i has ``lengths[i]`` entries, with random ops unless one is given."""
    generator = torch.Generator().manual_seed(seed)
    nnz, num_rows = sum(lengths), len(lengths) // num_stages

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Case(
        x=normal(num_rows, d).to(dtype),
        ptr=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        slot=torch.randint(max(num_slots, 1), (nnz,), generator=generator, dtype=torch.int32),
        op=torch.randint(len(OpCode), (nnz,), generator=generator, dtype=torch.uint8)
        if op is None
        else torch.full((nnz,), op, dtype=torch.uint8),
        value=normal(nnz),
        W_enc=normal(num_slots, d) / d**0.5,
        b_enc=normal(num_slots) / 4,
        threshold=normal(num_slots).abs() / 4,
        max_norm=torch.where(torch.arange(num_slots) % 4 == 3, 0.98 * d**0.5, torch.inf),  # some rows are beyond it
        W_dec=normal(num_slots, d) / d**0.5,
        activation=torch.full((nnz,), 7.0),
        edit=torch.full((nnz,), 7.0),
        x_norm=torch.full((len(lengths),), -1.0),
    )


OPERATIONS: dict[OpCode, Callable[[float, float], float]] = {
    OpCode.MONITOR: lambda f, v: f,
    OpCode.CLAMP: lambda f, v: v if f > 0 else f,
    OpCode.CLAMP_ALWAYS: lambda f, v: v,
    OpCode.CLIP: min,
    OpCode.SCALE: lambda f, v: v * f,
    OpCode.ADD: lambda f, v: f + v,
}


def assert_is_the_formula(before: Case, after: Case) -> None:
    """Compare a one-stage call with its definition in float64, within the rounding of float32 sums."""
    dtype, d = before.x.dtype, before.x.shape[1]
    sum_eps = EPS[torch.float32] * (d + 8)
    x, W_enc, W_dec = (tensor.double().numpy() for tensor in (before.x, before.W_enc, before.W_dec))
    ptr, slot = before.ptr.tolist(), before.slot.tolist()
    for row in range(len(x)):
        expected, slack = x[row].copy(), np.zeros(d)
        for entry in range(ptr[row], ptr[row + 1]):
            terms = x[row] * W_enc[slot[entry]]
            pre = terms.sum() + float(before.b_enc[slot[entry]])
            inside = np.linalg.norm(x[row]) <= float(before.max_norm[slot[entry]])
            f = pre if inside and pre > float(before.threshold[slot[entry]]) else 0.0
            edit = OPERATIONS[OpCode(int(before.op[entry]))](f, float(before.value[entry])) - f
            f_slack = sum_eps * (np.abs(terms).sum() + 1)
            e_slack = 4 * f_slack * (1 + abs(float(before.value[entry])))
            assert abs(float(after.activation[entry]) - f) <= f_slack
            assert abs(float(after.edit[entry]) - edit) <= e_slack
            expected += edit * W_dec[slot[entry]]
            slack += (e_slack + sum_eps * abs(edit)) * np.abs(W_dec[slot[entry]])
        slack += sum_eps * np.abs(x[row]) + EPS[dtype] / 2 * np.abs(expected) * 1.01
        assert (np.abs(after.x[row].double().numpy() - expected) <= slack).all()
        if ptr[row] < ptr[row + 1]:
            assert float(after.x_norm[row]) == pytest.approx(np.linalg.norm(x[row]), rel=sum_eps)
        else:
            assert float(after.x_norm[row]) == -1, "a row without entries was reported as evaluated"


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: equality means the same bits, NaN and −0 included."""
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(bits(a), bits(b))


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every instruction set."""
    if request.param not in C.supported_simd_levels():
        pytest.skip(f"this CPU has no {request.param}")
    best = C.simd_level()
    C.set_simd_level(request.param)
    yield request.param
    C.set_simd_level(best)


@pytest.mark.parametrize("d", [1, 7, 33, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OpCode)
def test_every_op_is_its_formula(level: str, op: OpCode, dtype: torch.dtype, d: int) -> None:
    case = make_case([3, 0, 5, 1, 9], d, dtype=dtype, op=op, seed=d)
    after = case.run()
    assert (after.activation > 0).any()
    assert_is_the_formula(case, after)
    assert (op == OpCode.MONITOR) == torch.equal(case.x, after.x)


@given(
    lengths=st.lists(st.integers(0, 11), max_size=7),
    d=st.integers(1, 150),
    num_slots=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=120)
def test_ragged_batches_are_the_formula(
    lengths: list[int], d: int, num_slots: int, dtype: torch.dtype, seed: int
) -> None:
    case = make_case(lengths, d, num_slots=num_slots, dtype=dtype, seed=seed)
    for kernel in (steer_delta_, steer_delta_ref_):
        assert_is_the_formula(case, case.run(kernel))


@pytest.mark.parametrize("kernel", [steer_delta_, steer_delta_ref_])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage_sees_what_the_former_left(dtype: torch.dtype, kernel: Callable[..., None]) -> None:
    lengths = [4, 3, 0, 5, 6, 0]
    both = make_case(lengths, num_stages=2, dtype=dtype)
    entries = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    done = both.run(kernel)
    x = both.x
    for stage in (0, 1):
        mine = entries % 2 == stage
        single = replace(
            make_case(lengths[stage::2]),
            **{name: getattr(both, name) for name in ("W_enc", "b_enc", "threshold", "max_norm", "W_dec")},
            **{name: getattr(both, name)[mine] for name in ("slot", "op", "value")},
            x=x,
        ).run(kernel)
        assert_same_bits(single.activation, done.activation[mine])
        assert_same_bits(single.edit, done.edit[mine])
        assert_same_bits(single.x_norm, done.x_norm[stage::2])
        x = single.x
    assert_same_bits(x, done.x)


def test_a_feature_asked_twice_reads_once_and_adds_up(level: str) -> None:
    once = make_case([1], op=OpCode.ADD)
    thrice = replace(
        make_case([3], op=OpCode.ADD),
        **{name: getattr(once, name) for name in ("x", "W_enc", "b_enc", "threshold", "W_dec")},
        slot=once.slot.expand(3).contiguous(),
        value=torch.tensor([0.5, 2.0, -0.25]),
    ).run()
    assert torch.equal(thrice.activation, thrice.activation[:1].expand(3))
    torch.testing.assert_close(thrice.x, once.x + 2.25 * once.W_dec[once.slot])


def test_threshold_minus_infinity_reads_a_projection(level: str) -> None:
    case = replace(make_case([9], op=OpCode.SCALE), threshold=torch.full((9,), -torch.inf))
    case.max_norm.fill_(torch.inf)
    case = replace(case, slot=torch.arange(9, dtype=torch.int32), value=torch.zeros(9))
    after = case.run()
    assert (after.activation < 0).any()
    torch.testing.assert_close(after.activation, case.x[0] @ case.W_enc.T + case.b_enc)
    torch.testing.assert_close(after.edit, -after.activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", [steer_delta_, steer_delta_ref_])
def test_a_broken_row_is_reported_and_left_alone(
    kernel: Callable[..., None], poison: float, dtype: torch.dtype
) -> None:
    case = make_case([5, 5, 5], dtype=dtype, op=OpCode.CLAMP_ALWAYS)
    healthy = case.run(kernel)
    case.x[1, 3] = poison
    after = case.run(kernel)
    assert not after.activation[5:10].isfinite().any()
    assert not after.x_norm[1].isfinite()
    assert (after.edit[5:10] == 0).all()
    assert_same_bits(after.x[1], case.x[1])
    for row in (0, 2):
        assert_same_bits(after.x[row], healthy.x[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_fires_nothing_changes(level: str, dtype: torch.dtype) -> None:
    case = make_case([6, 6], 37, dtype=dtype, op=OpCode.CLAMP)
    case = replace(case, threshold=torch.full((9,), 1e9))
    case.x[0, :2] = -0.0
    after = case.run()
    assert (after.activation == 0).all()
    assert (after.edit == 0).all()
    assert_same_bits(after.x, case.x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_beyond_the_largest_norm_is_left_alone(level: str, dtype: torch.dtype) -> None:
    case = make_case([6, 6], dtype=dtype, op=OpCode.CLAMP_ALWAYS)
    case.x[0] *= 100  # an attention sink
    case.max_norm.fill_(50.0)
    after = case.run()
    assert (after.activation[:6] == 0).all()
    assert after.x_norm[0] > 100, "evaluated, and said so"
    inside = replace(case, max_norm=torch.full((9,), torch.inf)).run()
    assert_same_bits(after.x[1], inside.x[1])
    assert (inside.activation[:6] > 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_or_threads(level: str, dtype: torch.dtype) -> None:
    lengths, d = [40, 0, 17, 63, 64, 1, 30, 55] * 6, 601  # enough work for several threads
    case = make_case(lengths, d, num_slots=64, dtype=dtype)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        threaded = case.run()
        torch.set_num_threads(1)
        single = case.run()
    finally:
        torch.set_num_threads(num_threads)
    for name in ("x", "activation", "edit", "x_norm"):
        assert_same_bits(getattr(threaded, name), getattr(single, name))
    for row in range(8):
        own = slice(int(case.ptr[row]), int(case.ptr[row + 1]))
        alone = replace(
            make_case([lengths[row]], d, num_slots=64),
            **{name: getattr(case, name) for name in ("W_enc", "b_enc", "threshold", "max_norm", "W_dec")},
            **{name: getattr(case, name)[own] for name in ("slot", "op", "value")},
            x=case.x[row : row + 1],
        ).run()
        assert_same_bits(alone.x[0], threaded.x[row])
        assert_same_bits(alone.activation, threaded.activation[own])


def test_a_feature_reads_the_same_wherever_it_stands_in_the_plan(level: str) -> None:
    case = make_case([11], 77, num_slots=11, op=OpCode.MONITOR)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    straight = replace(case, slot=torch.arange(11, dtype=torch.int32)).run()
    shuffled = replace(case, slot=order.int()).run()
    assert_same_bits(shuffled.activation, straight.activation[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_edited_and_nothing_beside_them(level: str, dtype: torch.dtype) -> None:
    case = make_case([5, 5, 5], 45, dtype=dtype, op=OpCode.ADD)
    surrounding = torch.full((7, 61), 3.0, dtype=dtype)
    window = surrounding[1:7:2, 9:54]
    window.copy_(case.x)
    steer_delta_(window, *case.run().arguments()[1:])
    assert_same_bits(window, case.run().x)
    window.fill_(3.0)
    assert (surrounding == 3.0).all()


def test_bfloat16_rounds_to_nearest_even_like_torch(level: str) -> None:
    sums = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 1e-40, 3e-39, 3.4e38, torch.nan])
    sums[-1:].view(torch.int32).fill_(0x7FFFFFFF)  # a NaN whose bits, rounded as a number, would become −0
    case = replace(
        make_case([1], len(sums), num_slots=1, dtype=torch.bfloat16, op=OpCode.ADD),
        x=torch.zeros(1, len(sums), dtype=torch.bfloat16),
        value=torch.ones(1),
        W_dec=sums[None],
    )
    after = case.run()
    assert torch.equal(after.x[0, :-1], sums[:-1].bfloat16())
    assert after.x[0, -1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_slots"), [(0, 4), (3, 0), (3, 4)])
def test_nothing_to_do_is_fine(num_rows: int, num_slots: int, dtype: torch.dtype) -> None:
    case = make_case([0] * num_rows, num_slots=num_slots, dtype=dtype)
    after = case.run()
    assert_same_bits(after.x, case.x)
    assert (after.x_norm == -1).all()


BAD_ARGUMENTS: dict[str, tuple[type[Exception], str, Callable[[Case], Tensor]]] = {
    "x half": (TypeError, "x", lambda case: case.x.half()),
    "x 1-d": (ValueError, "x", lambda case: case.x[0]),
    "x columns": (ValueError, "x", lambda case: case.x.T.contiguous().T),
    "x overlapping": (ValueError, "x", lambda case: case.x[:1].expand(2, -1)),
    "ptr int64": (TypeError, "ptr", lambda case: case.ptr.long()),
    "ptr empty": (ValueError, "ptr", lambda case: case.ptr[:0]),
    "ptr too short": (ValueError, "ptr", lambda case: case.ptr[:2]),
    "ptr from 1": (ValueError, "ptr", lambda case: case.ptr + torch.tensor([1, 0, 0], dtype=torch.int32)),
    "ptr descending": (ValueError, "ptr", lambda case: torch.tensor([0, 9, 6], dtype=torch.int32)),
    "ptr beyond": (ValueError, "ptr", lambda case: torch.tensor([0, 3, 7], dtype=torch.int32)),
    "slot int64": (TypeError, "slot", lambda case: case.slot.long()),
    "slot negative": (ValueError, "slot", lambda case: case.slot - 100),
    "slot beyond": (ValueError, "slot", lambda case: case.slot * 0 + 9),
    "op unknown": (ValueError, "op", lambda case: case.op * 0 + 6),
    "op short": (ValueError, "op", lambda case: case.op[1:]),
    "value NaN": (ValueError, "value", lambda case: case.value * torch.nan),
    "value infinite": (ValueError, "value", lambda case: case.value / 0),
    "value float64": (TypeError, "value", lambda case: case.value.double()),
    "W_enc other d": (ValueError, "W_enc", lambda case: case.W_enc[:, 1:].contiguous()),
    "W_enc columns": (ValueError, "W_enc", lambda case: case.W_enc.T.contiguous().T),
    "b_enc short": (ValueError, "b_enc", lambda case: case.b_enc[1:]),
    "threshold 2-d": (ValueError, "threshold", lambda case: case.threshold[None]),
    "W_dec bfloat16": (TypeError, "W_dec", lambda case: case.W_dec.bfloat16()),
    "W_dec fewer": (ValueError, "W_dec", lambda case: case.W_dec[1:]),
    "activation strided": (ValueError, "activation", lambda case: torch.zeros(12)[::2]),
    "edit long": (ValueError, "edit", lambda case: torch.zeros(7)),
    "x_norm 2-d": (ValueError, "x_norm", lambda case: case.x_norm[None]),
}


@pytest.mark.parametrize("problem", BAD_ARGUMENTS)
def test_a_bad_argument_is_named_and_nothing_is_written(problem: str) -> None:
    error, name, damage = BAD_ARGUMENTS[problem]
    case = make_case([3, 3], op=OpCode.ADD)
    bad = replace(case, **{name: damage(case)})
    before = [tensor.clone() for tensor in bad.arguments()]
    with pytest.raises(error, match=rf"^{name}[:\[]"):
        steer_delta_(*bad.arguments())
    for tensor, copy in zip(bad.arguments(), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_another_device_is_refused() -> None:
    arguments = make_case([3, 3]).arguments()
    with pytest.raises(NotImplementedError, match="steer_delta_"):
        steer_delta_(arguments[0].to_sparse(), *arguments[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_registration(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.steerserve.steer_delta_.default, make_case([3, 0, 5], dtype=dtype).arguments())


def test_a_compiled_graph_keeps_the_edit() -> None:
    case = make_case([3, 0, 5], op=OpCode.ADD)

    def double_then_steer(*arguments: Tensor) -> Tensor:
        x = arguments[0] * 2
        steer_delta_(x, *arguments[1:])
        return x + 1

    compiled = torch.compile(double_then_steer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case.run().arguments()), double_then_steer(*case.run().arguments()))
