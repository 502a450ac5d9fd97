"""Half an hour of everything that clients, operators and hardware do to a server, and what must hold at its end.

Many clients at once (``soak_load``), policy files that are replaced, faults in the forward pass and in the engine's
step, and at last SIGTERM with streams open. Checked: the server runs to its end and exits with 0; every request ended
in a reply with a receipt or in a status; the audit log is whole and has all replies; no slot is held when nobody
asks; resident memory grows by at most 2 % from the end of the first third to the end.

    python bench/soak.py [--minutes 30] [--clients 24] [--model smollm2-135m-instruct] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak_load import PATIENCE_S, Load

from steerserve.serving.audit.chain import parse
from steerserve.serving.audit.keys import AuditKey, create_keys, load_public_key
from steerserve.serving.audit.verify import verify_log

MAX_GROWTH = 0.02
DRAIN_S = 10.0
ENGINE = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 8, "max_waiting": 24, "max_model_len": 512}
# Room for two of the longest: requests are preempted.
ENGINE |= {"kv_cache_tokens": 1024}
POLICY = """format: steerserve.policy/1
name: {name}
version: "{version}"
description: replaced while it is in use
rules:
  - concept: {concept}
    action: clamp
  - concept: {concept}
    name: seen
    action: flag
"""


@dataclass
class Served:
    """A server in a process of its own.

    Attributes:
        policy: its policy file; ``{version}`` is put in anew at each change.
        audit: directory of its audit log; ``heads`` lies beside it.
        audit_keys: of the MACs, for signing heads, and for verifying these.
    """

    process: subprocess.Popen[str]
    address: str
    http_address: str
    policy: Path
    concept: str
    audit: Path
    audit_keys: tuple[Path, Path, Path]
    version: int = 1

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    def replace_policy(self) -> None:
        """Another version, put in place as a whole."""
        self.version += 1
        write_policy(self.policy, self.concept, self.version)


@contextlib.contextmanager
def served(server_values: dict[str, Any], concept: str) -> Iterator[Served]:
    """The server, with a policy ``soaked`` on ``concept``."""
    with tempfile.TemporaryDirectory() as directory:
        policy = Path(directory) / "policies" / "soaked.yaml"
        policy.parent.mkdir()
        write_policy(policy, concept, 1)
        audit, keys = Path(directory) / "audit", create_keys(Path(directory) / "keys")
        values = {
            **server_values,
            "port": 0,
            "http": {"port": 0},
            "policies": {"directory": str(policy.parent), "watch_s": 0.5},
            "audit": {
                "directory": str(audit),
                "key": str(keys[0]),
                "heads": str(audit.with_name("heads")),
                "signing_key": str(keys[1]),
            },
            "drain_timeout_s": DRAIN_S,
            "telemetry": {"metrics_port": 0, "log_level": "WARNING", "log_format": "json"},
        }
        script = Path(__file__).with_name("soak_server.py")
        command = [sys.executable, str(script), json.dumps(values), json.dumps(ENGINE)]
        log = Path(directory) / "log"
        with log.open("w") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as it:
            try:
                assert it.stdout is not None
                line = it.stdout.readline()
                assert line, f"the server did not start:\n{log.read_text()}"
                addresses = json.loads(line)
                yield Served(it, addresses["grpc"], addresses["http"], policy, concept, audit, keys)
            finally:
                it.kill()


def write_policy(path: Path, concept: str, version: int) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(POLICY.format(name=path.stem, concept=concept, version=version))
    draft.rename(path)


async def soak(server: Served, seconds: float, num_clients: int, seed: int = 0) -> tuple[Load, list[str]]:
    """Run it all; the load with its ledger, and what was found wrong."""
    load = Load(server.address, server.http_address, ("soaked",), seed)
    problems: list[str] = []
    disturbing = asyncio.create_task(disturb(server, random.Random(seed), seconds))
    resident = []
    for share in (1 / 3, 2 / 3):
        await load.run(num_clients, share * seconds)
        if not await becomes_idle(load):
            problems.append(f"{await load.load_of_server()} responses are held when nobody asks")
        resident.append(server.resident_bytes)
    disturbing.cancel()
    growth = resident[1] / resident[0] - 1
    if growth > MAX_GROWTH:
        problems.append(f"resident memory grew by {growth:.1%}, from {resident[0] >> 20} to {resident[1] >> 20} MiB")
    if not await reaches(load, f"soaked@{server.version}"):
        problems.append(f"the policy soaked@{server.version} is not in force: {await load.policies_in_force()}")
    problems += await drain(server, load, num_clients)
    problems += audited(server, load.ledger.receipts)
    await load.close()
    return load, problems + load.ledger.problems


async def disturb(server: Served, chosen: random.Random, seconds: float) -> None:
    """What operators and hardware do, until cancelled: at least a dozen times, every few seconds in a long run."""
    pause_s = min(5.0, seconds / 12)
    while True:
        await asyncio.sleep(pause_s)
        match chosen.randrange(4):
            case 0:
                server.process.send_signal(signal.SIGUSR1)
            case 1:
                server.process.send_signal(signal.SIGUSR2)
            case _:
                server.replace_policy()
                if chosen.random() < 0.5:
                    server.process.send_signal(signal.SIGHUP)


async def drain(server: Served, load: Load, num_clients: int) -> list[str]:
    """SIGTERM with streams open: each ends in a reply or a status, and the process with 0."""
    streams = [asyncio.create_task(load.within_patience(load.slow_reader)) for _ in range(num_clients)]
    await asyncio.sleep(0.5)
    load.is_draining = True
    server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*streams)
    try:
        code = await asyncio.to_thread(server.process.wait, DRAIN_S + PATIENCE_S)
    except subprocess.TimeoutExpired:
        return ["the server did not exit after SIGTERM"]
    return [] if code == 0 else [f"the server exited with {code} after SIGTERM"]


def audited(server: Served, answered: set[str]) -> list[str]:
    """The audit log is whole, has a record of every request that was answered, and a receipt of each of these."""
    mac, _, public = server.audit_keys
    report = verify_log(server.audit, [AuditKey.load(mac)], server.audit.with_name("heads"), load_public_key(public))
    exchanges = [
        record
        for path in sorted(server.audit.glob("*.jsonl"))
        for record in (parse(line).body for line in path.read_bytes().splitlines())
        if record["kind"] == "exchange"
    ]
    complete = [record for record in exchanges if record["error"] is None]
    bare = {record["request_id"] for record in complete if not all(each.get("receipt") for each in record["responses"])}
    missing = answered - {record["request_id"] for record in complete}
    return [
        *report.problems,
        *(f"{name} was answered and is not in the audit log" for name in sorted(missing)),
        *(f"{name} ended well and has no receipt in the audit log" for name in sorted(bare)),
    ]


async def becomes_idle(load: Load) -> bool:
    return await _within(20.0, lambda: load.load_of_server(), 0)


async def reaches(load: Load, policy: str) -> bool:
    async def in_force() -> bool:
        return policy in await load.policies_in_force()

    return await _within(20.0, in_force, True)


async def _within(seconds: float, ask: Any, expected: object) -> bool:
    for _ in range(int(seconds / 0.1)):
        if await ask() == expected:
            return True
        await asyncio.sleep(0.1)
    return False


def main() -> None:
    from measure import Report, columns

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--concept", default="profanity")
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results")
    args = parser.parse_args()
    with served({"model": args.model}, args.concept) as server:
        load, problems = asyncio.run(soak(server, 60 * args.minutes, args.clients))
    report = Report()
    table = columns(f"{args.minutes:g} minutes, {args.clients} clients at a time", "client", "ended in", "requests")
    for (kind, code), count in sorted(load.ledger.ends.items()):
        table.add_row(kind, code, str(count))
    report.print(table)
    report.print(f"{len(load.ledger.receipts)} requests answered with a receipt; {server.version} policy versions")
    report.print("nothing was found wrong" if not problems else "\n".join(problems))
    if args.write:
        report.save()
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
