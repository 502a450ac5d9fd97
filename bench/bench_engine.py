"""The engine against itself without steering and against ``generate`` of transformers: SmolLM2 in bfloat16.

steering   decode tokens/s of engines over the same weights: with no hooks in the model; with hooks and no
           steering; with 64 edited features in every row; and with 16 monitored features at each of 4 more layers
           on top. No two rows share a feature, and every receipt has to say that all of them ran. Beside it the
           steering kernel alone: called again with the arguments of one steered step, over the time of that step
trace      requests that arrive as traffic does: continuous batching against static batches, which form in order of
           arrival when the one before is done
static     16 equal requests at once
startup    processes of their own, from nothing to a warm engine, and what it occupies

python bench/bench_engine.py [--only steering trace static startup] [--rounds N] [--compile] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from measure import Report, columns, interval, percentiles, ratio, spread, take_turns
from traffic import Arrival, poisson_trace, serve_continuously, serve_in_static_batches, without_end
from workload import features_of_row, greedy_request, load, random_prompt, random_sae, same_weights, small_edits

from steerserve import Intervention, Op, Site
from steerserve.config import EngineConfig
from steerserve.engine.engine import Engine
from steerserve.models import splice
from steerserve.models.loading import LoadedModel
from steerserve.steering.catalog import Catalog

BATCH_SIZES = (1, 4, 16, 32)
NUM_EDITED, NUM_MONITORED = 64, 16
EDITED = random_sae(Site.parse("blocks.14.hook_resid_post"), NUM_EDITED * max(BATCH_SIZES))
MONITORED = [
    random_sae(Site.parse(f"blocks.{layer}.hook_resid_post"), NUM_MONITORED * max(BATCH_SIZES))
    for layer in (6, 12, 18, 24)
]
PROMPT_LENGTH = 16
STEPS_PER_TURN = 4
NUM_ROUNDS = {"steering": 30, "trace": 20, "static": 20}
MAX_BATCH = 16
TRAFFIC = (32, 8.0)
"""Requests of a trace, and how many arrive in a second: more than either can serve."""
COMPARED = (
    ("unsteered", "no hooks"),
    ("steered", "no hooks"),
    ("steered", "unsteered"),
    ("monitored", "no hooks"),
    ("monitored", "unsteered"),
)

Plan = Callable[[int], list[Intervention]]
"""What a row asks for."""


def nothing(row: int) -> list[Intervention]:
    return []


def edits(row: int) -> list[Intervention]:
    return small_edits(features_of_row(EDITED, row, NUM_EDITED))


def edits_and_monitors(row: int) -> list[Intervention]:
    targets = [target for sae in MONITORED for target in features_of_row(sae, row, NUM_MONITORED)]
    return edits(row) + [Intervention(target, Op.MONITOR) for target in targets]


ARMS: dict[str, Plan] = {"no hooks": nothing, "unsteered": nothing, "steered": edits, "monitored": edits_and_monitors}


def make_engine(loaded: LoadedModel, options: argparse.Namespace, **config: object) -> Engine:
    catalog = Catalog(loaded, {sae.name: sae for sae in (EDITED, *MONITORED)}, {})
    values = {"max_num_seqs": MAX_BATCH, "max_model_len": 512, "compile": options.compile} | config
    return Engine(same_weights(loaded), catalog, EngineConfig.model_validate(values))


class DecodingBatch:
    """``batch_size`` requests of one engine that have their prompts behind them and go on until ``stop``."""

    def __init__(self, engine: Engine, plan: Plan, batch_size: int) -> None:
        self._engine, self._plan, self._batch_size = engine, plan, batch_size
        generator = random.Random(0)
        num_tokens = engine.config.max_model_len - PROMPT_LENGTH
        for row in range(batch_size):
            prompt = random_prompt(generator, PROMPT_LENGTH)
            engine.add_request(greedy_request(str(row), prompt, num_tokens, plan(row)))
        begun: set[str] = set()
        while len(begun) < batch_size:
            begun |= {output.request_id for output in engine.step() if output.token_ids}

    def advance(self, num_steps: int) -> float:
        """Tokens a second over some decode steps."""
        start = time.perf_counter()
        outputs = [output for _ in range(num_steps) for output in self._engine.step()]
        seconds = time.perf_counter() - start
        num_tokens = sum(len(output.token_ids) for output in outputs)
        assert num_tokens == num_steps * self._batch_size, "not every row decoded at every step"
        return num_tokens / seconds

    def kernel_seconds(self) -> float:
        """Median time of the steering kernel's calls in one decode step, made again by themselves."""
        with mock.patch.object(splice, "steer_delta_", wraps=splice.steer_delta_) as kernel:
            self.advance(1)
        calls, times = [call.args for call in kernel.call_args_list], []
        assert len(calls) == len({intervention.target.sae for intervention in self._plan(0)}), "a site was left out"
        for _ in range(200):
            start = time.perf_counter()
            for arguments in calls:
                splice.steer_delta_(*arguments)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def stop(self) -> None:
        """Check by the receipts that every row had done to it what it asked for, at every position so far."""
        for row in range(self._batch_size):
            self._engine.abort(str(row))
        receipts = {output.request_id: output.receipt for output in self._engine.step()}
        for row in range(self._batch_size):
            receipt, num_asked = receipts[str(row)], len(self._plan(row))
            assert receipt is not None
            assert (len(receipt.interventions), receipt.steered) == (num_asked, num_asked > 0), "another plan ran"


