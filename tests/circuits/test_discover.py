"""``steerserve discover`` from a file of pairs to circuits and their pictures, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from steerserve import cli
from steerserve.circuits.discovery import Counts, Decision, Discovery
from steerserve.circuits.drawing import MAX_EDGES, draw_circuit, head_effects
from steerserve.circuits.graph import Graph
from steerserve.circuits.plots import save

pytest.importorskip("matplotlib")


def discover(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["discover", *map(str, arguments)])


@pytest.fixture
def model(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "letters.jsonl"
    rows = [{"clean": f"{i:02}axxx", "corrupted": f"{i:02}byyx", "correct": ["a"], "wrong": ["b"]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(pairs: Path, model: Path) -> list[object]:
    return [pairs, "--model", model, "--prompts", 3, "--held-out", 3]


def test_a_sweep_writes_circuits_and_pictures_and_is_not_done_twice(options, tmp_path) -> None:
    out = tmp_path / "found"
    arguments = (*options, "--threshold", 1e-4, "--threshold", 1e-6, "--out", out)
    first = discover(*arguments)
    assert first.exit_code == 0, (first.output, first.exception)
    assert "on held-out prompts" in first.output
    contents = {tau: json.loads((out / f"circuit-{tau}.json").read_text()) for tau in ("1e-06", "0.0001")}
    kept = [sum(edge["in_graph"] for edge in content["edges"].values()) for content in contents.values()]
    assert kept[0] >= kept[1]
    for tau, content in contents.items():
        assert content["complete"]
        assert set(content["held_out"]) >= {"circuit", "knock_out", "model", "nothing", "random", "faithfulness"}
        for picture in (f"circuit-{tau}.svg", f"heads-{tau}.svg"):
            ElementTree.parse(out / picture)
    tested = contents["1e-06"]["counts"]["tested"]
    again = discover(*arguments)
    assert again.exit_code == 0, again.output
    assert json.loads((out / "circuit-1e-06.json").read_text())["counts"]["tested"] == tested


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--threshold", "0"], "threshold: got 0.0, expected a finite number above 0"),
        (["--metric", "loss"], "--metric: got 'loss', expected one of kl"),
    ],
)
def test_mistakes_end_in_one_line(options, tmp_path, more, message) -> None:
    outcome = discover(*options, "--out", tmp_path / "x", *more)
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert not (tmp_path / "x").exists()


def test_a_directory_with_another_search_is_refused(options, tmp_path) -> None:
    arguments = (*options, "--threshold", 1e-4, "--out", tmp_path)
    assert discover(*arguments).exit_code == 0
    outcome = discover(*arguments, "--order", "earlier_first")
    assert outcome.exit_code == 2
    assert "order: got 'later_first', expected 'earlier_first'" in outcome.output.replace("\n", " ")


def test_an_unknown_task(model, tmp_path) -> None:
    outcome = discover("chess", "--out", tmp_path, "--model", model)
    assert outcome.exit_code == 2
    assert "TASK: got 'chess', expected one of ioi" in outcome.output


def whole(graph: Graph) -> Discovery:
    """Every edge is kept, the last ones with the largest effects."""
    decisions = tuple(
        Decision(receiver, source, True, float(number), number) for number, (receiver, source) in enumerate(graph.edges)
    )
    return Discovery(graph, {}, decisions, Counts(), 0.0)


def words_of(picture: Path) -> str:
    return " ".join(ElementTree.parse(picture).getroot().itertext())


def test_a_picture_names_its_nodes_and_says_what_it_leaves_out(tmp_path, monkeypatch) -> None:
    from matplotlib import rcParams

    monkeypatch.setitem(rcParams, "svg.fonttype", "none")
    graph = Graph(n_layers=6, n_heads=4, n_kv_heads=2)
    assert graph.num_edges > MAX_EDGES
    save(draw_circuit(whole(graph), "all of it"), tmp_path / "large.svg")
    words = words_of(tmp_path / "large.svg")
    assert f"the {MAX_EDGES} strongest of" in words
    assert all(name in words for name in ("logits", "L5H3", "m4", "into mlp"))
    small = Graph(n_layers=1, n_heads=2, n_kv_heads=1, split=False)
    save(draw_circuit(whole(small), "all of it"), tmp_path / "small.svg")
    words = words_of(tmp_path / "small.svg")
    assert "strongest" not in words
    assert all(name in words for name in ("input", "L0H0", "L0H1", "m0", "logits"))


def test_a_heads_effect_is_that_of_the_kept_edges_out_of_it() -> None:
    graph = Graph(n_layers=2, n_heads=1, n_kv_heads=1, split=False)
    head = graph.head(0, 0)
    of_head = [edge for edge in graph.edges if edge[1] == head]
    decisions = [
        Decision(*edge, kept, effect, 0)
        for edge, kept, effect in zip(of_head, (True, False, True), (1.0, 2.0, 4.0), strict=False)
    ]
    assert head_effects(Discovery(graph, {}, tuple(decisions), Counts(), 0.0)) == [[5.0], [0.0]]
