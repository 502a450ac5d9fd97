"""What the server around the engine costs a token: gRPC, observers and metrics, against the bare engine.

The same requests go to one engine in turn: by ``add_request`` and ``step``, and over a real socket through ``Server``,
set up as ``steerserve serve`` does, from streaming clients in a process of their own. Both note the time of every
token. The difference within a round is the overhead, at the first token and at each one behind it.

    python bench/bench_sidecar.py [--rounds 15] [--tokens 64] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import grpc
import numpy as np
from measure import Report, columns, take_turns
from workload import MODEL

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import Engine
from steerserve.lab.bootstrap import bootstrap
from steerserve.serving.app import Server, load_engine
from steerserve.types import GenerateRequest, SamplingParams
from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import generation_pb2_grpc

PROMPT = "The most important thing to know about the sea is that"
NUM_STREAMS = (1, 4, 16)
POLICIES = {"unsteered": (), "policy": ("profanity",)}


@dataclass(frozen=True)
class Times:
    """Of one run, in seconds; medians over its streams and their tokens."""

    first_token: float
    between: float

    @classmethod
    def of(cls, started: float, streams: Sequence[Sequence[float]]) -> Times:
        between = [b - a for times in streams for a, b in pairwise(times)]
        return cls(float(np.median([times[0] - started for times in streams])), float(np.median(between)))


def bare(engine: Engine, num_streams: int, num_tokens: int, policies: Sequence[str]) -> Times:
    """By calls of the engine, in this thread."""
    streams: dict[str, list[float]] = {str(row): [] for row in range(num_streams)}
    started = time.monotonic()
    for name in streams:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        engine.add_request(GenerateRequest(name, PROMPT, sampling, policies=tuple(policies)))
    while engine.has_unfinished():
        outputs = engine.step()
        now = time.monotonic()
        for output in outputs:
            streams[output.request_id] += [now] * len(output.token_ids)
    assert all(len(times) == num_tokens for times in streams.values())
    return Times.of(started, list(streams.values()))


def over_grpc(address: str, num_streams: int, num_tokens: int, policies: Sequence[str]) -> Times:
    """By streams over one channel; the clock is the machine's, the same in every process."""
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(num_streams) as pool:
        grpc.channel_ready_future(channel).result(10)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        started = time.monotonic()

        def read(_: int) -> list[float]:
            request = pb.GenerateStreamRequest(text=PROMPT, policies=policies)
            request.sampling.max_tokens = num_tokens
            request.sampling.temperature = 0.0
            request.sampling.ignore_eos = True
            times: list[float] = []
            for piece in stub.GenerateStream(request):
                times += [time.monotonic()] * len(piece.token_ids.ids)
            return times

        return Times.of(started, list(pool.map(read, range(num_streams))))


@contextlib.contextmanager
def running(engine: Engine, config: ServerConfig) -> Iterator[str]:
    """The server in an event loop of its own thread; its address."""
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    address = ""

    async def serve() -> None:
        nonlocal address
        server = Server(engine, config)
        await server.start()
        address = server.address
        ready.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def milliseconds(differences: Sequence[float]) -> str:
    """Median over rounds and its interval."""
    values = 1e3 * np.array(differences)
    found = bootstrap(np.arange(len(values)), lambda chosen: float(np.median(values[chosen])))
    return f"{found.value:+.2f} [{found.low:+.2f} – {found.high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results")
    args = parser.parse_args()
    config = ServerConfig(model=MODEL, port=0, telemetry={"metrics_port": 0})
    # Without the prefix cache, which would compute the prompt for the first of all runs alone.
    engine = load_engine(config, EngineConfig(enable_prefix_caching=False))
    report = Report()
    table = columns(
        f"{MODEL}, bfloat16, {args.tokens} tokens a stream; medians over rounds, overhead with its 95 % interval",
        "streams", "bare: first token, ms", "overhead, ms", "bare: a token, ms", "overhead, ms", "of a token's time",
    )  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    with running(engine, config) as address, ProcessPoolExecutor(1, mp_context=spawn) as client:
        for num_streams, (name, policies) in itertools.product(NUM_STREAMS, POLICIES.items()):
            what = (num_streams, args.tokens, policies)
            arms: dict[str, Callable[[int], Times]] = {
                "bare": lambda _, what=what: bare(engine, *what),
                "grpc": lambda _, what=what: client.submit(over_grpc, address, *what).result(),
            }
            runs = take_turns(f"{num_streams} streams, {name}", arms, args.rounds)
            pairs = list(zip(runs["bare"], runs["grpc"], strict=True))
            first = [served.first_token - alone.first_token for alone, served in pairs]
            between = [served.between - alone.between for alone, served in pairs]
            token = float(np.median([alone.between for alone, _ in pairs]))
            table.add_row(
                f"{num_streams}, {name}",
                f"{1e3 * np.median([alone.first_token for alone, _ in pairs]):.1f}",
                milliseconds(first),
                f"{1e3 * token:.2f}",
                milliseconds(between),
                f"{np.median(between) / token:+.1%}",
            )
    report.print(table)
    if args.write:
        report.save()


if __name__ == "__main__":
    main()
