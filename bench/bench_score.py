"""How long it takes to score a text of 100 characters: `Score` by a client, one text at a time, against others.

engine     a reading by calls of the engine: the model up to the last layer that the built-in profanity detector reads
shallow    likewise where a detector reads behind a third of the layers, along a random direction
score      the same by `Score`, over a socket, from a client in a process of its own
generate   what it takes without `Score`: `Generate` of one token with a guard that reads the same detector
roberta    transformers' RoBERTa-base in float32: the shape of the classifier behind LLM Guard's Toxicity scanner
distilbert likewise half of its layers

The classifiers get as many tokens as SmolLM2 makes of the text, by calls of torch; their weights are random, which
changes what they say and not how long it takes. Published for that scanner: 86 ms on average for 97 characters, on an
AWS m5.xlarge.

    python bench/bench_score.py [--rounds 20] [--threads 1] [--dtype float32] [--write]
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import grpc
import numpy as np
import torch
from bench_sidecar import running
from measure import Report, columns, interval, ratio, take_turns
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from workload import MODEL

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import Engine
from steerserve.serving.app import load_engine
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    GenerateRequest,
    Guard,
    GuardAction,
    SamplingParams,
    Site,
    SteeringSpec,
    Stream,
    Target,
)
from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import generation_pb2_grpc, score_pb2

CONCEPT = "profanity"
TEXTS = (
    "The ferry was late again this morning, so we walked along the harbour and talked about the weather a",
    "If the parcel has not arrived by Friday, please call the number on your receipt and ask for a new de",
    "My sister moved to a small town near the coast last year, and she says that the people there are ver",
    "You can plant the seeds as soon as the ground is warm enough, but keep them away from the wind for a",
    "He opened the old book at a random page, read two lines aloud, and laughed until everyone in the roo",
    "The meeting has been moved to half past three because the projector in the large room on the first f",
    "Most of the bridges in this part of the country were built before the railway came, and only a few h",
    "We had planned to stay for the whole weekend, although the forecast said that it would rain on both ",
)
Arm = Callable[[int], list[float]]
"""Seconds that each text took."""


def timed(call: Callable[[str], object]) -> list[float]:
    seconds = []
    for text in TEXTS:
        began = time.perf_counter()
        call(text)
        seconds.append(time.perf_counter() - began)
    return seconds


def by_the_engine(engine: Engine, target: Target) -> Arm:
    guard = Guard(target, 0.0, GuardAction.FLAG)
    asked = SamplingParams(max_tokens=0)

    def read(text: str) -> None:
        engine.add_request(GenerateRequest("reading", text, asked, SteeringSpec(guards=(guard,))))
        while engine.has_unfinished():
            engine.step()

    return lambda _: timed(read)


def over_grpc(address: str, generates: bool) -> list[float]:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(10)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        def generate(text: str) -> None:
            request = pb.GenerateRequest(text=text)
            request.sampling.max_tokens = 1
            request.steering.guards.add(concept=CONCEPT, threshold=0.0, action="GUARD_ACTION_FLAG")
            stub.Generate(request)

        def score(text: str) -> None:
            stub.Score(score_pb2.ScoreRequest(text=text, concepts=[CONCEPT]))

        return timed(generate if generates else score)


def classifier(model: PreTrainedModel, engine: Engine) -> Arm:
    tokenizer = engine.model.tokenizer
    model.eval()

    def classify(text: str) -> None:
        with torch.inference_mode():
            model(torch.tensor([tokenizer(text)["input_ids"]]) % 1000)

    return lambda _: timed(classify)


def milliseconds(rounds: Sequence[Sequence[float]]) -> tuple[str, str]:
    """p50 and p95 over all texts of all rounds."""
    p50, p95 = 1e3 * np.percentile(np.concatenate(list(rounds)), (50, 95))
    return f"{p50:.1f}", f"{p95:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the served model")
    parser.add_argument("--threads", type=int, help="of every arm; on a machine that does other things, 1 is fairest")
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results")
    args = parser.parse_args()
    config = ServerConfig(model=MODEL, port=0, telemetry={"metrics_port": 0})
    # Without the prefix cache, which would read each text once for all rounds.
    engine_config = EngineConfig(dtype=args.dtype, num_threads=args.threads, enable_prefix_caching=False)
    engine, served = load_engine(config, engine_config), load_engine(config, engine_config)
    width = engine.model.d_model
    third = Site(engine.model.n_layers // 3 - 1, Stream.RESID_POST)
    shallow = DirectionTarget(third, np.random.default_rng(0).standard_normal(width).astype(np.float32))
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, max_position_embeddings=514))
    distilbert = DistilBertForSequenceClassification(DistilBertConfig())
    spawn = multiprocessing.get_context("spawn")
    with running(served, config) as address, ProcessPoolExecutor(1, mp_context=spawn) as client:
        arms: dict[str, Arm] = {
            "engine": by_the_engine(engine, ConceptTarget(CONCEPT)),
            "shallow": by_the_engine(engine, shallow),
            "score": lambda _: client.submit(over_grpc, address, False).result(),
            "generate": lambda _: client.submit(over_grpc, address, True).result(),
            "roberta": classifier(roberta, engine),
            "distilbert": classifier(distilbert, engine),
        }
        runs = take_turns("scoring", arms, args.rounds)
    site = engine.catalog.packs[CONCEPT].detector_site
    tokens = [len(engine.model.tokenizer(text)["input_ids"]) for text in TEXTS]
    table = columns("Time of a text of 100 characters", "", "p50, ms", "p95, ms", "of score's time")
    medians = {arm: [float(np.median(times)) for times in rounds] for arm, rounds in runs.items()}
    for arm, rounds in runs.items():
        table.add_row(arm, *milliseconds(rounds), interval(ratio(medians[arm], medians["score"])))
    report = Report()
    report.print(
        f"{MODEL}, {args.dtype}; {CONCEPT} is read at {site}: {site.layer + 1} of {engine.model.n_layers} layers; "
        f"{min(tokens)} to {max(tokens)} tokens a text",
        table,
    )
    if args.write:
        report.save()


if __name__ == "__main__":
    main()
