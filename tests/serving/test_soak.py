"""A minute, or half an hour, of everything at once: nothing is lost, stuck, leaked or left without an end."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from soak import served, soak


@pytest.mark.parametrize(
    "minutes",
    [1, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])],
)
def test_a_server_bears_everything_at_once(tiny, minutes) -> None:
    values = {"model": str(tiny.model), "saes": [str(tiny.sae)], "packs": [str(tiny.pack)]}
    with served(values, "mood") as server:
        load, problems = asyncio.run(soak(server, 60 * minutes, num_clients=16))
    assert problems == []
    ends = load.ledger.ends
    assert {kind for kind, _ in ends} >= {
        "unary", "stream", "cancelled", "late", "invalid", "malformed", "slow reader", "deaf", "half open", "flood",
        "silent", "score", "HTTP", "HTTP hang-up",
    }  # fmt: skip
    assert ends["flood", "RESOURCE_EXHAUSTED"] > 0, "the server was never full"
    assert ends["score", "OK"] > 0
    assert ends["late", "DEADLINE_EXCEEDED"] > 0
    assert any(code == "INTERNAL" for _, code in ends), "no fault met a request"
    assert ends["slow reader", "UNAVAILABLE"] + ends["slow reader", "OK"] > 0
    assert server.version > 2, "the policy was never replaced"
    assert len(load.ledger.receipts) > 50
