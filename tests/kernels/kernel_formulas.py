"""The definitions of csrc/ops.h in float64, one row at a time, as assertions on what a call wrote.

A result may be off by the rounding of its float32 sums and of its storage type, and a feature whose pre-activation
is that close to its threshold may be active or not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_cases import Call, assert_same_bits
from torch import Tensor

from steerserve.kernels.steer_delta import Normalization, OpCode
from steerserve.types import FloatArray

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
OPERATIONS: dict[int, Callable[[float, float], float]] = {
    OpCode.MONITOR: lambda f, v: f,
    OpCode.CLAMP: lambda f, v: v if f > 0 else f,
    OpCode.CLAMP_ALWAYS: lambda f, v: v,
    OpCode.CLIP: min,
    OpCode.SCALE: lambda f, v: v * f,
    OpCode.ADD: lambda f, v: f + v,
}


def assert_is_the_formula(before: Call, after: Call) -> None:
    """``after`` is what the operator has to make of ``before``, on whatever device it ran."""
    formula = {
        "steer_delta_": _assert_steered,
        "sae_encode": _assert_encoded,
        "sae_decode": _assert_decoded,
        "sae_splice_": _assert_spliced,
        "head_scale_": _assert_scaled,
    }[before.name]
    with np.errstate(invalid="ignore"):  # a row of zeros has no constant-norm scale, a broken one no numbers
        formula(before.to("cpu"), after.to("cpu"))


def assert_encoded_exactly(before: Call, after: Call) -> None:
    """As ``assert_is_the_formula``, for numbers whose float32 sums are exact: no slack, and the tie rule."""
    before, after = before.to("cpu"), after.to("cpu")
    pre = wide(before.x) @ wide(before.W_enc).T + wide(before.b_enc)
    capacity = before.indices.shape[1]
    for row in range(len(pre)):
        by_value_then_index = np.lexsort((np.arange(pre.shape[1]), -pre[row]))
        active = [int(j) for j in by_value_then_index if pre[row, j] > float(before.threshold[j])]
        active = sorted(active[: before.k or None])
        stored = active[:capacity]
        assert int(after.count[row]) == len(active)
        assert after.indices[row, : len(stored)].tolist() == stored
        assert after.values[row, : len(stored)].tolist() == pre[row, stored].tolist()


def _assert_steered(before: Call, after: Call) -> None:
    """Of one stage."""
    score = wide(before.score)
    for row in range(len(before.x)):
        entries = range(int(before.ptr[row]), int(before.ptr[row + 1]))
        if entries:
            _assert_row_steered(before, after, row, entries, score)
        else:
            assert_same_bits(after.x[row], before.x[row])
            assert_same_bits(after.x_norm[row], before.x_norm[row])
    np.testing.assert_allclose(wide(after.score), score, rtol=1e-4, atol=1e-4)


def _assert_row_steered(before: Call, after: Call, row: int, entries: range, score: FloatArray) -> None:
    """One row's part; adds what its monitors feed to ``score``."""
    x, d = wide(before.x[row]), before.x.shape[1]
    norm, scales = _scales(x)
    slots = before.slot[entries].tolist()
    scale = scales[before.normalization[slots].tolist()]
    terms = x * wide(before.W_enc[slots]) / scale[:, None]
    pre = terms.sum(1) + wide(before.b_enc[slots])
    silent = (pre <= wide(before.threshold[slots])) | (norm > wide(before.max_norm[slots]))
    f, value = np.where(silent, 0, pre), wide(before.value[entries])
    f_slack = _slack(terms, before.b_enc[slots]) * 3
    for i, entry in enumerate(entries):
        if before.op[entry] == OpCode.MONITOR and before.score_index[entry] >= 0:
            score[before.score_index[entry]] += value[i] * f[i]
    edit = np.zeros(len(entries))
    for i, entry in enumerate(entries):
        gate = int(before.score_index[entry])
        if gate < 0 or score[gate] > float(before.score_threshold[gate]):
            edit[i] = OPERATIONS[int(before.op[entry])](f[i], value[i]) - f[i]
    edit_slack = 4 * (f_slack + EPS[torch.float32]) * (1 + np.abs(value))
    assert (np.abs(wide(after.activation[entries]) - f) <= f_slack).all()
    assert (np.abs(wide(after.edit[entries]) - edit) <= edit_slack).all()
    assert float(after.x_norm[row]) == pytest.approx(norm, rel=EPS[torch.float32] * (d + 8))
    moves = scale[:, None] * wide(before.W_dec[slots])
    expected = x + edit @ moves
    sum_slack = EPS[torch.float32] * (len(entries) + d + 8)
    slack = (edit_slack + sum_slack * np.abs(edit)) @ np.abs(moves) + sum_slack * np.abs(x)
    _assert_rounded(after.x[row], expected, slack)


