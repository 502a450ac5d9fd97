"""``steerserve analyse`` from a file of pairs to a result and its picture, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from steerserve import cli
from steerserve.circuits.cli import app
from steerserve.circuits.forward import all_last_logits
from steerserve.circuits.prompts import Split, read_pairs
from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
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


@pytest.fixture
def circuit(model, pairs, tmp_path) -> Path:
    """An exact one, of other prompts."""
    arguments = ["discover", pairs, "--model", model, "--prompts", 3, "--threshold", 1e-5, "--out", tmp_path / "found"]
    outcome = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    return tmp_path / "found" / "circuit-1e-05.json"


def test_edges_are_scored_and_compared_with_an_exact_circuit(model, pairs, circuit, tmp_path) -> None:
    out = tmp_path / "edges.json"
    arguments = ("edges", pairs, "--circuit", circuit, "--num-prompts", 3, "--out", out, "--model", model)
    outcome = analyse(*arguments)
    result = result_of(outcome, out)
    exact = json.loads(circuit.read_text())
    kept = {name for name, edge in exact["edges"].items() if edge["in_graph"]}
    assert result["edges"].keys() == exact["edges"].keys()
    assert 0 < sum(edge["in_graph"] for edge in result["edges"].values()) <= len(kept)
    assert (result["cfg"]["approximate"], result["cfg"]["method"]) == (True, "EAP-IG (inputs)")
    assert result["cfg"]["metric"] == exact["cfg"]["metric"] == "kl"
    ranked = sorted(result["edges"], key=lambda name: -result["edges"][name]["score"])[: len(kept)]
    assert result["agreement"]["overlap"]["score"] == len(kept & set(ranked)) / len(kept)
    scores = result["edges"].items()
    inside, outside = ([edge["score"] for name, edge in scores if (name in kept) is of] for of in (True, False))
    in_order = np.mean([[(a > b) + (a == b) / 2 for b in outside] for a in inside])
    assert result["agreement"]["auroc"]["score"] == pytest.approx(in_order)
    assert "approximate" in outcome.output


def test_edges_by_eap_of_a_split_graph(model, pairs, tmp_path) -> None:
    out = tmp_path / "edges.json"
    options = ("--steps", 1, "--split-qkv", "--count", 40, "--num-prompts", 3)
    result = result_of(analyse("edges", pairs, *options, "--out", out, "--model", model), out)
    assert (result["cfg"]["method"], result["cfg"]["split_qkv_input"]) == ("EAP", True)
    assert 0 < sum(edge["in_graph"] for edge in result["edges"].values()) <= 40
    assert "agreement" not in result


def test_faithfulness_says_what_the_circuit_and_the_rest_answer(model, pairs, circuit, tmp_path) -> None:
    out = tmp_path / "faithfulness.json"
    options = ("--prompts", 5, "--checks", 3, "--controls", 2, "--parts", 2, "--show", 1, "--seed", 3)
    outcome = analyse("faithfulness", circuit, pairs, *options, "--out", out, "--model", model)
    result = result_of(outcome, out)
    loaded = load_model(str(model), torch.float32)
    held_out = read_pairs(pairs, loaded.tokenizer, Split.HELD_OUT).take(range(5))
    for name, tokens in (("model", held_out.clean), ("nothing", held_out.corrupted)):
        rows = all_last_logits(loaded, tokens, held_out.last)
        right = [
            row[list(yes)].max() > row[list(no)].max()
            for row, yes, no in zip(rows, held_out.correct, held_out.wrong, strict=True)
        ]
        assert result["answers"][name]["accuracy"] == np.mean(right)
        margins = [
            row[list(yes)].mean() - row[list(no)].mean()
            for row, yes, no in zip(rows, held_out.correct, held_out.wrong, strict=True)
        ]
        assert result["answers"][name]["margin"] == pytest.approx(float(np.mean(margins)), abs=1e-4)
    assert [result["answers"][name]["num_prompts"] for name in ("model", "circuit", "nothing", "knock_out")] == [
        5,
        5,
        5,
        3,
    ]
    metrics = result["metrics"]
    assert len(metrics["random"]) == len(metrics["random_connected"]) == len(result["completeness"]) == 2
    assert metrics["model"] == 0 < metrics["nothing"]
    assert result["curve"]["faithfulness"][-1] == pytest.approx(1, abs=1e-3)
    kept = sum(edge["in_graph"] for edge in json.loads(circuit.read_text())["edges"].values())
    assert result["num_edges"] == kept
    assert "axxx" in outcome.output


def test_the_edges_of_an_attribution_are_a_circuit_too(model, pairs, tmp_path) -> None:
    edges, out = tmp_path / "edges.json", tmp_path / "faithfulness.json"
    result_of(analyse("edges", pairs, "--num-prompts", 3, "--count", 20, "--out", edges, "--model", model), edges)
    options = ("--prompts", 2, "--controls", 0, "--parts", 1, "--metric", "kl")
    result = result_of(analyse("faithfulness", edges, pairs, *options, "--out", out, "--model", model), out)
    assert (result["circuit"], result["metric"]) == ("edges.json", "kl")


def test_stability_is_searched_once(model, pairs, tmp_path) -> None:
    out = tmp_path / "stability.json"
    settings = ("--threshold", 1e-4, "--threshold", 1e-5, "--order", "later_first", "--order", "earlier_first")
    options = ("--bootstraps", 2, "--prompts", 3, "--searches", tmp_path / "searches", "--model", model)
    arguments = ("stability", pairs, *settings, *options, "--out", out)
    result = result_of(analyse(*arguments), out)
    assert len(result["circuits"]) == 8
    assert set(result["agreement"]) == {"bootstrap", "order", "threshold"}
    assert all(0 <= index <= 1 for index in result["agreement"].values())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "searches").glob("bootstrap*.json")}
    assert {path.stem for path in files} == result["circuits"].keys()
    again = result_of(analyse(*arguments), out)
    assert again["edges"] == result["edges"]
    assert files == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cfg": {}}, AssetError, "not a circuit"),
        ({"complete": False}, AssetError, "decided"),
        ({"edges": {}}, AssetError, "0 edges are decided"),
        ({"model_fingerprint": "0"}, IncompatibleError, "fingerprint"),
        ({"metric": "loss"}, AssetError, "metric 'loss' is none of kl"),
        ({"ablation": "mean"}, AssetError, "not a circuit"),
        ({"ablation": "zero"}, IncompatibleError, "corrupted ablation"),
    ],
)
def test_files_that_are_no_circuit_of_the_model_are_refused(
    model, pairs, circuit, tmp_path, change, error, message
) -> None:
    content = json.loads(circuit.read_text())
    (content if change.keys() <= content.keys() else content["cfg"]).update(change)
    circuit.write_text(json.dumps(content))
    options = ("--num-prompts", 3, "--out", tmp_path / "edges.json", "--model", model)
    outcome = analyse("edges", pairs, "--circuit", circuit, *options)
    assert isinstance(outcome.exception, error)
    assert message in str(outcome.exception)


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
        (("edges", "nothing"), "TASK"),
        (("stability", "ioi", "--threshold", "0"), "threshold"),
        (("edges", "ioi", "--split-qkv", "--circuit", "circuit.json"), "--split-qkv and --expand-kv"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_option(model, tmp_path, monkeypatch, arguments, field) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = analyse(*arguments, "--model", model)
    assert isinstance(outcome.exception, InvalidRequestError)
    assert outcome.exception.field == field
