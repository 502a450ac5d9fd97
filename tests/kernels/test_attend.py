"""attend against its definition in float64, and the guarantee that batches rest on: a token's bits are its own.

A cache starts as NaN, so that whatever reads what was never written is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_same_bits
from test_bad_input import against_a_guard_page
from torch import Tensor

from steerserve.kernels.attend import AttentionState, attend, attend_ref


@dataclass(frozen=True)
class Shape:
    num_heads: int = 6
    num_kv_heads: int = 2
    d_head: int = 32
    block_size: int = 16
    softcap: float = 0.0
    window: int = 0

    @property
    def scale(self) -> float:
        return self.d_head**-0.5


SHAPES = [
    Shape(),
    Shape(9, 3, 64),
    Shape(4, 1, 256, softcap=3.0, window=20),
    Shape(4, 4, 8, window=1),
    Shape(6, 2, 20, 5, softcap=2.0),
    Shape(2, 1, 1, 3, window=70),
    Shape(30, 1, 64, 32),
]


@dataclass(frozen=True)
class Piece:
    """Tokens of a step: positions [begin, end) of a row."""

    row: int
    begin: int
    end: int


class Sequences:
    """Random tokens of some rows, an empty cache for them, and steps over both."""

    def __init__(self, lengths: list[int], shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype, self.lengths = shape, dtype, lengths
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.tokens = [
            [torch.randn(length, h, shape.d_head, generator=generator).to(dtype) for h in heads] for length in lengths
        ]
        max_blocks = -(-max(lengths, default=1) // shape.block_size)
        self.num_blocks = len(lengths) * max_blocks + 1
        self.block_table = torch.randperm(self.num_blocks, generator=generator)[1:].view(len(lengths), -1).int()
        self.row, self.position = (torch.zeros(sum(lengths) + 3, dtype=torch.int32) for _ in range(2))
        self.k_cache, self.v_cache = (self.empty_cache() for _ in range(2))
        self.state = AttentionState(self.k_cache, self.v_cache, self.block_table, self.row, self.position)

    def empty_cache(self) -> Tensor:
        shape = self.shape
        sizes = (self.num_blocks, shape.num_kv_heads, shape.block_size, shape.d_head)
        return against_a_guard_page(torch.full(sizes, torch.nan, dtype=self.dtype))

    @property
    def whole(self) -> list[Piece]:
        return [Piece(row, 0, length) for row, length in enumerate(self.lengths)]

    def prepare(self, pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """The step's q, k and v; its rows and positions are told to the state."""
        row = [piece.row for piece in pieces for _ in range(piece.begin, piece.end)]
        position = [position for piece in pieces for position in range(piece.begin, piece.end)]
        self.row[: len(row)], self.position[: len(row)] = torch.tensor(row).int(), torch.tensor(position).int()
        q, k, v = (
            torch.cat([self.tokens[piece.row][i][piece.begin : piece.end] for piece in pieces]) for i in range(3)
        )
        return q, k, v

    def step(self, pieces: list[Piece]) -> Tensor:
        shape = self.shape
        return attend(*self.prepare(pieces), self.state.handle, shape.scale, shape.softcap, shape.window)

    def step_ref(self, pieces: list[Piece]) -> Tensor:
        shape, state = self.shape, self.state
        places = (state.k_cache, state.v_cache, state.block_table, state.row, state.position)
        return attend_ref(*self.prepare(pieces), *places, shape.scale, shape.softcap, shape.window)

    def formula(self) -> Tensor:
        """What attend has to give for all tokens in order of rows, in float64 and without a cache."""
        shape, outs = self.shape, []
        for q, k, v in self.tokens:
            group = shape.num_heads // shape.num_kv_heads
            k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("nhd,phd->hnp", q.double(), k) * shape.scale
            if shape.softcap:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
            hidden = (distance < 0) | (distance >= (shape.window or len(q)))
            outs.append(torch.einsum("hnp,phd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(outs)


def assert_is_the_formula(out: Tensor, exact: Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}[out.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_type_is_the_formula(level: str, shape: Shape, dtype: torch.dtype) -> None:
    sequences = Sequences([90, 1, 17], shape, dtype)
    out = sequences.step(sequences.whole)
    assert_is_the_formula(out, sequences.formula())
    reference = Sequences([90, 1, 17], shape, dtype)
    assert_is_the_formula(reference.step_ref(reference.whole), sequences.formula())
    for written, expected in [(sequences.k_cache, reference.k_cache), (sequences.v_cache, reference.v_cache)]:
        assert_same_bits(written, expected)


@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    group=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    d_head=st.sampled_from([1, 8, 24, 32, 64, 96]),
    block_size=st.sampled_from([1, 3, 16, 48]),
    softcap=st.sampled_from([0.0, 2.0]),
    window=st.integers(0, 90),
    dtype=st.sampled_from(DTYPES),
    cut=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=120)
def test_any_step_is_the_formula(
    lengths: list[int],
    group: int,
    num_kv_heads: int,
    d_head: int,
    block_size: int,
    softcap: float,
    window: int,
    dtype: torch.dtype,
    cut: float,
    seed: int,
) -> None:
    shape = Shape(group * num_kv_heads, num_kv_heads, d_head, block_size, softcap, window)
    sequences = Sequences(lengths, shape, dtype, seed)
    cuts = [int(cut * length) for length in lengths]
    first = sequences.step([Piece(row, 0, at) for row, at in enumerate(cuts)])
    second = sequences.step(
        [Piece(row, at, length) for row, (at, length) in enumerate(zip(cuts, lengths, strict=True))]
    )
    parts = zip(first.split(cuts), second.split([n - at for n, at in zip(lengths, cuts, strict=True)]), strict=True)
    assert_is_the_formula(torch.cat([part for pair in parts for part in pair]), sequences.formula())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_the_same_bits_however_its_prompt_is_cut_and_whoever_is_beside_it(
    level: str, shape: Shape, dtype: torch.dtype, four_threads: None
) -> None:
    lengths = [150, 33, 1]
    expected = Sequences(lengths, shape, dtype).step([Piece(0, 0, 150)])
    for size in (1, 7, 64):
        sequences = Sequences(lengths, shape, dtype)
        steps = [[Piece(0, begin, min(begin + size, 150))] for begin in range(0, 150, size)]
        assert_same_bits(torch.cat([sequences.step(step) for step in steps]), expected)

    crowded = Sequences(lengths, shape, dtype)
    neighbours = [[Piece(2, 0, 1), Piece(1, 0, 20)], [Piece(1, 20, 21)], [Piece(1, 21, 33)]]
    outs = []
    for (begin, end), before in zip([(0, 50), (50, 51), (51, 150)], neighbours, strict=True):
        outs.append(crowded.step([*before, Piece(0, begin, end)])[-(end - begin) :])
    assert_same_bits(torch.cat(outs), expected)

    torch.set_num_threads(1)
    assert_same_bits(Sequences(lengths, shape, dtype).step([Piece(0, 0, 150)]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_token_does_not_see_does_not_matter(level: str, dtype: torch.dtype) -> None:
    shape = Shape(window=20)
    sequences = Sequences([64, 8], shape, dtype)
    expected = sequences.step(sequences.whole)
    q, k, v = sequences.prepare([Piece(0, 63, 64)])
    seen = torch.arange(44, 64)
    inside = sequences.block_table[0, seen // 16].long(), seen % 16
    for cache in (sequences.k_cache, sequences.v_cache):
        kept = cache[inside[0], :, inside[1]].clone()
        cache.fill_(torch.nan)
        cache[inside[0], :, inside[1]] = kept
    out = attend(q, k, v, sequences.state.handle, shape.scale, 0.0, shape.window)
    assert_same_bits(out[0], expected[63])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_row_is_seen_and_leaves_the_others_alone(level: str, dtype: torch.dtype) -> None:
    clean, broken = (Sequences([20, 30, 40], Shape(), dtype) for _ in range(2))
    broken.tokens[1][1][12] = torch.nan
    expected, out = clean.step(clean.whole), broken.step(broken.whole)
    others = [*range(20), *range(50, 90)]
    assert_same_bits(out[others], expected[others])
    assert out[32:50].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart_do_not_overflow(level: str, dtype: torch.dtype) -> None:
    sequences = Sequences([70], Shape(), dtype)
    for tensor in sequences.tokens[0][:2]:
        tensor *= 60
    assert_is_the_formula(sequences.step(sequences.whole), sequences.formula())


def test_tokens_and_heads_may_lie_apart(level: str) -> None:
    shape = Shape(6, 2, 20)
    sequences = Sequences([9, 5], shape, torch.float32)
    expected = sequences.step(sequences.whole)
    heads = torch.cat(sequences.prepare(sequences.whole), dim=1)  # q, k and v as one projection gives them
    by_head = heads.transpose(0, 1).contiguous().transpose(0, 1)
    for fused in (heads, by_head):
        q, k, v = fused.split([6, 2, 2], dim=1)
        assert_same_bits(attend(q, k, v, sequences.state.handle, shape.scale), expected)


def test_no_tokens() -> None:
    sequences = Sequences([4], Shape(), torch.float32)
    assert sequences.step([Piece(0, 0, 0)]).shape == (0, 6, 32)
    assert sequences.k_cache.isnan().all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.row.__setitem__(2, 2), r"row\[2\]: got 2, expected an index below 2"),
        (lambda s: s.row.__setitem__(0, -1), r"row\[0\]: got -1"),
        (lambda s: s.position.__setitem__(3, -1), r"position\[3\]: got -1"),
        (lambda s: s.position.__setitem__(4, 16), r"position\[4\]: got 16, expected an index below 16"),
        (lambda s: s.position.__setitem__(4, 2**31 - 1), r"position\[4\]"),
        (lambda s: s.block_table.__setitem__((0, 0), 3), r"block_table\[0\]: got 3, expected an index below 3"),
        (lambda s: s.block_table.__setitem__((1, 0), -1), r"block_table\[1\]: got -1"),
    ],
)
def test_an_index_out_of_range_is_named_and_nothing_is_written(
    damage: Callable[[Sequences], None], message: str
) -> None:
    sequences = Sequences([3, 2], Shape(), torch.float32)
    q, k, v = sequences.prepare(sequences.whole)
    damage(sequences)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, sequences.state.handle, 1.0)
    assert sequences.k_cache.isnan().all()
    assert sequences.v_cache.isnan().all()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": torch.ones(5, 6, 32).double()}, TypeError, r"q: got torch\.float64, expected torch\.float32"),
        ({"k": torch.ones(5, 2, 32).bfloat16()}, TypeError, r"k: got torch\.bfloat16, expected torch\.float32"),
        ({"q": torch.ones(5, 192)}, ValueError, r"q: got shape \(5, 192\)"),
        ({"q": torch.ones(5, 5, 32)}, ValueError, "q: got 5 heads, expected a multiple of 2"),
        ({"q": torch.ones(5, 6, 31)}, ValueError, r"q: got shape \(5, 6, 31\)"),
        ({"k": torch.ones(4, 2, 32)}, ValueError, r"k: got shape \(4, 2, 32\), expected \(5, 2, 32\)"),
        ({"v": torch.ones(5, 1, 32)}, ValueError, r"v: got shape \(5, 1, 32\)"),
        ({"v": torch.ones(5, 2, 64)[..., ::2]}, ValueError, "v: got elements of a head that lie apart"),
        ({"q": torch.ones(5, 6, 32, requires_grad=True)}, ValueError, "q: requires grad"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1"),
        ({"softcap": torch.nan}, ValueError, "softcap: got nan"),
        ({"window": -1}, ValueError, "window: got -1"),
        ({"state": 0}, ValueError, "state: got 0, expected the handle of an open state"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, object], error: type[Exception], message: str) -> None:
    sequences = Sequences([3, 2], Shape(), torch.float32)
    q, k, v = sequences.prepare(sequences.whole)
    valid = {"q": q, "k": k, "v": v, "state": sequences.state.handle, "scale": 1.0, "softcap": 0.0, "window": 0}
    with pytest.raises(error, match=message):
        attend(**valid | wrong)
    assert attend(**valid).shape == (5, 6, 32)


def test_more_tokens_than_the_state_has_room_for() -> None:
    sequences = Sequences([3, 2], Shape(), torch.float32)
    with pytest.raises(ValueError, match="q: got 9 tokens, expected at most 8"):
        attend(torch.ones(9, 6, 32), torch.ones(9, 2, 32), torch.ones(9, 2, 32), sequences.state.handle, 1.0)


STATE = {
    "k_cache": torch.ones(4, 2, 16, 32), "v_cache": torch.ones(4, 2, 16, 32),
    "block_table": torch.zeros(2, 3, dtype=torch.int32), "row": torch.zeros(7, dtype=torch.int32),
    "position": torch.zeros(7, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"k_cache": torch.ones(4, 2, 16, 32).half()}, TypeError, r"k_cache: got torch\.float16"),
        ({"v_cache": torch.ones(4, 2, 16, 32).bfloat16()}, TypeError, r"v_cache: got torch\.bfloat16"),
        ({"block_table": torch.zeros(2, 3)}, TypeError, r"block_table: got torch\.float32"),
        ({"row": torch.zeros(7, dtype=torch.int64)}, TypeError, r"row: got torch\.int64"),
        ({"k_cache": torch.ones(4, 2, 16)}, ValueError, r"k_cache: got shape \(4, 2, 16\)"),
        ({"k_cache": torch.ones(4, 0, 16, 32)}, ValueError, "k_cache: .*expected no empty dimension"),
        ({"k_cache": torch.ones(4, 2, 32, 16).mT}, ValueError, "k_cache: got strides"),
        ({"v_cache": torch.ones(3, 2, 16, 32)}, ValueError, r"v_cache: got shape \(3, 2, 16, 32\)"),
        ({"position": torch.zeros(6, dtype=torch.int32)}, ValueError, r"position: got shape \(6,\)"),
    ],
)
def test_a_state_checks_its_buffers(wrong: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionState(**STATE | wrong)


def test_a_handle_ends_with_its_state_and_is_not_used_again() -> None:
    def call(handle: int) -> Tensor:
        return attend(torch.ones(1, 2, 32), torch.ones(1, 2, 32), torch.ones(1, 2, 32), handle, 1.0)

    closed, dropped = AttentionState(**STATE), AttentionState(**STATE)
    handles = [closed.handle, dropped.handle]
    for handle in handles:
        assert call(handle).shape == (1, 2, 32)
    closed.close()
    closed.close()
    del dropped
    later = [AttentionState(**STATE) for _ in range(3)]
    assert not {state.handle for state in later} & set(handles)
    for handle in handles:
        with pytest.raises(ValueError, match="state: got"):
            call(handle)


def test_torch_accepts_the_registration() -> None:
    sequences = Sequences([9, 5], Shape(), torch.float32)
    q, k, v = sequences.prepare(sequences.whole)
    torch.library.opcheck(torch.ops.steerserve.attend.default, (q, k, v, sequences.state.handle, 0.5, 0.0, 7))


def test_a_compiled_graph_has_the_same_bits_whatever_the_step() -> None:
    eager, traced = (Sequences([40, 12], Shape(), torch.bfloat16) for _ in range(2))
    compiled = torch.compile(
        lambda q, k, v: attend(q * 2, k, v, traced.state.handle, 0.5) + 1,
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    for pieces in ([Piece(0, 0, 39), Piece(1, 0, 12)], [Piece(0, 39, 40)]):
        q, k, v = eager.prepare(pieces)
        expected = attend(q * 2, k, v, eager.state.handle, 0.5) + 1
        assert_same_bits(compiled(*traced.prepare(pieces)), expected)
