"""Agreement of circuits, and searches over resampled prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steerserve.circuits import acdc
from steerserve.circuits.agreement import auroc, connected, jaccard, mean_jaccard, overlap, top_edges
from steerserve.circuits.graph import Graph
from steerserve.circuits.random_circuits import random_circuit
from steerserve.circuits.settings import ACDCConfig, ParentOrder
from steerserve.circuits.slicing import slice_model
from steerserve.circuits.stability import Setting, Stability, measure_stability
from steerserve.errors import InvalidRequestError

GRAPH = Graph(2, 2, 2)


def test_scores_that_tell_the_circuit_agree_with_it() -> None:
    circuit = random_circuit(GRAPH, 9, np.random.default_rng(0))
    assert auroc(GRAPH, circuit.astype(float), circuit) == overlap(GRAPH, circuit.astype(float), circuit) == 1
    assert auroc(GRAPH, -circuit.astype(float), circuit) == 0
    assert auroc(GRAPH, np.ones(circuit.shape), circuit) == 0.5


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    circuit = random_circuit(GRAPH, 9, np.random.default_rng(0))
    scores = np.random.default_rng(1).integers(0, 5, circuit.shape).astype(float)
    inside, outside = scores[circuit][:, None], scores[GRAPH.full & ~circuit]
    expected = ((inside > outside) + (inside == outside) / 2).mean()
    assert auroc(GRAPH, scores, circuit) == pytest.approx(expected, abs=1e-12)


def test_impossible_comparisons_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="truth"):
        auroc(GRAPH, np.ones(GRAPH.full.shape), GRAPH.full)
    with pytest.raises(InvalidRequestError, match="count"):
        top_edges(GRAPH, np.ones(GRAPH.full.shape), GRAPH.num_edges + 1)


def test_edges_on_no_path_are_not_connected() -> None:
    names = {GRAPH.edge_name(*edge): edge for edge in GRAPH.edges}
    present = GRAPH.empty()
    for name in ("input->a0.h0<v>", "a0.h0->logits", "input->m0", "a1.h0->logits"):
        present[names[name]] = True
    left = {GRAPH.edge_name(*edge) for edge in GRAPH.edges if connected(GRAPH, present)[edge]}
    assert left == {"input->a0.h0<v>", "a0.h0->logits"}


def test_jaccard() -> None:
    half = GRAPH.full.copy()
    half[-1] = False
    assert jaccard(half, half) == jaccard(GRAPH.empty(), GRAPH.empty()) == 1
    assert jaccard(half, GRAPH.full) == half.sum() / GRAPH.num_edges
    assert mean_jaccard([half, half, GRAPH.full]) == pytest.approx((1 + 2 * half.sum() / GRAPH.num_edges) / 3)


def test_agreement_is_between_searches_that_differ_in_one_respect() -> None:
    half = GRAPH.full.copy()
    half[-1] = False
    found = {
        Setting(0, "a", 0.1): GRAPH.full,
        Setting(0, "a", 0.2): half,
        Setting(0, "a", 0.3): GRAPH.empty(),
        Setting(1, "a", 0.1): GRAPH.full,
        Setting(1, "a", 0.2): half,
        Setting(1, "a", 0.3): GRAPH.full,
    }
    share = half.sum() / GRAPH.num_edges
    agreement = Stability(GRAPH, found).agreement()
    assert agreement == {"bootstrap": pytest.approx(2 / 3), "order": None, "threshold": pytest.approx(share * 3 / 4)}


def test_heads_are_by_layer() -> None:
    present = GRAPH.empty()
    present[-1, GRAPH.head(1, 0)] = present[-1, GRAPH.mlp(0)] = True
    assert Stability(GRAPH, {Setting(0, "a", 0.1): present}).heads.tolist() == [[0, 0], [1, 0]]


def test_frequencies_are_shares_and_a_second_call_runs_no_test(load_exact, make_pairs, tmp_path, monkeypatch) -> None:
    model = slice_model(load_exact("llama", 1))
    configs = [ACDCConfig(1.0), ACDCConfig(1.0, ParentOrder.RANDOM, seed=3)]
    arguments = (model, model.graph(), make_pairs(), "kl", configs, [0.05, 0.01], 2, tmp_path)
    first = measure_stability(*arguments)
    content = json.loads((tmp_path / "stability.json").read_text())
    assert len(first.circuits) == len(list(tmp_path.glob("bootstrap*.json"))) == 8
    assert 0 < content["mean_jaccard"] <= 1
    assert all(0 < share <= 1 for kind in ("nodes", "edges") for share in content[kind].values())
    assert first.edges.max() > 0
    lost = next(tmp_path.glob("bootstrap1-*-0.05.json"))
    lost.unlink()
    assert measure_stability(*arguments).to_json() == content
    assert lost.exists()
    monkeypatch.setattr(acdc.Search, "decide_next", lambda _: pytest.fail("a search ran again"))
    again = measure_stability(*arguments)
    assert again.to_json() == content
