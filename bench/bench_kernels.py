"""Every kernel on this machine's CPU against what one would use instead, all in one run.

Calls of a case take turns in random order, so that whatever else the machine does falls on all of them. Columns:

    µs ± IQR    median time of one call of ours, and the spread of its middle half
    GB/s        bytes that the call has to read and write, each once, over the median
    of read     that over the read bandwidth of memory, measured in this run (printed above the table): beyond 100 %
                the weights came from cache
    dense ÷     torch's time over ours: the dense matmuls of the whole SAE (or what the case states), in the same
                dtype, from the faster of both weight layouts
    bag ÷       torch.nn.functional.embedding_bag's time over ours
    SAELens ÷   SAELens' time over ours: SAE.encode, SAE.decode, or SAE.forward with a hook that clamps one feature;
                for steer_delta with its error term, which is what keeps the rest of x

The size is d × d_sae for SAEs of SmolLM2-135M's, Gemma-2-2B's and Llama-3-8B's sizes, with 64 active features a row;
d_in × d_out for linear, against torch's; heads × d_head for attend, which adds B tokens to a sequence of 500 ("prompt")
or one to each of B ("decode"), against scaled_dot_product_attention on contiguous keys and values that were expanded to
all heads beforehand. Weights and caches of these two are taken in turn, as the layers of a model are.
 SAELens is not among our
dependencies: `pip install -e '.[bench]'`; its column stays empty without it.

    python bench/bench_kernels.py [--quick] [--only sae_encode] [--threads N]
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from steerserve.config import EngineConfig
from steerserve.engine.runner import ModelRunner
from steerserve.kernels.attend import AttentionState, attend
from steerserve.kernels.head_scale import head_scale_
from steerserve.kernels.linear import linear
from steerserve.kernels.sae_decode import sae_decode
from steerserve.kernels.sae_encode import SparseFeatures, sae_encode
from steerserve.kernels.sae_splice import sae_splice_
from steerserve.kernels.steer_delta import Normalization, OpCode, steer_delta_
from steerserve.models.loading import load_model
from steerserve.models.pull import pull

LINEAR_SIZES = [(576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152), (4096, 14336)]
HEAD_SIZES = [(9, 3, 64), (4, 1, 256), (32, 8, 128)]
SIZES = {"SmolLM2-135M": (576, 4608), "Gemma-2-2B": (2304, 16384), "Llama-3-8B": (4096, 131072)}
DTYPES = (torch.float32, torch.bfloat16)
NUM_ACTIVE = 64
CAPACITY = 512
LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
SECONDS_PER_CASE = 1.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One line of the table: our call, its bytes, and the calls that it is compared with by column."""

    op: str
    num_rows: int
    size: str
    dtype: str
    num_bytes: int
    ours: Call
    baselines: dict[str, list[Call]]


