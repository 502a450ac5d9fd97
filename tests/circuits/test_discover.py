"""``steerserve discover`` from a file of pairs to circuits and their pictures, on a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from steerserve import cli
from steerserve.circuits.diagram import COLOURS, MAX_EDGES, Diagram
from steerserve.circuits.discovery import Counts, Decision, Discovery
from steerserve.circuits.dot import source_of
from steerserve.circuits.drawing import draw_circuit, head_effects, save_circuit
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


def diagram_of(graph: Graph) -> Diagram:
    """Every edge is kept, the last ones with the largest effects."""
    effects = np.zeros(graph.full.shape)
    effects[graph.full] = range(graph.num_edges)
    return Diagram.of(graph, graph.full, effects)


def words_of(picture: Path) -> str:
    return " ".join(ElementTree.parse(picture).getroot().itertext())


def test_a_picture_names_its_nodes_and_says_what_it_leaves_out(tmp_path, monkeypatch) -> None:
    from matplotlib import rcParams

    monkeypatch.setitem(rcParams, "svg.fonttype", "none")
    graph = Graph(n_layers=6, n_heads=4, n_kv_heads=2)
    assert graph.num_edges > MAX_EDGES
    save(draw_circuit(diagram_of(graph), "all of it"), tmp_path / "large.svg")
    words = words_of(tmp_path / "large.svg")
    assert f"the {MAX_EDGES} strongest of" in words
    assert all(name in words for name in ("logits", "L5H3", "m4", "into mlp"))
    small = Graph(n_layers=1, n_heads=2, n_kv_heads=1, split=False)
    save(draw_circuit(diagram_of(small), "all of it"), tmp_path / "small.svg")
    words = words_of(tmp_path / "small.svg")
    assert "strongest" not in words
    assert all(name in words for name in ("input", "L0H0", "L0H1", "m0", "logits"))


def test_graphviz_gets_rows_from_the_embedding_to_the_logits_and_the_strongest_edges() -> None:
    graph = Graph(n_layers=6, n_heads=4, n_kv_heads=2)
    diagram = diagram_of(graph)
    source = source_of(diagram, "τ < 1 & <all>").source
    arrows = [line for line in source.splitlines() if "->" in line and "invis" not in line]
    assert len(arrows) == MAX_EDGES
    assert re.search(r"\bL5H3 -> logits \[arrowsize=0.5 color=\"#111111", source)
    rows = [block.split() for block in re.findall(r"rank=same\n([^}]*)}", source)]
    assert rows[-1] == ["logits"]
    assert rows[-2:-4:-1] == [["m5"], ["L5H0", "L5H1", "L5H2", "L5H3"]]
    assert len(re.findall("style=invis", source)) == len(rows) - 1
    assert f"τ &lt; 1 &amp; &lt;all&gt;<BR/>the {MAX_EDGES} strongest of" in source
    assert all(f'<FONT COLOR="{COLOURS[kind]}">into {kind}</FONT>' in source for kind in diagram.kinds)


def test_a_circuit_without_an_edge_has_a_picture_too(tmp_path, monkeypatch) -> None:
    graph = Graph(n_layers=1, n_heads=1, n_kv_heads=1)
    diagram = Diagram.of(graph, graph.empty(), np.zeros(graph.full.shape))
    assert "logits" in source_of(diagram, "nothing").source
    monkeypatch.setenv("PATH", str(tmp_path))
    save_circuit(diagram, "nothing", tmp_path / "circuit.svg")
    ElementTree.parse(tmp_path / "circuit.svg")


@pytest.mark.parametrize(
    ("script", "by_graphviz"),
    [
        ('test "$2" = -Tsvg && echo "<svg>" && while read -r line; do :; done && echo "</svg>"', True),
        ("exit 1", False),
        (None, False),
    ],
    ids=["there", "broken", "missing"],
)
def test_pictures_are_laid_out_by_dot_or_plainly_without_it(script, by_graphviz, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "dot").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "dot").chmod(0o755)
    save_circuit(diagram_of(Graph(1, 2, 1)), "all of it", tmp_path / "circuit.svg")
    drawn = (tmp_path / "circuit.svg").read_text()
    ElementTree.fromstring(drawn)
    assert (drawn == "<svg>\n</svg>\n") is by_graphviz


def test_a_heads_effect_is_that_of_the_kept_edges_out_of_it() -> None:
    graph = Graph(n_layers=2, n_heads=1, n_kv_heads=1, split=False)
    head = graph.head(0, 0)
    of_head = [edge for edge in graph.edges if edge[1] == head]
    decisions = [
        Decision(*edge, kept, effect, 0)
        for edge, kept, effect in zip(of_head, (True, False, True), (1.0, 2.0, 4.0), strict=False)
    ]
    assert head_effects(Discovery(graph, {}, tuple(decisions), Counts(), 0.0)) == [[5.0], [0.0]]
