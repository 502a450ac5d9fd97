"""Calls of the operators for tests: valid arguments by name, made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import steerserve
from steerserve.kernels import head_scale, sae_decode, sae_encode, sae_splice, steer_delta
from steerserve.kernels.backend import Operator
from steerserve.kernels.sae_encode import SparseFeatures
from steerserve.kernels.steer_delta import Normalization, OpCode

BUILT_IN = Path(steerserve.__file__).parent / "assets/saes/smollm2-135m-instruct-l24-4k"
DTYPES = [torch.float32, torch.bfloat16]

KERNELS: dict[str, Callable[..., None]] = {
    "steer_delta_": steer_delta.steer_delta_,
    "sae_encode": sae_encode.sae_encode,
    "sae_decode": sae_decode.sae_decode,
    "sae_splice_": sae_splice.sae_splice_,
    "head_scale_": head_scale.head_scale_,
}
REFERENCES: dict[str, Callable[..., None]] = {
    "steer_delta_": steer_delta.steer_delta_ref_,
    "sae_encode": sae_encode.sae_encode_ref,
    "sae_decode": sae_decode.sae_decode_ref,
    "sae_splice_": sae_splice.sae_splice_ref_,
    "head_scale_": head_scale.head_scale_ref_,
}
OPERATORS: dict[str, Operator] = {
    "steer_delta_": steer_delta._steer_delta,
    "sae_encode": sae_encode._sae_encode,
    "sae_decode": sae_decode._sae_decode,
    "sae_splice_": sae_splice._sae_splice,
    "head_scale_": head_scale._head_scale,
}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator; its arguments, in the order of the signature, are attributes too."""

    name: str
    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None

    def replaced(self, **changes: Any) -> Call:
        assert changes.keys() <= self.arguments.keys()
        return Call(self.name, self.arguments | changes)

    def to(self, device: str) -> Call:
        return Call(
            self.name, {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.arguments.items()}
        )

    def copy(self) -> Call:
        return Call(self.name, {name: v.clone() if isinstance(v, Tensor) else v for name, v in self.arguments.items()})

    def run(self, kernel: Callable[..., None] | None = None) -> Call:
        """A copy of the call after ``kernel``, the operator itself unless another is given."""
        done = self.copy()
        (kernel or KERNELS[self.name])(*done.arguments.values())
        return done

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensor arguments, in order."""
        return [value for value in self.arguments.values() if isinstance(value, Tensor)]

    @property
    def overload(self) -> Any:
        """The operator as torch knows it."""
        return getattr(torch.ops.steerserve, self.name).default

    @property
    def written(self) -> list[str]:
        """Names of the arguments that the operator declares to write."""
        return [a.name for a in self.overload._schema.arguments if a.alias_info and a.alias_info.is_write]


class Numbers:
    """Random tensors: normal ones, or small integers, on which float32 sums are exact in any order."""

    def __init__(self, seed: int, exact: bool) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._exact = exact

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """From [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self._generator, dtype=dtype)

    def activations(self, *shape: int) -> Tensor:
        return self.integers(-3, 4, *shape).float() if self._exact else self.normal(*shape)

    def weights(self, *shape: int) -> Tensor:
        return self.integers(-2, 3, *shape).float() if self._exact else self.normal(*shape) / shape[-1] ** 0.5

    def biases(self, *shape: int) -> Tensor:
        return self.integers(-2, 3, *shape).float() if self._exact else self.normal(*shape) / 4

    def thresholds(self, *shape: int) -> Tensor:
        """Never on an exact activation."""
        return self.integers(0, 4, *shape) + 0.5 if self._exact else self.normal(*shape).abs() / 4

    def factors(self, *shape: int) -> Tensor:
        """Any number of them may be multiplied."""
        return self.integers(-1, 2, *shape).float() if self._exact else self.normal(*shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def unwritten(num_rows: int, capacity: int) -> SparseFeatures:
    """Outputs that hold what no encode writes."""
    return SparseFeatures(
        torch.full((num_rows, capacity), -7, dtype=torch.int32),
        torch.full((num_rows, capacity), 7.25),
        torch.full((num_rows,), -9, dtype=torch.int32),
    )


def encode_call(
    num_rows: int = 3,
    d: int = 64,
    d_sae: int = 77,
    *,
    k: int = 0,
    capacity: int | None = None,
    max_norm: float = torch.inf,
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype = torch.float32,
    exact: bool = False,
    seed: int = 0,
) -> Call:
    """Room for every feature unless a capacity is given."""
    numbers = Numbers(seed, exact)
    features = unwritten(num_rows, d_sae if capacity is None else capacity)
    return Call(
        "sae_encode",
        {
            "x": numbers.activations(num_rows, d).to(dtype),
            "W_enc": numbers.weights(d_sae, d).to(w_dtype),
            "b_enc": numbers.biases(d_sae),
            "threshold": numbers.thresholds(d_sae),
            "max_norm": max_norm,
            "k": k,
            **vars(features),
        },
    )


def decode_call(
    counts: list[int],
    capacity: int = 9,
    d: int = 64,
    d_sae: int = 77,
    *,
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype = torch.float32,
    exact: bool = False,
    seed: int = 0,
) -> Call:
    """Row n has ``counts[n]`` features; what lies beyond them is no index at all."""
    numbers = Numbers(seed, exact)
    count = torch.tensor(counts, dtype=torch.int32)
    indices = numbers.integers(0, d_sae, len(counts), capacity)
    return Call(
        "sae_decode",
        {
            "indices": indices.where(torch.arange(capacity) < count[:, None], -5),
            "values": numbers.activations(len(counts), capacity),
            "count": count,
            "W_dec": numbers.weights(d_sae, d).to(w_dtype),
            "b_dec": numbers.biases(d),
            "out": torch.full((len(counts), d), 7.25, dtype=dtype),
        },
    )


def splice_call(
    lengths: list[int],
    d: int = 64,
    d_sae: int = 77,
    *,
    rows: list[int] | None = None,
    k: int = 0,
    capacity: int | None = None,
    max_norm: float = torch.inf,
    normalization: Normalization = Normalization.NONE,
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype = torch.float32,
    op: OpCode | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Call:
    """Row ``rows[i]`` has ``lengths[i]`` edits, of random ops unless one is given; every second row unless told."""
    numbers = Numbers(seed, exact)
    rows = list(range(1, 2 * len(lengths), 2)) if rows is None else rows
    nnz = sum(lengths)
    features = unwritten(len(rows), d_sae if capacity is None else capacity)
    W_enc = numbers.weights(d_sae, d)
    if normalization == Normalization.LAYER_NORM:
        W_enc -= W_enc.mean(1, keepdim=True)
    return Call(
        "sae_splice_",
        {
            "x": numbers.activations(max(rows, default=0) + 2, d).to(dtype),
            "rows": torch.tensor(rows, dtype=torch.int32),
            "ptr": offsets(lengths),
            "feature": numbers.integers(0, d_sae, nnz),
            "op": numbers.integers(0, len(OpCode), nnz).byte() if op is None else torch.full((nnz,), op).byte(),
            "value": numbers.activations(nnz),
            "W_enc": W_enc.to(w_dtype),
            "b_enc": numbers.biases(d_sae),
            "threshold": numbers.thresholds(d_sae),
            "W_dec": numbers.weights(d_sae, d).to(w_dtype),
            "b_dec": numbers.biases(d),
            "max_norm": max_norm,
            "normalization": int(normalization),
            "k": k,
            **vars(features),
            "activation": torch.full((nnz,), 7.25),
            "edit": torch.full((nnz,), 7.25),
            "x_norm": torch.full((len(rows),), -1.0),
        },
    )


def head_call(
    lengths: list[int],
    num_heads: int = 4,
    d_head: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
    seed: int = 0,
) -> Call:
    """Row n has ``lengths[n]`` entries; heads repeat where there are more entries than heads."""
    numbers = Numbers(seed, exact)
    nnz = sum(lengths)
    return Call(
        "head_scale_",
        {
            "z": numbers.activations(len(lengths), num_heads, d_head).to(dtype),
            "ptr": offsets(lengths),
            "head": numbers.integers(0, num_heads, nnz),
            "scale": numbers.factors(nnz),
            "z_norm": torch.full((nnz,), -1.0),
        },
    )


def steer_call(
    lengths: list[int],
    d: int = 64,
    num_slots: int = 9,
    *,
    num_stages: int = 1,
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype = torch.float32,
    op: OpCode | None = None,
    scores: bool = True,
    exact: bool = False,
    seed: int = 0,
) -> Call:
    """Segment i has ``lengths[i]`` entries, of random ops unless one is given; a third use their row's one score."""
    numbers = Numbers(seed, exact)
    nnz, num_rows = sum(lengths), len(lengths) // num_stages
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)) // num_stages
    return Call(
        "steer_delta_",
        {
            "x": numbers.activations(num_rows, d).to(dtype),
            "ptr": offsets(lengths),
            "slot": numbers.integers(0, num_slots, nnz),
            "op": numbers.integers(0, len(OpCode), nnz).byte() if op is None else torch.full((nnz,), op).byte(),
            "value": numbers.activations(nnz),
            "score_index": torch.where((numbers.integers(0, 3, nnz) > 0) | (not scores), -1, row).int(),
            "W_enc": numbers.weights(num_slots, d).to(w_dtype),
            "b_enc": numbers.biases(num_slots),
            "threshold": numbers.thresholds(num_slots),
            "max_norm": torch.full((num_slots,), torch.inf),
            "normalization": torch.zeros(num_slots, dtype=torch.uint8),
            "W_dec": numbers.weights(num_slots, d).to(w_dtype),
            "score_ptr": torch.arange(num_rows + 1, dtype=torch.int32),
            "score_threshold": numbers.thresholds(num_rows),
            "score": numbers.biases(num_rows),
            "activation": torch.full((nnz,), 7.25),
            "edit": torch.full((nnz,), 7.25),
            "x_norm": torch.full((len(lengths),), -1.0),
        },
    )


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: equality means the same bits, NaN and −0 included."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(bits(a), bits(b))


def assert_compiles(call: Call) -> None:
    """The operator within a traced graph, on an input that the graph makes, writes what it writes outside of it."""
    names = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]

    def prepare_and_run(*tensors: Tensor) -> list[Tensor]:
        own = [tensor * 1 for tensor in tensors]
        arguments = call.arguments | dict(zip(names, own, strict=True))
        KERNELS[call.name](*arguments.values())
        return [arguments[name] + 0 for name in names]

    compiled = torch.compile(prepare_and_run, backend="aot_eager", fullgraph=True)
    after = call.run()
    for name, tensor in zip(names, compiled(*(call.arguments[name] for name in names)), strict=True):
        torch.testing.assert_close(tensor, after.arguments[name], rtol=0, atol=0, equal_nan=True)
