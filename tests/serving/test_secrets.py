"""What a server must never write down, looked for in all that one process wrote while it served."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from steerserve import SteerserveClient
from steerserve.errors import SteerserveError
from steerserve.serving.audit.keys import create_keys
from steerserve.serving.keys import key_hash, new_key

KEY, ADMIN_KEY, WRONG_KEY, MISPLACED_KEY = (new_key() for _ in range(4))
PROMPT = "Amaryllis told nobody"
SALT = "salt-of-this-tenant"


@pytest.fixture
def access(tmp_path: Path) -> Path:
    path = tmp_path / "access.yaml"
    path.write_text(
        "format: steerserve.access/1\ntenants: {app: {policies: {allowed: [mood]}}}\nkeys:\n"
        f"  - {{id: app-1, tenant: app, sha256: {key_hash(KEY)}}}\n"
        f"  - {{id: root, tenant: app, roles: [admin], sha256: {key_hash(ADMIN_KEY)}}}\n"
    )
    return path


def test_a_whole_run_writes_no_key_no_hash_and_no_text(tiny, tmp_path: Path, access: Path) -> None:
    secrets = {"a key": KEY, "an operator's key": ADMIN_KEY, "a wrong key": WRONG_KEY, "a misplaced key": MISPLACED_KEY}
    secrets |= {f"the hash of {name}": key_hash(key) for name, key in secrets.items()}
    secrets |= {"a prompt": PROMPT, "a cache salt": SALT}
    for file in create_keys(tmp_path / "keys")[:2]:
        secrets[file.name] = max(re.findall(r"[\w+/=]{32,}", file.read_text()), key=len)
    command = [
        *(sys.executable, "-m", "steerserve", "serve", *tiny.arguments(), "--num-threads", "1"),
        *("--access", str(access), "--http-port", "0", "--log-level", "DEBUG"),
        *("--audit-dir", str(tmp_path / "audit"), "--audit-key", str(tmp_path / "keys" / "audit.key")),
        *("--audit-heads", str(tmp_path / "heads"), "--audit-signing-key", str(tmp_path / "keys" / "heads.key")),
    ]
    environment = os.environ | {"STEERSERVE_API_KEY": KEY, "GRPC_VERBOSITY": "DEBUG"}
    printed = subprocess.run([*command, "--print-config"], capture_output=True, text=True, env=environment, check=True)
    log = tmp_path / "log"
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            grpc_address, http_url = (process.stdout.readline().split()[-1] for _ in range(2))
            use(grpc_address, http_url, access)
        finally:
            process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0
    told = "".join([printed.stdout, printed.stderr, rest, log.read_text()])
    assert str(access) in told
    assert "app-1" in told
    assert "sha256: expected 64 hexadecimal digits" in told, "the misplaced key was seen"
    assert [name for name, secret in secrets.items() if secret in told] == []


def use(grpc_address: str, http_url: str, access: Path) -> None:
    """Whatever a caller can do, right and wrong."""
    for key in (KEY, WRONG_KEY, ADMIN_KEY, ""):
        with SteerserveClient(grpc_address, api_key=key) as client:
            for options in ({}, {"policies": [PROMPT]}, {"steer": ["mood=block"]}, {"stop": [PROMPT] * 99}):
                call = {"max_tokens": 2, "cache_salt": SALT, **options}
                ignoring_errors(lambda call=call, client=client: client.generate(PROMPT, **call))
            ignoring_errors(lambda client=client: client.score(PROMPT))
            ignoring_errors(client.reload_policies)
        for body in (
            {"prompt": PROMPT, "max_tokens": 2},
            {"prompt": PROMPT, PROMPT: 1},
            {"prompt": [PROMPT, 1]},
            PROMPT,
        ):
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            request = urllib.request.Request(f"{http_url}/completions", json.dumps(body).encode(), headers)
            ignoring_errors(lambda request=request: urllib.request.urlopen(request, timeout=20).read())
    access.write_text(access.read_text().replace(key_hash(KEY), MISPLACED_KEY))
    with SteerserveClient(grpc_address, api_key=ADMIN_KEY) as client, pytest.raises(SteerserveError) as raised:
        client.reload_policies()
    assert MISPLACED_KEY not in str(raised.value)


def ignoring_errors(call: Callable[[], object]) -> None:
    try:
        call()
    except SteerserveError as error:
        answer = str(error)
    except urllib.error.HTTPError as error:
        with error:
            answer = error.read().decode()
    else:
        answer = ""
    assert not any(key in answer for key in (KEY, ADMIN_KEY, WRONG_KEY))
