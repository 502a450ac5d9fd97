"""``steerserve serve --monitor-plan``: what clients and operators see of it; and heads over the wire."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from steerserve import DirectionTarget, Guard, GuardAction, HeadTarget, Intervention, Op, SteerserveClient
from steerserve.cli import app
from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.models.loading import checkpoint_fingerprint
from steerserve.sae.registry import load_sae
from steerserve.steering.monitor_plan import (
    ConceptReading,
    FeatureReading,
    HeadReading,
    MonitorEntry,
    MonitorPlan,
    save_monitor_plan,
)
from steerserve.steering.packs import ModelRef


@pytest.fixture(scope="module")
def plan_file(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("monitors") / "plan.json"
    fingerprint = checkpoint_fingerprint(tiny.model)
    sae = load_sae(tiny.sae)
    towards = tiny.unembedding[tiny.feature_token[0]].numpy().astype(np.float32)
    plan = MonitorPlan(
        name="watch",
        behaviour="writes one token",
        model=ModelRef(name="tiny-llama", fingerprint=fingerprint),
        entries=(
            MonitorEntry(name="mood", reading=ConceptReading(concept="mood"), frequency=0.75),
            MonitorEntry(name="forced", reading=FeatureReading(sae=sae.name, sha256=sae.sha256, features=(0, 3))),
            MonitorEntry(name="L0H1", reading=HeadReading(head="L0H1", vector="towards"), specificity=2.5),
        ),
        protocol={"auroc": 0.9},
    )
    save_monitor_plan(plan, {"towards": towards}, path)
    return path


@pytest.fixture(scope="module")
def server(start_server, tiny, plan_file) -> Iterator:
    config = tiny.config(monitor_plan=str(plan_file), telemetry={"metrics_port": 0}, http={"port": 0})
    with start_server(config) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[SteerserveClient]:
    with SteerserveClient(server.address) as client:
        yield client


def test_the_server_says_what_it_monitors(client, tiny) -> None:
    info = client.get_model_info()
    assert (info.n_heads, info.d_head) == (4, info.d_model // 4)
    plan = info.monitor_plan
    assert (plan.name, plan.behaviour, json.loads(plan.protocol_json)) == ("watch", "writes one token", {"auroc": 0.9})
    assert [(entry.name, entry.site, entry.reading) for entry in plan.entries] == [
        ("mood", str(tiny.site), "concept mood"),
        ("forced", str(tiny.site), "2 features of tiny-sae"),
        ("L0H1", "blocks.0.attn.hook_z", "direction that head L0H1 writes to"),
    ]
    assert [entry.frequency if entry.HasField("frequency") else None for entry in plan.entries] == [0.75, None, None]
    assert plan.entries[2].specificity == 2.5


def test_every_response_ends_with_what_was_read(client) -> None:
    reply = client.generate("what the", max_tokens=4, temperature=0)
    assert [(each.source, each.label) for each in reply.receipt.monitors] == [
        ("monitor:watch", "mood"), ("monitor:watch", "forced"), ("monitor:watch", "L0H1")
    ]  # fmt: skip
    assert all(each.tokens_covered == each.tokens_in_scope > 0 for each in reply.receipt.monitors)
    assert all(each.max_score >= each.mean_score for each in reply.receipt.monitors)
    assert (reply.receipt.interventions, reply.receipt.steered, reply.scores) == ((), False, ())
    pieces = list(client.generate_stream("what the", max_tokens=4, temperature=0))
    assert pieces[-1].receipt.monitors == reply.receipt.monitors
    assert all(piece.receipt is None for piece in pieces[:-1])


def test_each_position_is_told_where_it_is_asked_for(client) -> None:
    spec = ["mood=monitor"]
    reply = client.generate("what the", steer=spec, max_tokens=3, temperature=0, return_activations=True)
    scores = np.stack([line.monitors for line in reply.scores])
    assert scores.shape[1] == 3
    assert scores.max(axis=0) == pytest.approx([each.max_score for each in reply.receipt.monitors], rel=1e-6)
    assert [line.scores[0] for line in reply.scores] == pytest.approx(scores[:, 0], rel=1e-6)


def test_metrics_count_every_response(server, client) -> None:
    def responses(entry: str) -> float:
        text = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10).read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(
            s.value for s in samples if s.name == "steerserve_monitor_score_count" and s.labels == {"entry": entry}
        )

    before = {entry: responses(entry) for entry in ("mood", "forced", "L0H1")}
    client.generate("what the", max_tokens=2, n=3)
    assert {entry: responses(entry) for entry in before} == {entry: count + 3 for entry, count in before.items()}


def test_http_reports_what_was_read(server) -> None:
    body = {"model": "tiny-llama", "prompt": "what the", "max_tokens": 2}
    url = f"http://{server.http_address}/v1/completions"
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    answer = json.loads(urllib.request.urlopen(asked, timeout=30).read())
    monitors = answer["choices"][0]["steerserve"]["receipt"]["monitors"]
    assert [entry["label"] for entry in monitors] == ["mood", "forced", "L0H1"]


def test_a_client_scales_and_reads_heads(client, tiny, tmp_path) -> None:
    np.save(tmp_path / "towards.npy", tiny.unembedding[3].numpy())
    asked = ["L0H1=scale:0.5", f"direction:{tmp_path / 'towards.npy'}@L0H1=monitor"]
    reply = client.generate("what the", steer=[*asked, Intervention(HeadTarget(1, 0), Op.BLOCK)], max_tokens=3)
    assert [line.label for line in reply.receipt.interventions] == [
        "head L0H1: scale 0.5", "direction that head L0H1 writes to: monitor", "head L1H0: block"
    ]  # fmt: skip
    edited = [line.tokens_edited for line in reply.receipt.interventions]
    assert edited[0] == edited[2] > edited[1] == 0
    assert reply.receipt.steered


@pytest.mark.parametrize(
    ("steer", "error", "field"),
    [
        ("L9H0=block", IncompatibleError, "steering.interventions[0].head.layer"),
        ("L0H9=block", IncompatibleError, "steering.interventions[0].head.head"),
        ("L0H0=add:1", InvalidRequestError, "steering.interventions[0].op"),
    ],
)
def test_heads_are_refused_by_their_field_on_the_wire(steer, error, field, client) -> None:
    with pytest.raises(error) as caught:
        client.generate("what the", steer=[steer], max_tokens=1)
    assert caught.value.field == field


def test_a_guard_reads_a_direction_and_not_a_bare_head(client, tiny) -> None:
    guard = Guard(HeadTarget(0, 0), 1.0, GuardAction.FLAG)
    with pytest.raises(InvalidRequestError, match="a direction of the head to read"):
        client.generate("what the", guards=[guard], max_tokens=1)
    read = DirectionTarget(HeadTarget(0, 0).site, tiny.unembedding[3].numpy(), 0)
    reply = client.generate("what the", guards=[Guard(read, -1e6, GuardAction.FLAG)], max_tokens=2)
    assert {event.label for event in reply.guard_events} == {"guard: direction that head L0H0 writes to > -1e+06"}


def test_a_plan_of_other_weights_ends_the_start(tiny, plan_file, tmp_path) -> None:
    content = json.loads(plan_file.read_text())
    content["model"]["fingerprint"] = "0" * 64
    (tmp_path / "plan.json").write_text(json.dumps(content))
    (tmp_path / "plan.safetensors").write_bytes(plan_file.with_suffix(".safetensors").read_bytes())
    result = CliRunner().invoke(app, ["serve", *tiny.arguments(), "--monitor-plan", str(tmp_path / "plan.json")])
    assert result.exit_code == 2
    assert "monitor_plan.model.fingerprint" in result.stderr