def steering(loaded: LoadedModel, rounds: int, options: argparse.Namespace, report: Report) -> None:
    engines = {arm: make_engine(loaded, options, max_num_seqs=max(BATCH_SIZES), sites=sites(arm)) for arm in ARMS}
    for arm in ("unsteered", "steered", "monitored"):
        # The hooks of a site are set when it is first used, and stay.
        DecodingBatch(engines[arm], edits_and_monitors, 1).stop()
    speeds = columns("Decoding: tokens/s, median over rounds and range", "B", *ARMS)
    ratios = columns("Decoding: what steering costs, median and 95 % interval", "B", *map(" / ".join, COMPARED))
    kernels = columns("The kernel's calls of one step made alone, and their share of it", "B", "steered", "monitored")
    for batch_size in BATCH_SIZES:
        batches = {arm: DecodingBatch(engines[arm], ARMS[arm], batch_size) for arm in ARMS}
        turns = {arm: lambda number, batch=batch: batch.advance(STEPS_PER_TURN) for arm, batch in batches.items()}
        rates = take_turns(f"B = {batch_size}", turns, rounds)
        shares = [kernel_share(batches[arm], batch_size, rates[arm]) for arm in ("steered", "monitored")]
        for batch in batches.values():
            batch.stop()
        speeds.add_row(str(batch_size), *(spread(values, ".1f") for values in rates.values()))
        ratios.add_row(str(batch_size), *(interval(ratio(rates[after], rates[before])) for after, before in COMPARED))
        kernels.add_row(str(batch_size), *shares)
    for engine in engines.values():
        engine.close()
    report.print(speeds, ratios, kernels)


def sites(arm: str) -> tuple[str, ...]:
    return () if arm == "no hooks" else tuple(sae.name for sae in (EDITED, *MONITORED))


def kernel_share(batch: DecodingBatch, batch_size: int, rates: Sequence[float]) -> str:
    seconds, step = batch.kernel_seconds(), batch_size / statistics.median(rates)
    return f"{seconds * 1e6:.0f} µs, {seconds / step:.2%}"


def trace(loaded: LoadedModel, rounds: int, options: argparse.Namespace, report: Report) -> None:
    engine, model = make_engine(loaded, options), without_end(same_weights(loaded).model)
    loads = take_turns(
        "trace",
        {
            "static batches": lambda seed: serve_in_static_batches(model, poisson_trace(*TRAFFIC, seed), MAX_BATCH),
            "engine": lambda seed: serve_continuously(engine, poisson_trace(*TRAFFIC, seed)),
        },
        rounds,
    )
    engine.close()
    rates = {arm: [load.tokens_per_second for load in borne] for arm, borne in loads.items()}
    title = (
        f"Traffic: {TRAFFIC[0]} requests, {TRAFFIC[1]} a second; another trace each round; batches of up to {MAX_BATCH}"
    )
    lines = columns(title, "", "tokens/s", "first token, ms p50 / p99", "between tokens, ms p50 / p99")
    for arm, borne in loads.items():
        first = [seconds for load in borne for seconds in load.first_token]
        between = [seconds for load in borne for seconds in load.between_tokens]
        lines.add_row(arm, spread(rates[arm], ".1f"), percentiles(first), percentiles(between))
    report.print(lines, f"engine / static batches, tokens/s: {interval(ratio(*reversed(rates.values())))}")


def static(loaded: LoadedModel, rounds: int, options: argparse.Namespace, report: Report) -> None:
    engine, model = make_engine(loaded, options), without_end(same_weights(loaded).model)

    def arrivals(seed: int) -> list[Arrival]:
        generator = random.Random(seed)  # new prompts each round: nothing of them is cached
        return [Arrival(0.0, random_prompt(generator, 32), 32) for _ in range(MAX_BATCH)]

    rates = take_turns(
        "static",
        {
            "generate": lambda seed: serve_in_static_batches(model, arrivals(seed), MAX_BATCH).tokens_per_second,
            "engine": lambda seed: serve_continuously(engine, arrivals(seed)).tokens_per_second,
        },
        rounds,
    )
    engine.close()
    lines = columns(f"{MAX_BATCH} equal requests at once: tokens/s, prompts of 32 and responses of 32", *rates, "ratio")
    ratios = ratio(rates["engine"], rates["generate"])
    lines.add_row(*(spread(values, ".1f") for values in rates.values()), interval(ratios))
    report.print(lines)


def startup(loaded: LoadedModel, rounds: int, options: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as compiled:
        facts = {
            "eager": start_engine(compiled),
            "compiled, first": start_engine(compiled, "--compile"),
            "compiled, cached": start_engine(compiled, "--compile"),
        }
    times = columns("From nothing to a warm engine, files in cache: seconds", "", *facts["eager"]["seconds"])
    memory = columns("Memory of that process: MiB", "", *facts["eager"]["bytes"], "beyond the accounts")
    for name, fact in facts.items():
        times.add_row(name, *(f"{seconds:.1f}" for seconds in fact["seconds"].values()))
        size = fact["bytes"]
        beyond = size["resident"] - size["imports"] - size["weights"] - size["kv_cache"] - size["plans"]
        memory.add_row(name, *(f"{number / 2**20:.0f}" for number in (*size.values(), beyond)))
    report.print(times, memory)


def start_engine(compiled: str, *arguments: str) -> dict[str, dict[str, float]]:
    """What ``startup.py`` prints, with its compiler's cache in the directory ``compiled``."""
    command = [sys.executable, str(Path(__file__).with_name("startup.py")), *arguments]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": compiled}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


SECTIONS = {"steering": steering, "trace": trace, "static": static, "startup": startup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, help="instead of each section's own number")
    parser.add_argument("--compile", action="store_true", help="engines that compile the model")
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results")
    options = parser.parse_args()
    report, loaded = Report(), load()
    for name in options.only:
        SECTIONS[name](loaded, options.rounds or NUM_ROUNDS.get(name, 1), options, report)
    if options.write:
        report.save()


if __name__ == "__main__":
    main()
