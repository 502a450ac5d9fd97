"""The tiny model behind a real server with HTTP, asked by the official client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI


@pytest.fixture(scope="session")
def http_server(start_server, tiny):
    """One server that all tests share; tests that break theirs start their own."""
    with start_server(tiny.config(http={"port": 0})) as running:
        yield running


@pytest.fixture(scope="session")
def base_url(http_server) -> str:
    return f"http://{http_server.http_address}/v1"


@pytest.fixture
def openai_client(base_url) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client