@dataclass(frozen=True)
class RandomSAE:
    """An SAE in which about ``NUM_ACTIVE`` features fire on a standard normal activation."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    saelens: object | None

    @classmethod
    def make(cls, d: int, d_sae: int, dtype: torch.dtype) -> RandomSAE:
        W_enc, W_dec = (torch.empty(d_sae, d, dtype=dtype).normal_().div_(d**0.5) for _ in range(2))
        threshold = torch.full((d_sae,), -torch.special.ndtri(torch.tensor(NUM_ACTIVE / d_sae)).item())
        b_enc, b_dec = torch.zeros(d_sae), torch.zeros(d)
        return cls(W_enc, W_dec, b_enc, b_dec, threshold, saelens_twin(W_enc, W_dec, threshold))

    @property
    def d(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    def dense_encode(self, x: Tensor, *, rows: bool) -> Tensor:
        """Dense features of ``x`` from weights stored a feature a row, or a feature a column."""
        pre = F.linear(x, self.W_enc) if rows else x @ self.columns
        return pre * (pre > self.threshold.to(x.dtype))

    @property
    def columns(self) -> Tensor:
        return self.saelens.W_enc if self.saelens is not None else self.W_enc.T  # type: ignore[attr-defined]


def saelens_twin(W_enc: Tensor, W_dec: Tensor, threshold: Tensor) -> object | None:
    """The same SAE in SAELens, or None where it is not installed; W_dec is shared."""
    try:
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    except ImportError:
        return None
    d_sae, d = W_enc.shape
    config = JumpReLUSAEConfig(d_in=d, d_sae=d_sae, dtype=str(W_enc.dtype).removeprefix("torch."), device="cpu")
    sae = JumpReLUSAE(config)
    sae.W_enc.data = W_enc.T.contiguous()
    sae.W_dec.data = W_dec
    sae.threshold.data = threshold.to(W_enc.dtype)
    return sae


def clamp_one(features: Tensor, hook: object) -> Tensor:
    """A SAELens hook: clamp a feature wherever it fires."""
    features[..., 0] = torch.where(features[..., 0] > 0, 1.0, features[..., 0])
    return features


def with_hook(sae: object, x: Tensor, *, error_term: bool) -> Tensor:
    sae.use_error_term = error_term  # type: ignore[attr-defined]
    return sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", clamp_one)])  # type: ignore[attr-defined, no-any-return]


def encode_case(sae: RandomSAE, x: Tensor) -> tuple[int, Call, dict[str, list[Call]]]:
    out = SparseFeatures.empty(len(x), CAPACITY)
    num_bytes = sae.W_enc.nbytes + x.nbytes + 8 * sae.d_sae
    return (
        num_bytes,
        lambda: sae_encode(x, sae.W_enc, sae.b_enc, sae.threshold, torch.inf, 0, *out),
        {
            "dense": [lambda: sae.dense_encode(x, rows=True), lambda: sae.dense_encode(x, rows=False)],
            "SAELens": [lambda: sae.saelens.encode(x)] if sae.saelens else [],  # type: ignore[attr-defined]
        },
    )


def topk_case(sae: RandomSAE, x: Tensor) -> tuple[int, Call, dict[str, list[Call]]]:
    out = SparseFeatures.empty(len(x), NUM_ACTIVE)
    zero = torch.zeros(sae.d_sae)
    num_bytes = sae.W_enc.nbytes + x.nbytes + 8 * sae.d_sae

    def dense(rows: bool) -> object:
        pre = F.linear(x, sae.W_enc) if rows else x @ sae.columns
        return torch.relu(pre).topk(NUM_ACTIVE)

    return (
        num_bytes,
        lambda: sae_encode(x, sae.W_enc, sae.b_enc, zero, torch.inf, NUM_ACTIVE, *out),
        {"dense": [lambda: dense(True), lambda: dense(False)]},
    )


def decode_case(sae: RandomSAE, x: Tensor) -> tuple[int, Call, dict[str, list[Call]]]:
    features = SparseFeatures.empty(len(x), CAPACITY)
    sae_encode(x, sae.W_enc, sae.b_enc, sae.threshold, torch.inf, 0, *features)
    dense = features.to_dense(sae.d_sae).to(x.dtype)
    out = torch.empty_like(x)
    total = int(features.count.sum())
    used = torch.arange(CAPACITY) < features.count[:, None]
    flat, values = features.indices[used].long(), features.values[used].to(x.dtype)
    offsets = F.pad(features.count.cumsum(0)[:-1], (1, 0))
    return (
        total * (sae.d * sae.W_dec.itemsize + 8) + out.nbytes,
        lambda: sae_decode(*features, sae.W_dec, sae.b_dec, out),
        {
            "dense": [lambda: dense @ sae.W_dec],
            "bag": [lambda: F.embedding_bag(flat, sae.W_dec, offsets, mode="sum", per_sample_weights=values)],
            "SAELens": [lambda: sae.saelens.decode(dense)] if sae.saelens else [],  # type: ignore[attr-defined]
        },
    )


def splice_case(sae: RandomSAE, x: Tensor) -> tuple[int, Call, dict[str, list[Call]]]:
    num_rows = len(x)
    out, x_norm = SparseFeatures.empty(num_rows, CAPACITY), torch.empty(num_rows)
    rows = torch.arange(num_rows, dtype=torch.int32)
    ptr = torch.arange(num_rows + 1, dtype=torch.int32)
    feature, op = torch.zeros(num_rows, dtype=torch.int32), torch.full((num_rows,), OpCode.CLAMP, dtype=torch.uint8)
    value, activation, edit = torch.ones(num_rows), torch.empty(num_rows), torch.empty(num_rows)
    work = x.clone()

    def ours() -> None:
        work.copy_(x)  # spliced in place, and a splice of a splice would have other features
        sae_splice_(
            work, rows, ptr, feature, op, value, sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec,
            torch.inf, Normalization.NONE, 0, *out, activation, edit, x_norm,
        )  # fmt: skip

    def dense(layout: bool) -> Tensor:
        f = sae.dense_encode(x, rows=layout)
        f[:, 0] = torch.where(f[:, 0] > 0, 1.0, f[:, 0])
        return f @ sae.W_dec

    return (
        sae.W_enc.nbytes + num_rows * NUM_ACTIVE * sae.d * sae.W_dec.itemsize + 2 * x.nbytes,
        ours,
        {
            "dense": [lambda: dense(True), lambda: dense(False)],
            "SAELens": [lambda: with_hook(sae.saelens, x, error_term=False)] if sae.saelens else [],
        },
    )


def delta_case(sae: RandomSAE, x: Tensor) -> tuple[int, Call, dict[str, list[Call]]]:
    num_rows, nnz = len(x), len(x) * NUM_ACTIVE
    # Every entry edits, and by so little that x stays finite.
    slot = torch.randperm(sae.d_sae)[:nnz].int() if nnz <= sae.d_sae else torch.arange(nnz).int() % sae.d_sae
    arguments = (
        x.clone(), torch.arange(0, nnz + 1, NUM_ACTIVE, dtype=torch.int32), slot,
        torch.full((nnz,), OpCode.ADD, dtype=torch.uint8), torch.full((nnz,), 1e-4),
        torch.full((nnz,), -1, dtype=torch.int32), sae.W_enc, sae.b_enc, sae.threshold,
        torch.full((sae.d_sae,), torch.inf), torch.zeros(sae.d_sae, dtype=torch.uint8), sae.W_dec,
        torch.zeros(num_rows + 1, dtype=torch.int32), torch.empty(0), torch.empty(0),
        torch.empty(nnz), torch.empty(nnz), torch.empty(num_rows),
    )  # fmt: skip

    def dense(layout: bool) -> Tensor:
        f = sae.dense_encode(x, rows=layout)
        edit = torch.zeros_like(f)
        edit[:, 0] = torch.where(f[:, 0] > 0, 1.0 - f[:, 0], 0.0)
        return x + edit @ sae.W_dec

    return (
        2 * nnz * sae.d * sae.W_enc.itemsize + 2 * x.nbytes,
        lambda: steer_delta_(*arguments),
        {
            "dense": [lambda: dense(True), lambda: dense(False)],
            "SAELens": [lambda: with_hook(sae.saelens, x, error_term=True)] if sae.saelens else [],
        },
    )


def head_case(num_rows: int, dtype: torch.dtype) -> Case:
    z = torch.randn(num_rows, 32, 128, dtype=dtype)
    num_heads = 4
    ptr = torch.arange(0, num_rows * num_heads + 1, num_heads, dtype=torch.int32)
    head = torch.arange(num_rows * num_heads, dtype=torch.int32) % 32
    scale = torch.full((num_rows * num_heads,), -1.0)  # z is scaled over and over and must stay finite
    z_norm = torch.empty(num_rows * num_heads)
    row = torch.arange(num_rows).repeat_interleave(num_heads)

    def dense() -> None:
        z[row, head.long()] *= scale[:, None].to(dtype)

    num_bytes = 2 * num_rows * num_heads * 128 * z.itemsize
    call = lambda: head_scale_(z, ptr, head, scale, z_norm)  # noqa: E731
    return Case("head_scale", num_rows, "32 × 128", str(dtype)[6:], num_bytes, call, {"dense": [dense]})


def linear_case(num_rows: int, d_in: int, d_out: int, dtype: torch.dtype) -> Case:
    x = torch.randn(num_rows, d_in, dtype=dtype)
    num_bytes = d_in * d_out * x.itemsize
    weights = [torch.randn(d_out, d_in, dtype=dtype) for _ in range(max(2, min(64, (256 << 20) // num_bytes)))]
    ours, dense = itertools.cycle(weights), itertools.cycle(weights)
    return Case(
        *("linear", num_rows, f"{d_in} × {d_out}", str(dtype)[6:]),
        num_bytes + x.nbytes + num_rows * d_out * x.itemsize,
        lambda: linear(x, next(ours)),
        {"dense": [lambda: F.linear(x, next(dense))]},
    )


def attend_case(kind: str, num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> Case:
    num_heads, num_kv_heads, d_head = heads
    num_rows, block_size, length, num_layers = (num_tokens if kind == "decode" else 1), 16, 500, 4
    num_new, max_blocks = num_tokens // num_rows, -(-length // block_size)
    block_table = torch.randperm(num_rows * max_blocks).view(num_rows, max_blocks).int()
    row = torch.arange(num_rows).repeat_interleave(num_new).int()
    position = torch.arange(length - num_new, length).repeat(num_rows).int()

    def layers(*sizes: int) -> list[list[Tensor]]:
        return [[torch.randn(sizes, dtype=dtype) for _ in range(2)] for _ in range(num_layers)]

    caches = layers(num_rows * max_blocks, num_kv_heads, block_size, d_head)
    states = [AttentionState(*cache, block_table, row, position) for cache in caches]
    q, k, v = (torch.randn(num_tokens, n, d_head, dtype=dtype) for n in (num_heads, num_kv_heads, num_kv_heads))
    query = q.view(num_rows, num_new, num_heads, d_head).transpose(1, 2)
    mask = position[:num_new, None] >= torch.arange(length) if num_new > 1 else None
    ours, dense = itertools.cycle(states), itertools.cycle(layers(num_rows, num_heads, length, d_head))
    return Case(
        *(f"attend {kind}", num_tokens, f"{num_heads} × {d_head}", str(dtype)[6:]),
        2 * num_rows * length * num_kv_heads * d_head * q.itemsize + 2 * q.nbytes,
        lambda: attend(q, k, v, next(ours).handle, d_head**-0.5),
        {"dense": [lambda: F.scaled_dot_product_attention(query, *next(dense), attn_mask=mask)]},
    )


SAE_OPS = {
    "sae_encode": encode_case,
    "sae_encode top-k": topk_case,
    "sae_decode": decode_case,
    "sae_splice": splice_case,
    "steer_delta": delta_case,
}


def cases(quick: bool, only: str) -> Iterator[Case]:
    """All lines of the table, an SAE after the other: the largest takes 9 GB with its twin."""
    batch_sizes = (1, 16) if quick else (1, 4, 16, 64, 256)
    for d, d_sae in list(SIZES.values())[: 2 if quick else 3]:
        for dtype in DTYPES:
            sae = RandomSAE.make(d, d_sae, dtype)
            for op, make in SAE_OPS.items():
                for num_rows in batch_sizes:
                    if op.startswith(only):
                        x = torch.randn(num_rows, d).to(dtype)
                        yield Case(op, num_rows, f"{d} × {d_sae}", str(dtype)[6:], *make(sae, x))
    for dtype in DTYPES:
        for num_rows in batch_sizes:
            if "head_scale".startswith(only):
                yield head_case(num_rows, dtype)
            if "linear".startswith(only):
                yield from (linear_case(num_rows, *size, dtype) for size in LINEAR_SIZES[: 4 if quick else None])
            if "attend".startswith(only):
                for heads, kind in itertools.product(HEAD_SIZES[: 1 if quick else None], ("decode", "prompt")):
                    yield attend_case(kind, num_rows, heads, dtype)


def timed(calls: list[Call]) -> list[list[float]]:
    """Seconds of each call, in an order drawn anew each round: what ran before decides what is in cache and awake."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + SECONDS_PER_CASE
    while len(times[0]) < 5 or (time.perf_counter() < stop and len(times[0]) < 200):
        for which in random.sample(range(len(calls)), len(calls)):
            start = time.perf_counter()
            calls[which]()
            times[which].append(time.perf_counter() - start)
    return times


