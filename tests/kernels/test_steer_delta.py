"""steer_delta against its definition in float64, and the guarantees that serving rests on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, Call, assert_compiles, assert_same_bits, steer_call
from kernel_formulas import assert_is_the_formula
from torch import Tensor

from steerserve.kernels.steer_delta import Normalization, OpCode, steer_delta_, steer_delta_ref_

BANK = ("W_enc", "b_enc", "threshold", "max_norm", "normalization", "W_dec")


def steer_case(lengths: list[int], d: int = 64, *, scores: bool = False, num_slots: int = 9, **options: object) -> Call:
    """A call without scores unless asked for; some rows are beyond the largest norm of every fourth feature."""
    case = steer_call(lengths, d, num_slots, scores=scores, **options)
    bounds = torch.where(torch.arange(num_slots) % 4 == 3, 0.98 * d**0.5, torch.inf)
    return case.replaced(max_norm=bounds)


def with_normalization(case: Call) -> Call:
    """The case with every kind of normalization in its bank."""
    kinds = torch.arange(len(case.b_enc), dtype=torch.uint8) % len(Normalization)
    return case.replaced(x=case.x * 3, normalization=kinds)


@pytest.mark.parametrize("d", [1, 7, 33, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OpCode)
def test_every_op_is_its_formula(level: str, op: OpCode, dtype: torch.dtype, d: int) -> None:
    case = steer_case([3, 0, 5, 1, 9], d, dtype=dtype, op=op, seed=d)
    after = case.run()
    assert (after.activation > 0).any()
    assert_is_the_formula(case, after)
    assert (op == OpCode.MONITOR) == torch.equal(case.x, after.x)


@given(
    lengths=st.lists(st.integers(0, 11), max_size=7),
    d=st.integers(2, 150),
    num_slots=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    normalized=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_ragged_batches_are_the_formula(
    lengths: list[int],
    d: int,
    num_slots: int,
    dtype: torch.dtype,
    w_dtype: torch.dtype,
    gated: bool,
    normalized: bool,
    seed: int,
) -> None:
    case = steer_case(lengths, d, num_slots=num_slots, dtype=dtype, w_dtype=w_dtype, scores=gated, seed=seed)
    case = with_normalization(case) if normalized else case
    for kernel in (steer_delta_, steer_delta_ref_):
        assert_is_the_formula(case, case.run(kernel))


def test_layer_norm_of_centred_rows_is_saelens_layer_norm(level: str) -> None:
    case = steer_case([9], 48, op=OpCode.MONITOR)
    case = case.replaced(x=case.x * 5 + 2, slot=torch.arange(9, dtype=torch.int32), threshold=case.threshold - 1e9)
    case.max_norm.fill_(torch.inf)
    centred = case.W_enc - case.W_enc.mean(1, keepdim=True)
    after = case.replaced(W_enc=centred, normalization=torch.full((9,), Normalization.LAYER_NORM).byte()).run()
    x = case.x[0].double() - case.x[0].double().mean()
    expected = (x / (x.std() + 1e-5)) @ case.W_enc.T.double() + case.b_enc.double()
    torch.testing.assert_close(after.activation.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [steer_delta_, steer_delta_ref_])
def test_a_gate_opens_above_its_threshold_and_for_a_score_that_is_not_known(kernel: Callable[..., None]) -> None:
    case = steer_case([2], op=OpCode.ADD)
    scores = torch.tensor([-0.5, 0.5, torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item(), torch.nan])
    for score, opens in zip(scores, (False, False, True, True), strict=True):
        gated = case.replaced(
            score_index=torch.tensor([0, -1], dtype=torch.int32),
            score_ptr=torch.tensor([0, 1], dtype=torch.int32),
            score_threshold=torch.tensor([0.5]),
            score=score[None],
        ).run(kernel)
        assert float(gated.edit[0]) == (float(case.value[0]) if opens else 0.0)
        assert gated.edit[1] == case.value[1]
        assert_same_bits(gated.score, score[None])


def test_a_score_of_the_first_stage_gates_the_second(level: str) -> None:
    case = steer_case([1, 1], num_stages=2).replaced(
        op=torch.tensor([OpCode.MONITOR, OpCode.ADD], dtype=torch.uint8),
        value=torch.tensor([2.0, 1.0]),
        score_index=torch.zeros(2, dtype=torch.int32),
        score_ptr=torch.tensor([0, 1], dtype=torch.int32),
        score_threshold=torch.tensor([1.0]),
        score=torch.zeros(1),
        b_enc=torch.ones(9),
        threshold=torch.zeros(9),
        W_enc=torch.zeros(9, 64),
    )
    case.max_norm.fill_(torch.inf)
    after = case.run()
    assert after.score.tolist() == [2.0]
    assert after.edit.tolist() == [0.0, 1.0]
    case.b_enc.fill_(0.5)
    assert case.run().edit.tolist() == [0.0, 0.0]


def test_entries_beyond_the_last_offset_are_spare_room(level: str) -> None:
    case = steer_case([3, 2], op=OpCode.ADD)
    spare = {"slot": -5, "op": 99, "value": torch.nan, "score_index": 77, "activation": 7, "edit": 7}
    roomy = case.replaced(
        **{name: torch.cat([old := getattr(case, name), old.new_full((4,), fill)]) for name, fill in spare.items()},
    )
    after, expected = roomy.run(), case.run()
    assert_same_bits(after.x, expected.x)
    assert_same_bits(after.edit[:5], expected.edit)
    assert (after.edit[5:] == 7).all()


@pytest.mark.parametrize("kernel", [steer_delta_, steer_delta_ref_])
@pytest.mark.parametrize("name", ["threshold", "max_norm"])
def test_a_feature_with_an_unknown_bound_is_reported_and_edits_nothing(name: str, kernel: Callable[..., None]) -> None:
    case = steer_case([2], op=OpCode.ADD)
    case = case.replaced(slot=torch.tensor([0, 1], dtype=torch.int32))
    getattr(case, name)[0] = torch.nan
    after = case.run(kernel)
    assert after.activation.isnan().tolist() == [True, False]
    assert (after.edit == 0).tolist() == [True, False]


@pytest.mark.parametrize("kernel", [steer_delta_, steer_delta_ref_])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage_sees_what_the_former_left(dtype: torch.dtype, kernel: Callable[..., None]) -> None:
    lengths = [4, 3, 0, 5, 6, 0]
    both = steer_case(lengths, num_stages=2, dtype=dtype)
    entries = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    done = both.run(kernel)
    x = both.x
    for stage in (0, 1):
        mine = entries % 2 == stage
        single = (
            steer_case(lengths[stage::2])
            .replaced(
                **{name: getattr(both, name) for name in BANK},
                **{name: getattr(both, name)[mine] for name in ("slot", "op", "value")},
                x=x,
            )
            .run(kernel)
        )
        assert_same_bits(single.activation, done.activation[mine])
        assert_same_bits(single.edit, done.edit[mine])
        assert_same_bits(single.x_norm, done.x_norm[stage::2])
        x = single.x
    assert_same_bits(x, done.x)


def test_a_feature_asked_twice_reads_once_and_adds_up(level: str) -> None:
    once = steer_case([1], op=OpCode.ADD)
    thrice = (
        steer_case([3], op=OpCode.ADD)
        .replaced(
            **{name: getattr(once, name) for name in ("x", *BANK)},
            slot=once.slot.expand(3).contiguous(),
            value=torch.tensor([0.5, 2.0, -0.25]),
        )
        .run()
    )
    assert torch.equal(thrice.activation, thrice.activation[:1].expand(3))
    torch.testing.assert_close(thrice.x, once.x + 2.25 * once.W_dec[once.slot])


def test_threshold_minus_infinity_reads_a_projection(level: str) -> None:
    case = steer_case([9], op=OpCode.SCALE).replaced(threshold=torch.full((9,), -torch.inf))
    case.max_norm.fill_(torch.inf)
    case = case.replaced(slot=torch.arange(9, dtype=torch.int32), value=torch.zeros(9))
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
    case = steer_case([5, 5, 5], dtype=dtype, op=OpCode.CLAMP_ALWAYS)
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
    case = steer_case([6, 6], 37, dtype=dtype, op=OpCode.CLAMP)
    case = case.replaced(threshold=torch.full((9,), 1e9))
    case.x[0, :2] = -0.0
    after = case.run()
    assert (after.activation == 0).all()
    assert (after.edit == 0).all()
    assert_same_bits(after.x, case.x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_beyond_the_largest_norm_is_left_alone(level: str, dtype: torch.dtype) -> None:
    case = steer_case([6, 6], dtype=dtype, op=OpCode.CLAMP_ALWAYS)
    case.x[0] *= 100  # an attention sink
    case.max_norm.fill_(50.0)
    after = case.run()
    assert (after.activation[:6] == 0).all()
    assert after.x_norm[0] > 100, "evaluated, and said so"
    inside = case.replaced(max_norm=torch.full((9,), torch.inf)).run()
    assert_same_bits(after.x[1], inside.x[1])
    assert (inside.activation[:6] > 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_or_threads(level: str, dtype: torch.dtype) -> None:
    lengths, d = [40, 0, 17, 63, 64, 1, 30, 55] * 6, 601  # enough work for several threads
    case = steer_case(lengths, d, num_slots=64, dtype=dtype)
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
        alone = (
            steer_case([lengths[row]], d, num_slots=64)
            .replaced(
                **{name: getattr(case, name) for name in BANK},
                **{name: getattr(case, name)[own] for name in ("slot", "op", "value")},
                x=case.x[row : row + 1],
            )
            .run()
        )
        assert_same_bits(alone.x[0], threaded.x[row])
        assert_same_bits(alone.activation, threaded.activation[own])


def test_a_feature_reads_the_same_wherever_it_stands_in_the_plan(level: str) -> None:
    case = steer_case([11], 77, num_slots=11, op=OpCode.MONITOR)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    straight = case.replaced(slot=torch.arange(11, dtype=torch.int32)).run()
    shuffled = case.replaced(slot=order.int()).run()
    assert_same_bits(shuffled.activation, straight.activation[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_edited_and_nothing_beside_them(level: str, dtype: torch.dtype) -> None:
    case = steer_case([5, 5, 5], 45, dtype=dtype, op=OpCode.ADD)
    surrounding = torch.full((7, 61), 3.0, dtype=dtype)
    window = surrounding[1:7:2, 9:54]
    window.copy_(case.x)
    steer_delta_(window, *case.run().tensors[1:])
    assert_same_bits(window, case.run().x)
    window.fill_(3.0)
    assert (surrounding == 3.0).all()


def test_bfloat16_rounds_to_nearest_even_like_torch(level: str) -> None:
    sums = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 1e-40, 3e-39, 3.4e38, torch.nan])
    sums[-1:].view(torch.int32).fill_(0x7FFFFFFF)  # a NaN whose bits, rounded as a number, would become −0
    case = steer_case([1], len(sums), num_slots=1, dtype=torch.bfloat16, op=OpCode.ADD).replaced(
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
    case = steer_case([0] * num_rows, num_slots=num_slots, dtype=dtype)
    after = case.run()
    assert_same_bits(after.x, case.x)
    assert (after.x_norm == -1).all()


BAD_ARGUMENTS: dict[str, tuple[type[Exception], str, Callable[[Call], Tensor]]] = {
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
    "score_index short": (ValueError, "score_index", lambda case: case.score_index[1:]),
    "score_index beyond": (ValueError, "score_index", lambda case: case.score_index + 1),
    "score_ptr int64": (TypeError, "score_ptr", lambda case: case.score_ptr.long()),
    "score_ptr short": (ValueError, "score_ptr", lambda case: case.score_ptr[1:]),
    "score_ptr beyond": (ValueError, "score_ptr", lambda case: case.score_ptr + case.score_ptr),
    "score_threshold long": (ValueError, "score_threshold", lambda case: torch.zeros(1)),
    "score float64": (TypeError, "score", lambda case: case.score.double()),
    "normalization unknown": (ValueError, "normalization", lambda case: case.normalization + 3),
    "normalization float": (TypeError, "normalization", lambda case: case.normalization.float()),
    "W_enc half": (TypeError, "W_enc", lambda case: case.W_enc.half()),
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
    case = steer_case([3, 3], op=OpCode.ADD)
    bad = case.replaced(**{name: damage(case)})
    before = [tensor.clone() for tensor in bad.tensors]
    with pytest.raises(error, match=rf"^{name}[:\[]"):
        steer_delta_(*bad.tensors)
    for tensor, copy in zip(bad.tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_what_is_no_strided_tensor_is_refused() -> None:
    x, *others = steer_case([3, 3]).tensors
    with pytest.raises(ValueError, match=r"^x: got torch\.sparse_coo tensor on cpu that cannot be read"):
        steer_delta_(x.to_sparse(), *others)
    with pytest.raises(TypeError, match=r"^ptr: got numpy\.ndarray, expected a torch\.Tensor"):
        steer_delta_(x, others[0].numpy(), *others[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_registration(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.steerserve.steer_delta_.default, steer_case([3, 0, 5], dtype=dtype).tensors)


def test_a_compiled_graph_keeps_the_edit() -> None:
    assert_compiles(steer_case([3, 0, 5], op=OpCode.ADD))
