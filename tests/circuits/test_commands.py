"""``steerserve analyse`` from a file of pairs to a result and its picture, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from steerserve.circuits.cli import app
from steerserve.errors import InvalidRequestError
from steerserve.models.loading import load_model
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

pytest.importorskip("matplotlib")


def analyse(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def model(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "letters.jsonl"
    rows = [
        {"clean": f"{i:02}axxx", "corrupted": f"{i:02}byyx", "correct": ["a"], "wrong": ["b", "c"]} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result_of(outcome: Result, path: Path) -> dict:
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    assert path.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    return json.loads(path.read_text())


@pytest.mark.parametrize(("part", "columns"), [("heads", 4), ("mlp_out", 3)])
def test_patch(model, pairs, tmp_path, part, columns) -> None:
    out = tmp_path / "patching.json"
    outcome = analyse(
        "patch", pairs, "--part", part, "--num-prompts", 5, "--metric", "kl", "--out", out, "--model", model
    )
    result = result_of(outcome, out)
    assert [len(row) for row in result["effect"]] == [columns] * 3
    assert (result["pairs"], result["num_pairs"], result["metric"], result["part"]) == ("letters", 5, "kl", part)
    assert result["command"].startswith("steerserve ")


def test_lens(model, pairs, tmp_path) -> None:
    out = tmp_path / "lens.json"
    result = result_of(analyse("lens", pairs, "--out", out, "--model", model), out)
    assert len(result["readings"]) == 4
    assert result["metric"] == "log_odds"


def test_probe_of_pairs_and_of_labelled_texts(model, pairs, tmp_path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "probes.json"
    result = result_of(analyse("probe", pairs, "--out", out, "--model", model), out)
    assert result["labels"] == ["clean", "corrupted"]
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": f"{i} {'stone' if i % 2 else 'cloud'} {i * i}", "label": str(i % 2)} for i in range(40)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = result_of(analyse("probe", "--labelled", texts, "--out", out, "--model", model), out)
    assert result["labels"] == ["0", "1"]
    assert len(result["probes"]) == 4


def test_geometry_of_pairs_and_of_texts(model, pairs, tmp_path) -> None:
    out = tmp_path / "geometry.json"
    result = result_of(analyse("geometry", pairs, "--num-prompts", 10, "--out", out, "--model", model), out)
    assert result["num_positions"] == 10 * 5
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{i} a line of text\n" for i in range(20)))
    result = result_of(analyse("geometry", "--texts", texts, "--out", out, "--model", model), out)
    assert (result["texts"], len(result["layers"])) == ("texts", 4)


def test_features(model, pairs, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(12, 32, generator=generator)
    metadata = {"model_fingerprint": load_model(str(model), torch.float32).fingerprint}
    zeros = torch.zeros(12)
    sae = SAE("s", Site(1, Stream.RESID_POST), W_dec.T, zeros, W_dec, torch.zeros(32), zeros, metadata=metadata)
    save_sae(sae, tmp_path / "sae")
    out = tmp_path / "features.json"
    arguments = ("features", pairs, "--sae", tmp_path / "sae", "--count", 5, "--out", out, "--model", model)
    result = result_of(analyse(*arguments), out)
    assert len(result["features"]) == 5
    assert result["site"] == "blocks.1.hook_resid_post"


def test_the_same_command_draws_the_same_picture(model, pairs, tmp_path) -> None:
    pictures = []
    for name in ("a", "b"):
        analyse("lens", pairs, "--out", tmp_path / f"{name}.json", "--model", model)
        pictures.append((tmp_path / f"{name}.svg").read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("lens", "nothing"), "TASK"),
        (("lens", "ioi", "--metric", "accuracy"), "--metric"),
        (("lens", "ioi", "--out", "lens.txt"), "--out"),
        (("patch", "ioi", "--out", "no/where.json"), "--out"),
        (("probe",), "TASK"),
        (("geometry", "ioi", "--texts", "texts.txt"), "TASK"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_option(model, tmp_path, monkeypatch, arguments, field) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = analyse(*arguments, "--model", model)
    assert isinstance(outcome.exception, InvalidRequestError)
    assert outcome.exception.field == field
