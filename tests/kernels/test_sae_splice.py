"""sae_splice against its definition in float64, its relations to the other operators, and its guarantees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BUILT_IN, DTYPES, assert_compiles, assert_same_bits, splice_call, steer_call
from kernel_formulas import assert_is_the_formula
from torch import Tensor

from steerserve.kernels.sae_decode import sae_decode
from steerserve.kernels.sae_encode import SparseFeatures, sae_encode
from steerserve.kernels.sae_splice import sae_splice_, sae_splice_ref_
from steerserve.kernels.steer_delta import Normalization, OpCode
from steerserve.sae.registry import load_sae

KERNELS = [sae_splice_, sae_splice_ref_]


@pytest.mark.parametrize("normalization", Normalization)
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "d_sae"), [(2, 3), (7, 64), (33, 1), (64, 77), (577, 130)])
def test_every_shape_and_type_is_the_formula(
    level: str, d: int, d_sae: int, dtype: torch.dtype, w_dtype: torch.dtype, normalization: Normalization
) -> None:
    for lengths, k in ([3], 0), ([3, 0, 9, 1, 4], 0), ([2, 5, 0], min(5, d_sae)):
        call = splice_call(lengths, d, d_sae, k=k, dtype=dtype, w_dtype=w_dtype, normalization=normalization, seed=d)
        assert_is_the_formula(call, call.run())


@given(
    lengths=st.lists(st.integers(0, 7), max_size=12),
    gap=st.integers(1, 3),
    d=st.integers(2, 70),
    d_sae=st.integers(1, 300),
    k=st.integers(0, 12),
    room=st.integers(0, 100),
    max_norm=st.sampled_from([torch.inf, 1.0]),
    normalization=st.sampled_from(Normalization),
    dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from(DTYPES),
    exact=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_batch_is_the_formula(
    lengths: list[int],
    gap: int,
    d: int,
    d_sae: int,
    k: int,
    room: int,
    max_norm: float,
    normalization: Normalization,
    dtype: torch.dtype,
    w_dtype: torch.dtype,
    exact: bool,
    seed: int,
) -> None:
    call = splice_call(
        lengths, d, d_sae, rows=[gap * i for i in range(len(lengths))], k=k, capacity=k + room, max_norm=max_norm,
        normalization=normalization, dtype=dtype, w_dtype=w_dtype, exact=exact, seed=seed,
    )  # fmt: skip
    for kernel in KERNELS:
        assert_is_the_formula(call, call.run(kernel))


@pytest.mark.parametrize("op", OpCode)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_op_is_its_formula(level: str, op: OpCode, kernel: Callable[..., None]) -> None:
    call = splice_call([9, 5], op=op)
    after = call.run(kernel)
    assert (after.activation > 0).any()
    assert_is_the_formula(call, after)


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_without_edits_it_is_decode_of_encode(level: str, w_dtype: torch.dtype, k: int) -> None:
    call = splice_call([0] * 5, 100, 300, rows=list(range(5)), k=k, w_dtype=w_dtype)
    after = call.run()
    x, features, out = call.x[:5], SparseFeatures.empty(5, 300), torch.empty(5, 100)
    sae_encode(x, call.W_enc, call.b_enc, call.threshold, call.max_norm, k, *features)
    sae_decode(*features, call.W_dec, call.b_dec, out)
    torch.testing.assert_close(after.x[:5], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        SparseFeatures(after.indices, after.values, after.count).to_dense(300),
        features.to_dense(300),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_an_sae_that_reconstructs_perfectly_it_is_steer_delta(level: str, dtype: torch.dtype) -> None:
    d, lengths = 48, [3, 0, 7, 1]
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0))).Q
    both_signs = torch.cat([basis, -basis]).contiguous()
    splice = splice_call(lengths, d, 2 * d, rows=list(range(4)), dtype=dtype)
    splice = splice.replaced(
        W_enc=both_signs, W_dec=both_signs, b_enc=torch.zeros(2 * d), threshold=torch.zeros(2 * d), b_dec=torch.zeros(d)
    )
    delta = steer_call(lengths, d, 2 * d)
    delta = delta.replaced(
        **{name: getattr(splice, name) for name in ("ptr", "op", "value", "W_enc", "b_enc", "threshold", "W_dec")},
        x=splice.x[:4],
        slot=splice.feature,
        score_index=torch.full_like(splice.feature, -1),
    ).run()
    after = splice.run()
    torch.testing.assert_close(after.activation, delta.activation, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.edit, delta.edit, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(after.x[:4], delta.x, rtol=tolerance, atol=tolerance)


def saelens_forward(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, normalization: Normalization
) -> Tensor:
    """A ReLU SAE's forward pass as SAELens writes it, in float64; ``W_enc`` is [d, d_sae]."""
    if normalization == Normalization.CONSTANT_NORM_RESCALE:
        coefficient = x.shape[1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return (((x * coefficient) @ W_enc + b_enc).relu() @ W_dec + b_dec) / coefficient
    if normalization == Normalization.LAYER_NORM:
        mu = x.mean(-1, keepdim=True)
        std = (x - mu).std(-1, keepdim=True)
        return (((x - mu) / (std + 1e-5)) @ W_enc + b_enc).relu() @ W_dec * std + b_dec * std + mu
    return (x @ W_enc + b_enc).relu() @ W_dec + b_dec


@pytest.mark.parametrize("normalization", Normalization)
@pytest.mark.parametrize("kernel", KERNELS)
def test_normalizations_are_those_of_saelens(
    level: str, normalization: Normalization, kernel: Callable[..., None]
) -> None:
    call = splice_call([0] * 4, 48, 200, rows=list(range(4)))
    call = call.replaced(x=call.x[:4] * 5 + 2, threshold=torch.zeros(200), normalization=int(normalization))
    weights = [tensor.double() for tensor in (call.W_enc.T, call.b_enc, call.W_dec, call.b_dec)]
    expected = saelens_forward(call.x.double(), *weights, normalization)
    centred = call.W_enc - call.W_enc.mean(1, keepdim=True)
    after = call.replaced(W_enc=centred if normalization == Normalization.LAYER_NORM else call.W_enc).run(kernel)
    torch.testing.assert_close(after.x.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_is_reported_and_left_alone(
    level: str, poison: float, dtype: torch.dtype, kernel: Callable[..., None]
) -> None:
    call = splice_call([5, 5, 5], rows=[0, 1, 2], dtype=dtype, op=OpCode.CLAMP_ALWAYS)
    healthy = call.run(kernel)
    call.x[1, 3] = poison
    after = call.run(kernel)
    assert after.count[1] == -1
    assert not after.x_norm[1].isfinite()
    assert after.activation[5:10].isnan().all()
    assert (after.edit[5:10] == 0).all()
    assert_same_bits(after.x[1], call.x[1])
    for row in (0, 2):
        assert_same_bits(after.x[row], healthy.x[row])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_that_does_not_fit_is_left_alone(level: str, kernel: Callable[..., None]) -> None:
    call = splice_call([5, 5], 64, 300, capacity=300, op=OpCode.ADD)
    most = int(call.run(kernel).count.max())
    tight = splice_call([5, 5], 64, 300, capacity=most - 1, op=OpCode.ADD)
    after = tight.run(kernel)
    fits = after.count < most
    assert (after.count == most).any()
    assert after.activation.view(2, 5).isnan().all(1).tolist() == (~fits).tolist()
    assert_is_the_formula(tight, after)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_largest_norm_only_the_edits_are_added(
    level: str, dtype: torch.dtype, kernel: Callable[..., None]
) -> None:
    call = splice_call([2, 0], rows=[0, 1], dtype=dtype, max_norm=50.0)
    call.x[:2] *= 100  # attention sinks
    call.x[1, :4] = -0.0
    call.op[:] = torch.tensor([OpCode.CLAMP, OpCode.ADD])
    after = call.run(kernel)
    assert after.count.tolist() == [0, 0]
    assert after.edit.tolist() == [0.0, float(call.value[1])]
    expected = call.x[0].float() + call.value[1] * call.W_dec[call.feature[1]]
    torch.testing.assert_close(after.x[0].float(), expected.to(dtype).float())
    assert_same_bits(after.x[1], call.x[1])


@pytest.mark.parametrize("normalization", Normalization)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_a_row_does_not_depend_on_its_neighbours_or_threads(
    level: str, num_rows: int, dtype: torch.dtype, normalization: Normalization, four_threads: None
) -> None:
    lengths = [40, 0, 17, 1, 5][:num_rows] * max(num_rows // 5, 1)
    call = splice_call(lengths, 301, 1500, dtype=dtype, normalization=normalization)  # work for several threads
    threaded = call.run()
    torch.set_num_threads(1)
    single = call.run()
    for name in call.written:
        assert_same_bits(getattr(single, name), getattr(threaded, name))
    row = int(call.rows[-1])
    other = splice_call(lengths, 301, 1500, dtype=dtype, seed=1)
    other.x[row] = call.x[row]
    assert_same_bits(call.replaced(x=other.x).run().x[row], threaded.x[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_and_nothing_beside_them_is_written(level: str, dtype: torch.dtype) -> None:
    call = splice_call([5, 5], 45, rows=[0, 2], dtype=dtype, op=OpCode.ADD)
    surrounding = torch.full((9, 61), 3.0, dtype=dtype)
    window = surrounding[1:9:2, 9:54]
    window.copy_(call.x)
    sae_splice_(*call.copy().replaced(x=window).arguments.values())
    assert_same_bits(window, call.run().x)
    window.fill_(3.0)
    assert (surrounding == 3.0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_entries_beyond_the_last_offset_are_spare_room(level: str, kernel: Callable[..., None]) -> None:
    call = splice_call([3, 2], op=OpCode.ADD)
    spare = {"feature": -5, "op": 99, "value": torch.nan, "activation": 7, "edit": 7}
    roomy = call.replaced(
        **{name: torch.cat([old := getattr(call, name), old.new_full((4,), fill)]) for name, fill in spare.items()}
    ).run(kernel)
    expected = call.run(kernel)
    assert_same_bits(roomy.x, expected.x)
    assert_same_bits(roomy.edit[:5], expected.edit)
    assert (roomy.edit[5:] == 7).all()


def test_the_built_in_sae_splices_as_its_equations_say(level: str) -> None:
    sae = load_sae(BUILT_IN)
    call = splice_call([0, 1], sae.d_in, sae.d_sae, rows=[0, 1], op=OpCode.SCALE)
    call = call.replaced(
        x=40 * call.x,
        W_enc=sae.W_enc.T.contiguous(),
        b_enc=sae.encoder_bias(),
        threshold=sae.threshold,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        max_norm=sae.max_norm,
        value=torch.zeros(1),
    )
    call.feature[0] = sae.encode(call.x[1]).argmax()
    after = call.run()
    f = SparseFeatures(after.indices, after.values, after.count).to_dense(sae.d_sae)
    assert after.edit[0] == -f[1, call.feature[0]] < 0
    f[1, call.feature[0]] = 0.0
    torch.testing.assert_close(after.x[:2], sae.decode(f), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows_and_no_features_are_fine(level: str, kernel: Callable[..., None]) -> None:
    call = splice_call([])
    assert_same_bits(call.run(kernel).x, call.x)
    call = splice_call([0, 0], d_sae=0)
    after = call.run(kernel)
    assert after.count.tolist() == [0, 0]
    assert torch.equal(after.x[call.rows.long()], call.b_dec.expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_registration(dtype: torch.dtype) -> None:
    call = splice_call([3, 0, 5], k=2, capacity=4, dtype=dtype)
    torch.library.opcheck(call.overload, tuple(call.arguments.values()))


def test_a_compiled_graph_splices() -> None:
    assert_compiles(splice_call([3, 0, 5], k=2, capacity=4))
