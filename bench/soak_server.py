"""``steerserve serve`` with faults on demand, for the soak: SIGUSR1 fails the next forward pass, SIGUSR2 the next step.

The failure is raised where one of a kernel would be: beneath the model's forward pass, in the middle of a batch.

    python bench/soak_server.py '{"model": ...}' '{"max_num_seqs": ...}'     # ServerConfig and EngineConfig
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import Engine
from steerserve.serving.app import Server, load_engine, serve
from steerserve.serving.logs import configure_logs


def main() -> None:
    config, engine_config = ServerConfig(**json.loads(sys.argv[1])), EngineConfig(**json.loads(sys.argv[2]))
    configure_logs(config.telemetry)
    engine = load_engine(config, engine_config)
    inject_faults(engine)
    asyncio.run(serve(engine, config, announce))


def announce(server: Server) -> None:
    print(json.dumps({"grpc": server.address, "http": server.http_address}), flush=True)


def inject_faults(engine: Engine) -> None:
    runner = engine._runner
    runner.forward = failing_on(signal.SIGUSR1, runner.forward, "injected kernel fault")  # type: ignore[method-assign]
    engine.step = failing_on(signal.SIGUSR2, engine.step, "injected engine fault")  # type: ignore[method-assign]


def failing_on(number: signal.Signals, call: Callable[..., Any], message: str) -> Callable[..., Any]:
    """``call``, which raises once for each time that the signal came in."""
    pending: list[int] = []
    signal.signal(number, lambda received, frame: pending.append(received))

    def faulty(*args: Any) -> Any:
        if pending:
            pending.clear()
            raise RuntimeError(message)
        return call(*args)

    return faulty


if __name__ == "__main__":
    main()
