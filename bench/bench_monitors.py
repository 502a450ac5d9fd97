"""What monitors and scaled heads cost: decode steps of engines over the same weights, SmolLM2 in bfloat16.

plain      nothing is read or edited
monitored  a monitor plan: what eight heads of five layers write along a direction, 16 features and a concept's probe
1 head     every row scales one head
8 heads    every row scales those eight

python bench/bench_monitors.py [--rounds N] [--write]
"""

from __future__ import annotations

import argparse

import numpy as np
from bench_engine import STEPS_PER_TURN, DecodingBatch
from measure import Report, columns, interval, ratio, spread, take_turns
from workload import D_MODEL, load, same_weights

from steerserve import HeadTarget, Intervention, Op
from steerserve.config import EngineConfig
from steerserve.engine.engine import Engine
from steerserve.steering.catalog import Catalog
from steerserve.steering.monitor_plan import (
    ConceptReading,
    FeatureReading,
    HeadReading,
    MonitorEntry,
    MonitorPlan,
    MonitorPlanFile,
)
from steerserve.steering.monitors import NO_MONITORS, Monitors, bind_monitors
from steerserve.steering.packs import ModelRef

BATCH_SIZES = (1, 16)
HEADS = ("L24H4", "L23H0", "L23H1", "L23H7", "L22H4", "L23H2", "L25H2", "L20H0")
"""Name movers and S-inhibition heads of docs/circuits.md."""
SAE, PACK = "smollm2-135m-instruct-l24-4k", "profanity"
ARMS = {"plain": 0, "monitored": 0, "1 head": 1, "8 heads": 8}
"""Heads that each row scales."""


def monitors(catalog: Catalog) -> Monitors:
    sae = catalog.saes[SAE]
    features = FeatureReading(sae=SAE, sha256=sae.sha256, features=tuple(range(16)))
    entries = [MonitorEntry(name=head, reading=HeadReading(head=head, vector="direction")) for head in HEADS]
    entries += [MonitorEntry(name="features", reading=features)]
    entries += [MonitorEntry(name="concept", reading=ConceptReading(concept=PACK))]
    made_on = ModelRef(name=catalog.model.name, fingerprint=catalog.model.fingerprint)
    plan = MonitorPlan(name="bench", behaviour="none", model=made_on, entries=tuple(entries))
    direction = np.random.default_rng(0).standard_normal(D_MODEL).astype(np.float32)
    return bind_monitors(MonitorPlanFile(plan, {"direction": direction}), catalog)


def scaled(num_heads: int) -> list[Intervention]:
    return [Intervention(HeadTarget.parse(name), Op.SCALE, 0.5) for name in HEADS[:num_heads]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results")
    options = parser.parse_args()
    report, loaded = Report(), load()
    catalog = Catalog.load(loaded, [PACK], [SAE])
    config = EngineConfig(max_num_seqs=max(BATCH_SIZES), max_model_len=512)
    engines = {
        arm: Engine(
            same_weights(loaded), catalog, config, monitors=monitors(catalog) if arm == "monitored" else NO_MONITORS
        )
        for arm in ARMS
    }
    speeds = columns("Decoding: tokens/s, median over rounds and range", "B", *ARMS)
    ratios = columns("What it costs: tokens/s over plain, median and 95 % interval", "B", *list(ARMS)[1:])
    for batch_size in BATCH_SIZES:
        batches = {
            arm: DecodingBatch(engines[arm], lambda row, num=num: scaled(num), batch_size) for arm, num in ARMS.items()
        }
        turns = {arm: lambda number, batch=batch: batch.advance(STEPS_PER_TURN) for arm, batch in batches.items()}
        rates = take_turns(f"B = {batch_size}", turns, options.rounds)
        for batch in batches.values():
            batch.stop()
        speeds.add_row(str(batch_size), *(spread(values, ".1f") for values in rates.values()))
        ratios.add_row(str(batch_size), *(interval(ratio(rates[arm], rates["plain"])) for arm in list(ARMS)[1:]))
    for engine in engines.values():
        engine.close()
    report.print(speeds, ratios)
    if options.write:
        report.save()


if __name__ == "__main__":
    main()
