"""What the server around the engine costs a token: gRPC, audit log, metrics and log, against the bare engine.

The same requests go to one engine in turn: by ``add_request`` and ``step``, and over a real socket through ``Server``,
set up as ``steerserve serve`` does, from streaming clients in a process of their own; no answer ends before the disk
has its audit record. Both note the time of every token. The difference within a round is the overhead, at the first
token and at each one behind it. Beside it stands what a busy machine does not blur: the CPU time of the server's own
threads, all but the engine's, for a request with one token and for each token more.

    python bench/bench_sidecar.py [--rounds 15] [--tokens 64] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
from measure import Report, columns, take_turns
from workload import MODEL

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import Engine
from steerserve.lab.bootstrap import bootstrap
from steerserve.serving.app import Server, load_engine
from steerserve.serving.audit.keys import create_keys
from steerserve.types import GenerateRequest, SamplingParams
from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import generation_pb2_grpc

PROMPT = "The most important thing to know about the sea is that"
NUM_STREAMS = (1, 4, 16)
POLICIES = {"unsteered": (), "policy": ("profanity",)}


@dataclass(frozen=True)
class Times:
    """Of one run, in seconds; medians over its streams and their tokens, NaN where there is one token.

    Attributes:
        cpu: of the server's own threads, in all.
    """

    first_token: float
    between: float
    cpu: float = 0.0

    @classmethod
    def of(cls, started: float, streams: Sequence[Sequence[float]]) -> Times:
        between = [b - a for times in streams for a, b in pairwise(times)] or [np.nan]
        return cls(float(np.median([times[0] - started for times in streams])), float(np.median(between)))


def bare(engine: Engine, num_streams: int, num_tokens: int, policies: Sequence[str]) -> Times:
    """By calls of the engine, in this thread."""
    time.sleep(0.2)  # the server's thread may still be looking for work: the engine must be this thread's alone
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


def own_cpu() -> float:
    """Seconds on a CPU of this process's threads, but for this one and the engine's, which has no others to help it."""
    not_own = {each.native_id for each in threading.enumerate() if each.name == "engine"} | {threading.get_native_id()}
    own = [path for path in Path("/proc/self/task").iterdir() if int(path.name) not in not_own]
    return sum(int((path / "schedstat").read_text().split()[0]) for path in own) / 1e9


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


def audited(directory: Path) -> dict[str, str]:
    """An audit log below ``directory``, with signed heads."""
    mac, signing, _ = create_keys(directory / "keys")
    return {
        "directory": str(directory / "log"),
        "key": str(mac),
        "heads": str(directory / "heads.jsonl"),
        "signing_key": str(signing),
    }


def milliseconds(differences: Sequence[float]) -> str:
    """Median over rounds and its interval."""
    values = 1e3 * np.array(differences)
    found = bootstrap(np.arange(len(values)), lambda chosen: float(np.median(values[chosen])))
    return f"{found.value:.2f} [{found.low:.2f} – {found.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = ServerConfig(model=MODEL, port=0, telemetry={"metrics_port": 0}, audit=audited(Path(directory)))
        report = measure(config, args.rounds, args.tokens)
    if args.write:
        report.save()


def measure(config: ServerConfig, num_rounds: int, num_tokens: int) -> Report:
    """All numbers of streams, with and without a policy."""
    # Without the prefix cache, which would compute the prompt for the first of all runs alone.
    engine = load_engine(config, EngineConfig(enable_prefix_caching=False, num_threads=1))
    report = Report()
    table = columns(
        f"{MODEL}, bfloat16, one thread, {num_tokens} tokens a stream; medians and 95 % intervals over rounds, ms",
        "streams", "bare: first token", "overhead", "bare: a token", "overhead", "CPU: a request", "CPU: a token more",
    )  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    with running(engine, config) as address, ProcessPoolExecutor(1, mp_context=spawn) as client:

        def served(num_streams: int, num_tokens: int, policies: Sequence[str]) -> Times:
            before = own_cpu()
            times = client.submit(over_grpc, address, num_streams, num_tokens, policies).result()
            return replace(times, cpu=own_cpu() - before)

        for num_streams, (name, policies) in itertools.product(NUM_STREAMS, POLICIES.items()):
            what = (num_streams, num_tokens, policies)
            arms: dict[str, Callable[[int], Times]] = {
                "bare": lambda _, what=what: bare(engine, *what),
                "grpc": lambda _, what=what: served(*what),
                "one token": lambda _, what=what: served(what[0], 1, what[2]),
            }
            runs = take_turns(f"{num_streams} streams, {name}", arms, num_rounds)
            pairs = list(zip(runs["bare"], runs["grpc"], strict=True))
            longer = [whole.cpu - one.cpu for whole, one in zip(runs["grpc"], runs["one token"], strict=True)]
            table.add_row(
                f"{num_streams}, {name}",
                f"{1e3 * np.median([alone.first_token for alone, _ in pairs]):.0f}",
                milliseconds([over.first_token - alone.first_token for alone, over in pairs]),
                f"{1e3 * np.median([alone.between for alone, _ in pairs]):.1f}",
                milliseconds([over.between - alone.between for alone, over in pairs]),
                milliseconds([one.cpu / num_streams for one in runs["one token"]]),
                milliseconds([cpu / num_streams / (num_tokens - 1) for cpu in longer]),
            )
    report.print(table)
    return report


if __name__ == "__main__":
    main()
