"""steer_delta against the same edit in torch operators and against splicing a whole SAE.

Every row carries its own plan (no two rows share a feature) and every entry fires, the worst case for the kernel.
Activations are bfloat16, the bank float32, as in the server. Columns:

    µs ± IQR    median time of one call and the spread of its middle half
    GB/s        encoder rows, decoder rows and activations, each counted once, over the median
    ref ÷       time of ``steer_delta_ref_`` over ours
    dense ÷     time of a full encode and decode with d_sae = 8·d (what the edit would cost without the
                row-subset form), over ours

Run: python bench/bench_steer_delta.py
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Measurement, Timer

from steerserve.kernels.native import C
from steerserve.kernels.steer_delta import OpCode, steer_delta_, steer_delta_ref_

BATCH_SIZES, FEATURES_PER_ROW, WIDTHS = (1, 4, 16, 32), (8, 64), (576, 2048)
EXPANSION = 8


def arguments(num_rows: int, k: int, d: int) -> list[Tensor]:
    nnz = num_rows * k
    return [
        torch.randn(num_rows, d).bfloat16(),
        torch.arange(0, nnz + 1, k, dtype=torch.int32),
        torch.randperm(nnz).int(),
        torch.full((nnz,), OpCode.ADD, dtype=torch.uint8),
        torch.full((nnz,), 1e-3),  # small: x is edited over and over and must stay finite
        torch.randn(nnz, d) / d**0.5,
        torch.zeros(nnz),
        torch.zeros(nnz),
        torch.full((nnz,), torch.inf),
        torch.randn(nnz, d) / d**0.5,
        torch.zeros(nnz),
        torch.zeros(nnz),
        torch.zeros(num_rows),
    ]


def dense_splice(x: Tensor, W_enc: Tensor, W_dec: Tensor) -> Tensor:
    """Encode with every feature, clamp one, decode: the textbook replacement of a layer's output by its SAE."""
    features = torch.relu(x.float() @ W_enc)
    features[:, 0] = 1.0
    return (features @ W_dec).bfloat16()


def timed(call: Callable[..., object], *inputs: Tensor) -> Measurement:
    timer = Timer("call(*inputs)", globals={"call": call, "inputs": inputs}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.2)


def main() -> None:
    torch.manual_seed(0)
    table = Table("B", "k", "d", "µs ± IQR", "GB/s", "ref ÷", "dense ÷")
    with torch.inference_mode():
        for d in WIDTHS:
            sae = torch.randn(d, EXPANSION * d) / d**0.5, torch.randn(EXPANSION * d, d) / d**0.5
            for k, num_rows in product(FEATURES_PER_ROW, BATCH_SIZES):
                inputs = arguments(num_rows, k, d)
                ours = timed(steer_delta_, *inputs)
                ref, dense = timed(steer_delta_ref_, *inputs), timed(dense_splice, inputs[0], *sae)
                num_bytes = 2 * num_rows * k * d * 4 + 2 * num_rows * d * 2
                table.add_row(
                    *map(str, (num_rows, k, d)),
                    f"{ours.median * 1e6:.1f} ± {ours.iqr * 1e6:.1f}",
                    f"{num_bytes / ours.median / 1e9:.1f}",
                    f"{ref.median / ours.median:.1f}",
                    f"{dense.median / ours.median:.0f}",
                )
    console = Console(width=100)
    console.print(f"{C.simd_level()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    console.print(table)


if __name__ == "__main__":
    main()