def _scales(x: FloatArray) -> tuple[float, FloatArray]:
    """|x|, and the s of every ``Normalization``."""
    norm, d = float(np.linalg.norm(x)), len(x)
    return norm, np.array([1.0, norm / d**0.5, np.std(x, ddof=1) + 1e-5 if d > 1 else np.nan])


def _assert_encoded(before: Call, after: Call) -> None:
    weights = wide(before.W_enc)
    for row, x in enumerate(wide(before.x)):
        terms = x * weights
        _assert_features(terms.sum(1) + wide(before.b_enc), _slack(terms, before.b_enc), x, row, before, after)


def _slack(terms: FloatArray, bias: Tensor) -> FloatArray:
    return EPS[torch.float32] * (terms.shape[1] + 8) * (np.abs(terms).sum(1) + np.abs(wide(bias)))


def _assert_features(
    pre: FloatArray, slack: FloatArray, x: FloatArray, row: int, before: Call, after: Call
) -> FloatArray | None:
    """One row of an encode whose pre-activations are ``pre ± slack``. Returns f [d_sae] as written, if known."""
    count, capacity = int(after.count[row]), before.indices.shape[1]
    norm = np.sqrt(np.float32(np.square(x).sum()))
    stored = max(min(count, capacity), 0)
    assert_same_bits(after.indices[row, stored:], before.indices[row, stored:])
    assert_same_bits(after.values[row, stored:], before.values[row, stored:])
    if not np.isfinite(norm):
        assert count == -1
        return None
    inside, threshold = norm <= before.max_norm, wide(before.threshold)
    surely, possibly = inside & (pre > threshold + slack), inside & (pre > threshold - slack)
    index, value = after.indices[row, :stored].numpy(), wide(after.values[row, :stored])
    assert (np.diff(index) > 0).all()
    assert possibly[index].all()
    assert (np.abs(value - pre[index]) <= slack[index]).all()

    f = np.zeros(len(pre))
    f[index] = value
    missing = surely.copy()
    missing[index] = False
    if before.k and missing.any():
        assert count == before.k
        smallest = (pre + slack)[index].min()
        assert (smallest >= (pre - slack)[missing]).all(), "a larger feature was left out"
    elif count > capacity:
        assert surely.sum() <= count <= possibly.sum()
        assert not missing[: index[-1] if stored else 0].any(), "these are not the first features"
        return None
    else:
        assert count == stored
        assert not missing.any()
    return f


def _assert_decoded(before: Call, after: Call) -> None:
    capacity = before.indices.shape[1]
    for row, count in enumerate(before.count.tolist()):
        if not 0 <= count <= capacity:
            assert after.out[row].isnan().all()
            continue
        terms = wide(before.values[row, :count, None]) * wide(before.W_dec[before.indices[row, :count].long()])
        expected = terms.sum(0) + wide(before.b_dec)
        slack = EPS[torch.float32] * (count + 8) * (np.abs(terms).sum(0) + np.abs(wide(before.b_dec)))
        _assert_rounded(after.out[row], expected, slack)


