"""Tokens per second of a real server, steered against unsteered, over gRPC.

Baseline: the same server and the same prompts without steering. Steered: 64 features of an SAE in
every request, another 64 for every request of a batch. Runs alternate, so that whatever else the
machine does falls on both; the first pair is discarded; the receipts show that all features ran.

    python bench/bench_serve.py [--trials 5] [--max-tokens 48] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from steerserve import FeatureTarget, Intervention, Op, Site, SteerserveClient
from steerserve.models.pull import pull
from steerserve.sae.model import SAE
from steerserve.sae.saelens import save_sae

MODEL = "smollm2-135m-instruct"
SITE, D_MODEL = Site.parse("blocks.14.hook_resid_post"), 576
NUM_FEATURES = 64
CONCURRENCIES = (1, 4, 16)
PROMPT = "The most important thing to know about the sea is that"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    pull(MODEL)
    with tempfile.TemporaryDirectory() as directory:
        sae = Path(directory) / "random-sae"
        save_sae(random_sae(), sae)
        command = [sys.executable, "-m", "steerserve", "serve", "--port", "0", "--dtype", args.dtype, "--sae", str(sae)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                with SteerserveClient(server.stdout.readline().split()[-1]) as client:
                    report([(count, *measure(client, count, args)) for count in CONCURRENCIES], args)
            finally:
                server.terminate()


def random_sae() -> SAE:
    """Enough features for every row to have its own; half of them fire on any token, more than in a trained SAE."""
    generator = torch.Generator().manual_seed(0)
    d_sae = NUM_FEATURES * max(CONCURRENCIES)
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, D_MODEL, generator=generator))
    bias, threshold = torch.zeros(2, d_sae).unbind()
    return SAE(
        "random-sae", SITE, decoder.T.contiguous(), bias, decoder, torch.zeros(D_MODEL), threshold=threshold.clone()
    )


def plan(row: int) -> list[Intervention]:
    """Row r scales its own 64 features, by little: the text stays text, the work is done."""
    first = row * NUM_FEATURES
    return [
        Intervention(FeatureTarget("random-sae", feature), Op.SCALE, 0.99)
        for feature in range(first, first + NUM_FEATURES)
    ]


def measure(client: SteerserveClient, concurrency: int, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Tokens per second of each trial, unsteered and steered."""
    pairs = [
        (
            run(client, concurrency, args.max_tokens, steered=False),
            run(client, concurrency, args.max_tokens, steered=True),
        )
        for _ in track(range(args.trials + 1), f"concurrency {concurrency}", console=Console(stderr=True))
    ]
    unsteered, steered = zip(*pairs[1:], strict=True)
    return list(unsteered), list(steered)


def run(client: SteerserveClient, concurrency: int, max_tokens: int, steered: bool) -> float:
    """Tokens per second of one batch, from the first request sent to the last response received."""

    def ask(row: int) -> int:
        reply = client.generate(
            PROMPT, steer=plan(row) if steered else (), max_tokens=max_tokens, temperature=0, ignore_eos=True
        )
        assert len(reply.receipt.interventions) == (NUM_FEATURES if steered else 0), "the server ran another plan"
        assert reply.receipt.steered is steered, "the server steered otherwise than asked"
        return len(reply.token_ids)

    with ThreadPoolExecutor(concurrency) as pool:
        start = time.perf_counter()
        num_tokens = sum(pool.map(ask, range(concurrency)))
        return num_tokens / (time.perf_counter() - start)


def report(rows: Sequence[tuple[int, list[float], list[float]]], args: argparse.Namespace) -> None:
    """Median tokens/s with the range over trials; the ratio is the median over pairs."""
    table = Table(title=f"{MODEL} {args.dtype}, {NUM_FEATURES} features a row, {args.max_tokens} tokens, tokens/s")
    for heading in ("concurrency", "unsteered (baseline)", "steered", "steered / unsteered"):
        table.add_column(heading, justify="right")
    for concurrency, unsteered, steered in rows:
        ratios = [after / before for before, after in zip(unsteered, steered, strict=True)]
        table.add_row(str(concurrency), spread(unsteered, ".1f"), spread(steered, ".1f"), spread(ratios, ".3f"))
    Console(width=110).print(table)


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}} – {max(values):{form}}]"


if __name__ == "__main__":
    main()
