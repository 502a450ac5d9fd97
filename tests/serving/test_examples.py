"""The programs of ``examples`` do what they say, on real weights, as somebody who has just read them would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CLEAN, PROFANE = "The weather is lovely today.", "What a load of shit, you fucking asshole, go fuck yourself."


@pytest.fixture(scope="module")
def addresses(smollm2_dir: Path, spawn_server) -> Iterator[tuple[str, str]]:
    """Of gRPC and of the OpenAI API."""
    with spawn_server(["--port", "0", "--http-port", "0", "--max-num-seqs", "4", "--dtype", "float32"]) as started:
        process, address = started
        yield address, process.stdout.readline().split()[-1]


def run(name: str, *arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_a_guarded_chat_over_grpc(addresses: tuple[str, str]) -> None:
    told = run("grpc_chat.py", "Say hello.", "--target", addresses[0])
    assert told.stderr == ""
    *answer, verdict, proof = told.stdout.splitlines()
    assert "".join(answer).strip()
    assert re.match(r"policy:family-friendly@1: (allow|modified)", verdict)
    assert proof == "steered, by the kernel's own count: True"


def test_a_guarded_chat_with_the_official_client(addresses: tuple[str, str]) -> None:
    told = run("openai_chat.py", "Tell me about the sea.", OPENAI_BASE_URL=addresses[1])
    assert told.stderr == ""
    *answer, verdict, proof = told.stdout.splitlines()
    assert "".join(answer).strip()
    assert verdict == "policy:profanity-monitor@1: VERDICT_KIND_ALLOW"
    assert proof == "steered, by the kernel's own count: True"


def test_the_answers_of_another_model(addresses: tuple[str, str]) -> None:
    told = run("score_answers.py", "--target", addresses[0], text=f"{CLEAN}\n\n{PROFANE}\n")
    assert told.stderr == ""
    clean, profane = told.stdout.splitlines()
    assert clean.startswith("allow ")
    assert clean.endswith(CLEAN)
    assert profane.startswith("flagged ")
    assert told.returncode == 1
    assert run("score_answers.py", "--target", addresses[0], text=CLEAN).returncode == 0


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_tried_here_and_explains_itself(example: Path) -> None:
    assert f'run("{example.name}"' in Path(__file__).read_text()
    assert "steerserve serve" in example.read_text().partition('"""')[2].partition('"""')[0]