def _assert_spliced(before: Call, after: Call) -> None:
    rows = before.rows.tolist()
    for row in set(range(len(before.x))) - set(rows):
        assert_same_bits(after.x[row], before.x[row])
    for i in range(len(rows)):
        _assert_row_spliced(before, after, i)


def _assert_row_spliced(before: Call, after: Call, i: int) -> None:
    x, d = wide(before.x[before.rows[i]]), before.x.shape[1]
    sum_eps = EPS[torch.float32] * (d + 8)
    norm, scales = _scales(x)
    scale = scales[before.normalization]
    center = x.mean() if before.normalization == Normalization.LAYER_NORM else 0.0
    terms = x * wide(before.W_enc) / scale
    f = _assert_features(terms.sum(1) + wide(before.b_enc), 3 * _slack(terms, before.b_enc), x, i, before, after)
    entries = range(int(before.ptr[i]), int(before.ptr[i + 1]))
    spliced = after.x[before.rows[i]]
    np.testing.assert_allclose(float(after.x_norm[i]), norm, rtol=sum_eps)
    if f is None:
        assert after.activation[entries].isnan().all()
        assert (after.edit[entries] == 0).all()
        assert_same_bits(spliced, before.x[before.rows[i]])
        return
    edits = np.zeros((len(entries), d))
    for entry in entries:
        feature, value = int(before.feature[entry]), float(before.value[entry])
        assert float(after.activation[entry]) == f[feature]
        edit = OPERATIONS[int(before.op[entry])](f[feature], value) - f[feature]
        assert float(after.edit[entry]) == pytest.approx(
            edit, abs=4 * EPS[torch.float32] * (abs(f[feature]) + abs(value * f[feature]) + abs(value))
        )
        edits[entry - entries.start] = float(after.edit[entry]) * wide(before.W_dec[feature])
    if norm <= before.max_norm:
        terms = np.concatenate([f[f != 0, None] * wide(before.W_dec)[f != 0], edits, wide(before.b_dec)[None]])
        base = np.full(d, center)
    else:
        terms, base = edits, x
    expected = scale * terms.sum(0) + base
    slack = EPS[torch.float32] * (len(terms) + d + 8) * (scale * np.abs(terms).sum(0) + np.abs(base) + abs(x).mean())
    _assert_rounded(spliced, expected, slack)


def _assert_scaled(before: Call, after: Call) -> None:
    eps = EPS[before.z.dtype]
    for row in range(len(before.z)):
        expected, slack = wide(before.z[row]), np.zeros(before.z.shape[1:])
        touched = np.zeros(len(expected), dtype=bool)
        for entry in range(int(before.ptr[row]), int(before.ptr[row + 1])):
            head, factor = int(before.head[entry]), float(before.scale[entry])
            norm = np.linalg.norm(expected[head])
            norm_slack = EPS[torch.float32] * (expected.shape[1] + 8) * norm + np.linalg.norm(slack[head])
            norm_slack += 1e-20  # where squares underflow
            assert abs(float(after.z_norm[entry]) - norm) <= norm_slack
            if factor != 1:
                touched[head] = True
                expected[head] *= factor
                slack[head] = slack[head] * abs(factor) + eps * np.abs(expected[head]) + SMALLEST[before.z.dtype]
        assert (np.abs(wide(after.z[row]) - expected) <= slack).all()
        assert_same_bits(after.z[row, ~touched], before.z[row, ~touched])


def wide(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().double().numpy()
    return array.copy()


def _assert_rounded(got: Tensor, expected: FloatArray, slack: FloatArray) -> None:
    rounding = EPS[got.dtype] / 2 * 1.01 * (np.abs(expected) + slack) + SMALLEST[got.dtype]
    assert (np.abs(wide(got) - expected) <= slack + rounding).all()
