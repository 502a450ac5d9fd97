"""Tokens per second of a real server, steered against unsteered, over gRPC.

Baseline: the same server and the same prompts without steering. Steered: 64 features of an SAE in
every request, another 64 for every request of a batch. Runs alternate, so that whatever else the
machine does falls on both; the first pair is discarded; the receipts show that all features ran.

    python bench/bench_serve.py [--trials 5] [--max-tokens 48] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import spread
from rich.console import Console
from rich.progress import track
from rich.table import Table
from workload import MODEL, features_of_row, random_sae, small_edits

from steerserve import Site, SteerserveClient
from steerserve.models.pull import pull
from steerserve.sae.formats.saelens import save_sae

NUM_FEATURES = 64
CONCURRENCIES = (1, 4, 16)
SAE = random_sae(Site.parse("blocks.14.hook_resid_post"), NUM_FEATURES * max(CONCURRENCIES))
PROMPT = "The most important thing to know about the sea is that"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    pull(MODEL)
    with tempfile.TemporaryDirectory() as directory:
        sae = Path(directory) / SAE.name
        save_sae(SAE, sae)
        command = [sys.executable, "-m", "steerserve", "serve", "--port", "0", "--dtype", args.dtype, "--sae", str(sae)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                with SteerserveClient(server.stdout.readline().split()[-1]) as client:
                    report([(count, *measure(client, count, args)) for count in CONCURRENCIES], args)
            finally:
                server.terminate()


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
        plan = small_edits(features_of_row(SAE, row, NUM_FEATURES)) if steered else ()
        reply = client.generate(PROMPT, steer=plan, max_tokens=max_tokens, temperature=0, ignore_eos=True)
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


if __name__ == "__main__":
    main()
