"""The files of ``deploy`` speak of options, policies and metrics that there are, and docs/deploy.md can be followed."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from steerserve.cli import app
from steerserve.serving.audit.keys import create_keys
from steerserve.serving.health import LIVENESS, READINESS
from steerserve.steering.policies import parse_policy

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TO_RUN = ("Policies", "Start", "Change a policy", "Stop and upgrade")
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes/sidecar.yaml").read_text()))


def manifest(kind: str) -> dict[str, Any]:
    return next(one for one in MANIFESTS if one["kind"] == kind)


def pod() -> dict[str, Any]:
    return manifest("Deployment")["spec"]["template"]["spec"]


def sidecar() -> dict[str, Any]:
    return pod()["initContainers"][0]


def commands_of_unit() -> list[list[str]]:
    lines = (DEPLOY / "steerserve.service").read_text().splitlines()
    return [shlex.split(line.partition("=")[2])[1:] for line in lines if re.match(r"ExecStart(Post)?=", line)]


def command_of_image() -> list[str]:
    (arguments,) = instructions("CMD")
    return ["serve", *json.loads(arguments)]


def instructions(name: str) -> list[str]:
    """What the Dockerfile says behind each instruction of a name."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")]


def blocks(*sections: str) -> str:
    """The commands of some sections of docs/deploy.md, as one script."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    texts = [re.search(rf"^## {section}\n(.*?)(?=^## )", page, re.M | re.S)[1] for section in sections]
    return "\n".join(block for text in texts for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S))


@pytest.mark.parametrize(
    "arguments", [*commands_of_unit(), command_of_image(), ["serve", *sidecar()["args"]]], ids=lambda words: words[0]
)
def test_every_command_line_is_one_that_the_cli_takes(arguments) -> None:
    command = get_command(app).commands[arguments[0]]
    command.make_context(arguments[0], list(arguments[1:]))  # raises for an unknown option, and runs nothing


def test_the_policies_of_the_config_map_are_policies() -> None:
    for name, text in manifest("ConfigMap")["data"].items():
        assert parse_policy(text.encode(), name).name == name.removesuffix(".yaml")


def test_what_the_image_is_built_from_is_there_and_let_through() -> None:
    copied = {source for line in instructions("COPY") if "--from" not in line for source in line.split()[:-1]}
    assert {"setup.py", "csrc", "protos", "steerserve", "constraints.txt"} <= copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


def test_the_page_and_the_manifest_show_the_same_policy() -> None:
    written = re.search(r"cat > policies/clean-language.yaml <<'END'\n(.*?)END\n", blocks("Policies"), re.S)[1]
    assert written == manifest("ConfigMap")["data"]["clean-language.yaml"]


def test_operators_of_image_and_pod_are_on_loopback() -> None:
    for arguments in (command_of_image(), sidecar()["args"]):
        assert any("--admin-port" in word for word in arguments)
        assert not any("--admin-host" in word for word in arguments)


@pytest.mark.slow
def test_the_page_followed_word_for_word(smollm2_dir: Path, tmp_path: Path) -> None:
    """But for the ports, of which there may be others' on this machine, and for the installation: it is this one."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, metrics_port = one.getsockname()[1], other.getsockname()[1]
    (tmp_path / "venv").symlink_to(sys.prefix)
    script = "set -me\n" + blocks(*TO_RUN).replace("9464", str(metrics_port))
    here = {"STEERSERVE_SERVER__PORT": str(port), "STEERSERVE_TARGET": f"127.0.0.1:{port}"}
    told = subprocess.run(["bash"], input=script, capture_output=True, text=True, cwd=tmp_path, env=os.environ | here)
    assert told.returncode == 0, told.stderr
    for expected in (
        "clean-language@1: 2 rules, good\n",
        f"serving smollm2-135m-instruct on 127.0.0.1:{port}\n",
        '\nsteerserve_verdicts_total{policy="clean-language"',
        '"event": "request"',
        "profanity@1, clean-language@2",
    ):
        assert expected in told.stdout
    assert '"event": "draining"' in (tmp_path / "steerserve.log").read_text()


def test_probes_ask_for_services_that_health_has() -> None:
    asked = {name: sidecar()[name]["grpc"]["service"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {"startupProbe": READINESS, "readinessProbe": READINESS, "livenessProbe": LIVENESS}


def test_the_pod_waits_longer_than_the_server_drains() -> None:
    drain_s = next(float(word.partition("=")[2]) for word in sidecar()["args"] if word.startswith("--drain-timeout-s"))
    assert pod()["terminationGracePeriodSeconds"] > drain_s + 10


def expressions() -> Iterator[str]:
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(tiny, start_server, tmp_path) -> None:
    asked = {name for text in expressions() for name in re.findall(r"\bsteerserve_\w+", text)}
    mac, _, _ = create_keys(tmp_path / "keys")
    known: set[str] = set()
    audit, telemetry = {"directory": str(tmp_path / "log"), "key": str(mac)}, {"metrics_port": 0}
    with start_server(tiny.config(audit=audit, telemetry=telemetry)) as server:
        text = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10).read().decode()
    for family in text_string_to_metric_families(text):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        known |= {family.name + suffix for suffix in suffixes}
    assert asked <= known, asked - known
    assert {name for name in known if "verdicts" in name or "first_token" in name} & asked
