"""Harvesting against the model's own forward pass: SmolLM2 in bfloat16, tokens/s.

forward    the same contexts in the same batches through the layers up to the last site; nothing is kept
harvest    from texts to shards on the disk: tokenised, run, ordinary rows selected, written and synchronised; several
           shards, of a size that takes as long to compute in proportion to its bytes as a full one

python bench/bench_harvest.py [--texts FILE] [--tokens N] [--rounds N] [--write]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from measure import Report, columns, interval, ratio, spread, take_turns
from workload import load, random_prompt

from steerserve import Site
from steerserve.lab import harvest as harvesting
from steerserve.lab.activations import activations_of
from steerserve.lab.corpus import Split, TextFile, TextStream
from steerserve.lab.harvest import HarvestConfig, harvest
from steerserve.lab.tokens import pack_contexts
from steerserve.models.loading import LoadedModel
from steerserve.types import Stream

NUM_SHARDS = 4
SITES = {
    "one site": (Site(24, Stream.RESID_POST),),
    "three sites": tuple(Site(layer, Stream.RESID_POST) for layer in (8, 16, 24)),
}


def random_texts(model: LoadedModel, num_tokens: int) -> list[str]:
    generator = random.Random(0)
    return [str(model.tokenizer.decode(random_prompt(generator, 400))) for _ in range(num_tokens // 300)]


def forward_rate(model: LoadedModel, texts: list[str], num_tokens: int) -> float:
    config = HarvestConfig(SITES["one site"], max_tokens=num_tokens)
    contexts = list(pack_contexts(model, texts, config.context_length))[: num_tokens // config.context_length]
    batches = torch.stack(contexts).split(config.batch_size)
    start = time.perf_counter()
    for batch in batches:
        activations_of(model, batch, config.sites)
    return num_tokens / (time.perf_counter() - start)


def harvest_rate(model: LoadedModel, texts: list[str], num_tokens: int, sites: tuple[Site, ...]) -> float:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        manifest = harvest(model, texts, Path(directory), HarvestConfig(sites, max_tokens=num_tokens))
        seconds = time.perf_counter() - start
    assert (manifest.num_tokens, len(manifest.shards)) == (num_tokens, NUM_SHARDS), "the texts were too short"
    return num_tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="real text; random tokens if left out")
    parser.add_argument("--tokens", type=int, default=65_536, help="of each turn: a multiple of 8,192")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results")
    options = parser.parse_args()
    report, model = Report(), load()
    texts = (
        list(TextStream([TextFile(options.texts)], Split.TRAIN))
        if options.texts
        else random_texts(model, options.tokens)
    )
    arms: dict[str, Callable[[int], float]] = {"forward": lambda _: forward_rate(model, texts, options.tokens)}
    for name, sites in SITES.items():
        arms[name] = lambda _, sites=sites: harvest_rate(model, texts, options.tokens, sites)
    with mock.patch.object(harvesting, "TOKENS_PER_SHARD", options.tokens // NUM_SHARDS):
        rates = take_turns("harvest", arms, options.rounds)
    table = columns("tokens/s, median and range; ratio with its 95 % interval", "", "tokens/s", "harvest / forward")
    for name, values in rates.items():
        table.add_row(name, spread(values, ",.0f"), interval(ratio(values, rates["forward"])) if name in SITES else "")
    report.print(table)
    if options.write:
        report.save()


if __name__ == "__main__":
    main()
