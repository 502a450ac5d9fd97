"""Start an engine in a process of its own; print, as one line of JSON, what took how long and how much it occupies.

Seconds: ``imports``; ``load`` (model, SAEs, packs, engine and, with ``--compile``, the compiler); ``warm-up`` (a pass
of each kind, and a short response under every policy, as the server does); ``sum`` of these. Bytes: resident after the
imports, in the end and at most; and what the engine accounts for, ``weights``, ``kv_cache`` and ``plans``.

    python bench/startup.py [--compile]
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path


def main() -> None:
    start = time.perf_counter()

    from steerserve.config import EngineConfig, ServerConfig
    from steerserve.serving.app import load_engine
    from steerserve.types import GenerateRequest, SamplingParams

    imported, resident_after_imports = time.perf_counter(), resident("VmRSS")
    engine = load_engine(ServerConfig(), EngineConfig(compile="--compile" in sys.argv[1:]))
    loaded = time.perf_counter()
    engine.warm_up()
    policies = tuple(pack.tag for pack in engine.catalog.packs.values())
    engine.add_request(GenerateRequest("first", (0,), SamplingParams(max_tokens=2, ignore_eos=True), policies=policies))
    while engine.has_unfinished():
        engine.step()
    warm = time.perf_counter()
    seconds = {"imports": imported - start, "load": loaded - imported, "warm-up": warm - loaded, "sum": warm - start}
    memory = {"imports": resident_after_imports, "resident": resident("VmRSS"), "peak": resident("VmHWM")}
    print(json.dumps({"seconds": seconds, "bytes": memory | engine.memory}))


def resident(field: str) -> int:
    """Bytes of this process in memory, now (``VmRSS``) or at most (``VmHWM``)."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) << 10


if __name__ == "__main__":
    main()
