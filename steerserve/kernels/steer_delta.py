"""steer_delta: edit sparse-autoencoder features of activations in place, each row by its own plan.

The maths, the meaning of every argument and the guarantees are in ``csrc/ops.h``.
``steer_delta_`` is the operator, ``steer_delta_ref_`` the same in plain torch.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from steerserve.kernels.backend import Operator


class OpCode(IntEnum):
    """What an entry does to its feature's activation f; the bytes of ``op``."""

    MONITOR = 0
    """f' = f: read, never edit; adds value · f to its score, if it names one."""
    CLAMP = 1
    """f' = value where f > 0."""
    CLAMP_ALWAYS = 2
    """f' = value."""
    CLIP = 3
    """f' = min(f, value)."""
    SCALE = 4
    """f' = value · f; 0 blocks the feature."""
    ADD = 5
    """f' = f + value."""


class Normalization(IntEnum):
    """How an SAE scales its input, after SAELens; the bytes of ``normalization``. s also scales its edits."""

    NONE = 0
    """s = 1."""
    CONSTANT_NORM_RESCALE = 1
    """s = |x| / √d."""
    LAYER_NORM = 2
    """s = std(x) + 1e-5; encoder rows must be centred (w − mean(w)), which is the same as centring x."""


def steer_delta_(
    x: Tensor,
    ptr: Tensor,
    slot: Tensor,
    op: Tensor,
    value: Tensor,
    score_index: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    max_norm: Tensor,
    normalization: Tensor,
    W_dec: Tensor,
    score_ptr: Tensor,
    score_threshold: Tensor,
    score: Tensor,
    activation: Tensor,
    edit: Tensor,
    x_norm: Tensor,
) -> None:
    """Edit ``x`` in place: x += Σ_j s_j (f'_j − f_j) · W_dec[slot_j] per row and stage, summed in float32.

    Stage s of row n owns the entries ``ptr[n*S + s] : ptr[n*S + s + 1]``, S = (len(ptr) − 1) / N; stages apply in
    order, each on what the former left. A row's result does not depend on the other rows or on the number of
    threads, and a row in which nothing changes keeps its bits.

    Args:
        x: ``[N, d]`` float32 or bfloat16 (float16 too on a GPU), rows contiguous. Edited.
        ptr: ``[N*S + 1]`` int32, ascending from 0 to at most nnz; entries beyond its end are spare room.
        slot: ``[nnz]`` int32, row of the bank.
        op: ``[nnz]`` uint8, an ``OpCode``.
        value: ``[nnz]`` float32, finite; the operand, or a monitor's weight in its score.
        score_index: ``[nnz]`` int32: the score that a monitor adds value · f to, or that gates any other entry;
            −1 for none.
        W_enc: ``[K, d]`` float32 or bfloat16; the bank, with ``W_dec`` of the same shape and dtype, ``b_enc``,
            ``threshold`` and ``max_norm`` ``[K]`` float32, and ``normalization`` ``[K]`` uint8, a ``Normalization``.
        score_ptr: ``[N + 1]`` int32: row n may use the scores ``score_ptr[n] : score_ptr[n + 1]`` and no others.
        score_threshold: ``[G]`` float32; a gate is shut, and its entries edit nothing, at or below it.
        score: ``[G]`` float32. Added to: zero it, or leave what an earlier site or token scored.
        activation: ``[nnz]`` float32. Written: f = pre if pre > threshold and |x| <= max_norm else 0, with
            pre = x·W_enc / s + b_enc. A non-finite pre is passed on as it is.
        edit: ``[nnz]`` float32. Written: f' − f; 0 behind a shut gate and where f is not finite.
        x_norm: ``[N*S]`` float32. Written only for stages that have entries: |x| as the stage saw it.

    Raises:
        TypeError: an argument has the wrong dtype; the message names it.
        ValueError: an argument has the wrong shape, strides or range; the message names it. ``x`` is unchanged.
            On a GPU elements are not looked at: a bad index or operand makes its activation NaN and edits nothing.
    """
    _steer_delta(
        x, ptr, slot, op, value, score_index, W_enc, b_enc, threshold, max_norm, normalization, W_dec,
        score_ptr, score_threshold, score, activation, edit, x_norm,
    )  # fmt: skip


