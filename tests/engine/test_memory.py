"""Memory is what the configuration says, whatever was served."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from engine_runs import LATE, direction, drive, feature, gate, guard, line, monitor, request, rewind, spec

from steerserve.engine.engine import Engine
from steerserve.engine.entries import Entries
from steerserve.engine.records import Record
from steerserve.engine.sequence import Sequence
from steerserve.types import GuardAction, Phase

BACK = rewind(direction(value=3.0), otherwise=GuardAction.FLAG)
KINDS: list[dict[str, Any]] = [
    {},
    {"steering": spec(feature(3), direction(site=LATE)), "return_activations": True},
    {"steering": spec(feature(5, gate=gate(line()), phase=Phase.GENERATED), monitor(4)), "n": 2},
    {"steering": spec(guards=[guard(3, 3.0, BACK), guard(4)])},
]


def storages() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor lies in, by its address; what a compiler has traced lies in none.

    As long as they are held nothing new can lie at the same address.
    """
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    on_cpu = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in on_cpu}


def serve(engine: Engine, prefix: str, rounds: int) -> None:
    """Requests of all kinds with prompts of their own, some of them aborted."""
    for index in range(rounds):
        prompt = f"{prefix} {index}: what is the capital of France?"
        for kind, rest in enumerate(KINDS):
            engine.add_request(request(f"{kind}", prompt, max_tokens=12, **rest))
        for _ in range(4):
            engine.step()
        engine.abort(str(index % len(KINDS)))
        while engine.has_unfinished():
            engine.step()
    drive(engine)


def test_what_an_engine_says_it_allocates_is_what_it_allocates(load_tiny, make_engine) -> None:
    model = load_tiny()
    before = storages()
    engine = make_engine(model, kv_cache_tokens=4096, bank_capacity=512)
    serve(engine, "x", rounds=1)
    allocated = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
    assert engine.memory["weights"] == sum(parameter.nbytes for parameter in model.model.parameters())
    layers, heads, head_dim = 3, 2, 8
    assert engine.memory["kv_cache"] == 4096 * layers * heads * head_dim * 2 * torch.float32.itemsize
    assert engine.memory["plans"] > 0
    said = engine.memory["kv_cache"] + engine.memory["plans"]
    assert said <= allocated < 1.02 * said  # the rest: inputs of the model, the block table


def test_nothing_is_left_of_requests(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), kv_cache_tokens=256)
    memory = []
    alive = []
    tracemalloc.start()
    try:
        for prefix in ("a", "b", "c", "d"):
            serve(engine, prefix, rounds=4)
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0])
            types = (Sequence, Entries, Record)
            alive.append(Counter(type(each) for each in gc.get_objects() if type(each) in types))
    finally:
        tracemalloc.stop()
    # 1 kB for each response would be 20 kB in every step; caches of the interpreter grow in one or the other.
    assert min(after - before for before, after in pairwise(memory[1:])) < 15_000, memory
    for counts in alive:
        assert counts[Sequence] == 0
        assert counts[Entries] < 50
        assert counts[Record] <= 2 * engine.config.num_blocks  # of cached blocks, which phases may divide