def read_bandwidth() -> float:
    """Bytes a second that torch reads from memory, four times the last-level cache: the best of three operators."""
    cache = int(LAST_LEVEL_CACHE.read_text().rstrip("K\n")) << 10 if LAST_LEVEL_CACHE.exists() else 1 << 29
    num_bytes = -(-4 * cache // 16000) * 16000
    data = torch.ones(num_bytes // 4)
    matrix, vector = data.view(-1, 4000), torch.ones(4000)
    times = timed([lambda: data.sum(), lambda: torch.dot(data, data), lambda: matrix @ vector])
    return num_bytes / min(statistics.median(seconds) for seconds in times)


def line(case: Case, bandwidth: float) -> list[str]:
    names = [name for name, calls in case.baselines.items() for _ in calls]
    times = timed([case.ours, *(call for calls in case.baselines.values() for call in calls)])
    medians = [statistics.median(seconds) for seconds in times]
    ours, rate = medians[0], case.num_bytes / medians[0]
    lower, _, upper = statistics.quantiles(times[0], n=4)
    best: dict[str, float] = {}
    for name, median in zip(names, medians[1:], strict=True):
        best[name] = min(median, best.get(name, median))
    return [
        *(case.op, str(case.num_rows), case.size, case.dtype),
        *(f"{ours * 1e6:.0f} ± {(upper - lower) * 1e6:.0f}", f"{rate / 1e9:.1f}", f"{rate / bandwidth:.0%}"),
        *(f"{best[name] / ours:.2f}" if name in best else "" for name in ("dense", "bag", "SAELens")),
    ]


def decode_step_table() -> Table:
    """``steer_delta_`` with 64 features in every row, all different, against a decode step of SmolLM2 in bfloat16."""
    model = load_model(str(pull("smollm2-135m-instruct")), torch.bfloat16)
    table = Table("B", "decode step, ms", "steer_delta, µs", "share", title="64 features a row at one layer of SmolLM2")
    for num_rows in (1, 16):
        runner = ModelRunner(model, EngineConfig(max_num_seqs=num_rows, max_model_len=128), sites=[])
        sae = RandomSAE.make(model.d_model, 64 * num_rows, torch.float32)
        _, steer, _ = delta_case(sae, torch.randn(num_rows, model.d_model).bfloat16())
        tokens, positions, rows = [1] * num_rows, [64] * num_rows, list(range(num_rows))
        num_blocks = runner.kv_store.block_table.shape[1]
        for row in rows:
            runner.set_blocks(row, 0, range(row * num_blocks, (row + 1) * num_blocks))
        step = partial(runner.forward, tokens, positions, rows, logits_at=rows)

        step_time, steer_time = (statistics.median(seconds) for seconds in timed([step, steer]))
        table.add_row(
            str(num_rows), f"{step_time * 1e3:.1f}", f"{steer_time * 1e6:.0f}", f"{steer_time / step_time:.2%}"
        )
        runner.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, B = 1 and 16")
    parser.add_argument("--only", default="", metavar="OP", help="operators whose name starts so")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=130)
    table = Table("op", "B", "d × d_sae", "dtype", "µs ± IQR", "GB/s", "of read", "dense ÷", "bag ÷", "SAELens ÷")
    with torch.inference_mode():
        bandwidth = read_bandwidth()
        for case in track(cases(options.quick, options.only), "timing", total=None):
            table.add_row(*line(case, bandwidth))
    console.print(f"{machine()}; reads {bandwidth / 1e9:.1f} GB/s from memory")
    console.print(table)
    if "steer_delta".startswith(options.only):
        console.print(decode_step_table())


if __name__ == "__main__":
    main()
