"""The files of ``deploy`` speak of options, policies and metrics that there are."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from steerserve.cli import app
from steerserve.serving.health import LIVENESS, READINESS
from steerserve.serving.metrics import Metrics
from steerserve.steering.policies import parse_policy

DEPLOY = Path(__file__).parents[2] / "deploy"
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
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    return ["serve", *json.loads(next(line for line in lines if line.startswith("CMD ")).removeprefix("CMD "))]


@pytest.mark.parametrize(
    "arguments", [*commands_of_unit(), command_of_image(), ["serve", *sidecar()["args"]]], ids=lambda words: words[0]
)
def test_every_command_line_is_one_that_the_cli_takes(arguments) -> None:
    command = get_command(app).commands[arguments[0]]
    command.make_context(arguments[0], list(arguments[1:]))  # raises for an unknown option, and runs nothing


def test_the_policies_of_the_config_map_are_policies() -> None:
    for name, text in manifest("ConfigMap")["data"].items():
        assert parse_policy(text.encode(), name).name == name.removesuffix(".yaml")


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


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(server) -> None:
    asked = {name for text in expressions() for name in re.findall(r"\bsteerserve_\w+", text)}
    known: set[str] = set()
    for family in Metrics(server.engine).registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        known |= {family.name + suffix for suffix in suffixes}
    assert asked <= known, asked - known
    assert {name for name in known if "verdicts" in name or "first_token" in name} & asked