def steer_delta_ref_(
    x: Tensor,
    ptr: Tensor,
    slot: Tensor,
    op: Tensor,
    value: Tensor,
    score_index: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    max_norm: Tensor,
    normalization: Tensor,
    W_dec: Tensor,
    score_ptr: Tensor,
    score_threshold: Tensor,
    score: Tensor,
    activation: Tensor,
    edit: Tensor,
    x_norm: Tensor,
) -> None:
    """``steer_delta_`` in torch operators, on any device: same arguments, same results within rounding."""
    num_stages = _num_stages(x, ptr)
    segment = torch.repeat_interleave(ptr.diff().long())
    for stage in range(num_stages):
        entries = (segment % num_stages == stage).nonzero().squeeze(1)
        row, bank = segment[entries] // num_stages, slot[entries].long()
        seen = x.float()
        norm = torch.linalg.vector_norm(seen, dim=-1)
        scale = normalization_scales(seen, norm)[row, normalization[bank].long()]
        pre = (seen[row] * W_enc[bank].float()).sum(-1) / scale + b_enc[bank]
        f = _activate(pre, threshold[bank], norm[row], max_norm[bank])
        gate, code = score_index[entries].long(), op[entries]
        feeds = (code == OpCode.MONITOR) & (gate >= 0)
        score.index_add_(0, gate[feeds], (value[entries] * f)[feeds])
        shut = gate >= 0
        shut[shut.clone()] = (score <= score_threshold)[gate[shut]]
        e = torch.where(shut, 0.0, edit_of(code, f, value[entries]))
        activation[entries], edit[entries] = f, e
        x_norm[row * num_stages + stage] = norm[row]
        changed = row[e != 0].unique()
        x[changed] = seen.index_add(0, row, (e * scale)[:, None] * W_dec[bank].float())[changed].to(x.dtype)


def normalization_scales(x: Tensor, norm: Tensor) -> Tensor:
    """``[N, 3]`` the s of every ``Normalization`` for float32 rows ``x`` ``[N, d]`` of norm ``[N]``."""
    std = ((x - x.mean(-1, keepdim=True)).square().sum(-1) / (x.shape[1] - 1)).sqrt()
    return torch.stack([torch.ones_like(norm), norm / x.shape[1] ** 0.5, std + 1e-5], dim=1)


def _activate(pre: Tensor, threshold: Tensor, norm: Tensor, max_norm: Tensor) -> Tensor:
    f = torch.where((pre > threshold) & (norm <= max_norm), pre, 0.0)
    f = torch.where(threshold.isnan() | max_norm.isnan(), torch.nan, f)
    return torch.where(pre.isfinite(), f, pre)


def edit_of(op: Tensor, f: Tensor, value: Tensor) -> Tensor:
    """f' − f per entry; 0 where f is not finite."""
    edit = torch.zeros_like(f)
    edit = torch.where((op == OpCode.CLAMP) & (f > 0), value - f, edit)
    edit = torch.where(op == OpCode.CLAMP_ALWAYS, value - f, edit)
    edit = torch.where((op == OpCode.CLIP) & (f > value), value - f, edit)
    edit = torch.where(op == OpCode.SCALE, value * f - f, edit)
    edit = torch.where(op == OpCode.ADD, value, edit)
    return torch.where(f.isfinite(), edit, 0.0)


def _num_stages(x: Tensor, ptr: Tensor) -> int:
    return (len(ptr) - 1) // len(x) if len(x) else 0


_steer_delta = Operator(
    "steer_delta_(Tensor(a!) x, Tensor ptr, Tensor slot, Tensor op, Tensor value, Tensor score_index, Tensor W_enc, "
    "Tensor b_enc, Tensor threshold, Tensor max_norm, Tensor normalization, Tensor W_dec, Tensor score_ptr, "
    "Tensor score_threshold, Tensor(b!) score, Tensor(c!) activation, Tensor(d!) edit, Tensor(e!) x_norm) -> ()",
)
