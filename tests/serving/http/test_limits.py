"""Bodies that are too deep or too large end in a status, at once, and nobody else notices."""

from __future__ import annotations

import json
import time

import httpx2
import pytest

DEEP = 100_000


def nested(levels: int, inner: str = "1") -> str:
    return "[" * levels + inner + "]" * levels


@pytest.mark.parametrize("path", ["completions", "chat/completions", "moderations"])
@pytest.mark.parametrize(
    "body",
    [
        nested(DEEP),
        '{"a":' * DEEP + "1" + "}" * DEEP,
        f'{{"prompt": {nested(DEEP)}, "messages": {nested(DEEP)}, "input": {nested(DEEP)}}}',
        f'{{"prompt": "x", "messages": [], "input": "x", "steering": {nested(DEEP)}}}',
        f'{{"prompt": "x", "steering": {nested(190)}, "messages": {nested(190)}, "input": {nested(190)}}}',
        f'{{"prompt": "x", "steering": {{"interventions": {nested(150, "{}")}}}, "messages": [], "input": []}}',
        "[" * DEEP,
    ],
    ids=lambda body: f"{body[:24]}…",
)
def test_depth(base_url: str, path: str, body: str) -> None:
    began = time.monotonic()
    answer = httpx2.post(f"{base_url}/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.text) < 2000
    assert time.monotonic() - began < 10


def test_size(base_url: str, http_server) -> None:
    body = json.dumps({"prompt": "x" * (5 << 20)})
    answer = httpx2.post(f"{base_url}/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    well = httpx2.post(f"{base_url}/completions", json={"prompt": "x", "max_tokens": 1})
    assert well.status_code == 200
