"""How a search runs: its batches, its breaks, its noise, and what it writes down."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.circuits import acdc
from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.acdc import discover, sweep
from steerserve.circuits.discovery import Discovery
from steerserve.circuits.faithfulness import metric_of
from steerserve.circuits.graph import Graph, Liveness
from steerserve.circuits.metrics import Metric, kl
from steerserve.circuits.settings import ACDCConfig, ParentOrder
from steerserve.circuits.slicing import slice_model
from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.models.loading import load_model


@pytest.fixture
def llama(load_exact, make_pairs):
    """Graph, baseline and metric of a search."""
    model = slice_model(load_exact("llama", 3))
    baseline = Baseline(model, make_pairs(), Ablation.CORRUPTED)
    return model.graph(), baseline, kl(baseline.clean_logits)


@pytest.fixture
def tau(llama) -> float:
    """Keeps about a tenth of the edges."""
    return float(np.quantile([each.effect for each in discover(*llama, ACDCConfig(1e-9)).decisions], 0.9))


@pytest.mark.parametrize(
    ("graph", "num_edges"),
    [
        (Graph(12, 12, 12), 32_491),  # GPT-2 small, as published
        (Graph(12, 12, 12, split=False), 11_611),
        (Graph(30, 9, 3), 70_651),
        (Graph(30, 9, 3, kv="expanded"), 123_211),
        (Graph(30, 9, 3, split=False), 18_091),
        (Graph(30, 9, 3, split=False, kv="expanded"), 44_371),
        (Graph(2, 2, 2, parallel=True), 3 * 2 * (1 + 4) + (1 + 4) + 7),
    ],
)
def test_numbers_of_edges(graph, num_edges) -> None:
    assert graph.num_edges == num_edges == graph.full.sum() == len(list(graph.edges))


def test_no_edge_joins_a_head_to_the_mlp_beside_it() -> None:
    names = {graph.edge_name(*edge) for graph in [Graph(2, 2, 2, parallel=True)] for edge in graph.edges}
    assert "a0.h1->m0" not in names
    assert {"a0.h1->m1", "m0->m1", "input->a1.h0<k>", "m1->logits"} <= names


@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 7}, {"max_bytes": 1}])
def test_the_size_of_batches_changes_no_decision(llama, tau, limits) -> None:
    expected = discover(*llama, ACDCConfig(tau))
    found = discover(*llama, ACDCConfig(tau, **limits))
    np.testing.assert_array_equal(found.present, expected.present)
    assert expected.counts.void > 0
    assert found.counts.void == 0 or "max_rows" in limits


def test_what_is_counted(llama, tau) -> None:
    graph, baseline, _ = llama
    found = discover(*llama, ACDCConfig(tau))
    tests = [each.test for each in found.decisions if each.test is not None]
    counts = found.counts
    assert tests == list(range(counts.tested))
    assert counts.rows == counts.tested + counts.void
    assert counts.sequence_layers_naive == counts.tested * baseline.num_prompts * graph.n_layers
    assert counts.sequence_layers_every_edge == graph.num_edges * baseline.num_prompts * graph.n_layers
    assert 0 < counts.sequence_layers < counts.sequence_layers_touched < counts.sequence_layers_naive


def test_untested_are_the_edges_without_a_path_to_the_logits(llama, tau) -> None:
    found = discover(*llama, ACDCConfig(tau))
    live = Liveness.of(found.graph, found.present)
    untested = {each.receiver for each in found.decisions if each.test is None}
    assert untested == set(np.flatnonzero(~live.receivers))
    assert untested
    assert not any(each.kept or each.effect for each in found.decisions if each.test is None)


def test_effects_add_up_to_the_metric_of_the_circuit(llama, tau) -> None:
    graph, baseline, metric = llama
    found = discover(*llama, ACDCConfig(tau))
    removed = sum(each.effect for each in found.decisions if not each.kept)
    assert removed == pytest.approx(found.value, rel=1e-9)
    assert metric_of(graph, baseline, metric, found.present) == pytest.approx(found.value, rel=1e-9)


@pytest.mark.parametrize("stop_after", [1, 9, 25])
def test_a_search_that_was_interrupted_ends_the_same(llama, tau, tmp_path, monkeypatch, stop_after) -> None:
    monkeypatch.setattr(acdc, "SAVE_EVERY_S", 0.0)
    expected = discover(*llama, ACDCConfig(tau))
    reports = 0

    def interrupt(_: Discovery) -> None:
        nonlocal reports
        reports += 1
        if reports > stop_after:
            raise KeyboardInterrupt

    path = tmp_path / "circuit.json"
    with pytest.raises(KeyboardInterrupt):
        discover(*llama, ACDCConfig(tau), path, interrupt)
    resumed = discover(*llama, ACDCConfig(tau), path)
    assert resumed.decisions == expected.decisions
    assert resumed.value == expected.value
    assert replace(resumed.counts, seconds=0) == replace(expected.counts, seconds=0)
    assert Discovery.load(path, llama[0]).decisions == expected.decisions
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_of_another_search_is_refused(llama, tau, tmp_path) -> None:
    path = tmp_path / "circuit.json"
    discover(*llama, ACDCConfig(tau), path)
    with pytest.raises(IncompatibleError, match="threshold"):
        discover(*llama, ACDCConfig(2 * tau), path)
    path.write_text("{}")
    with pytest.raises(AssetError, match="holds no circuit"):
        discover(*llama, ACDCConfig(tau), path)


def test_a_sweep_finds_what_each_search_finds(llama, tau) -> None:
    thresholds = [2 * tau, tau / 10, tau, 1.01 * tau]
    found = sweep(*llama, ACDCConfig(1.0), thresholds)
    alone = [discover(*llama, ACDCConfig(threshold)) for threshold in sorted(thresholds)]
    for each, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(each.present, expected.present)
        assert each.cfg == expected.cfg
        assert [d.test for d in each.decisions] == [d.test for d in expected.decisions]
    assert sum(each.counts.tested for each in found) < sum(each.counts.tested for each in alone)


def test_effects_near_the_threshold_are_taken_at_one_batch_shape(tiny_model_dir, make_pairs) -> None:
    """A threshold that is itself an effect: batches of any size decide as one row at a time does."""
    model = slice_model(load_model(str(tiny_model_dir("llama")), torch.float32))
    baseline = Baseline(model, make_pairs(), Ablation.CORRUPTED)
    search = model.graph(), baseline, kl(baseline.clean_logits)
    effects = [each.effect for each in discover(*search, ACDCConfig(1e9)).decisions if each.test is not None]
    batched, single = (discover(*search, ACDCConfig(max(effects), max_rows=rows)) for rows in (32, 1))
    assert batched.counts.retested > 0
    assert 0 < batched.counts.noise < 1e-4
    np.testing.assert_array_equal(batched.present, single.present)
    (again,) = (each for each in batched.decisions if each.test == effects.index(max(effects)))
    assert again in single.decisions


def test_the_file_is_in_the_form_of_eap_ig(llama, tau, tmp_path) -> None:
    path = tmp_path / "circuit.json"
    found = discover(*llama, ACDCConfig(tau, ParentOrder.RANDOM, seed=5), path)
    content = json.loads(path.read_text())
    assert content.keys() == {"cfg", "nodes", "edges", "complete", "value", "counts"}
    assert content["cfg"] | {"threshold": tau, "order": "random", "seed": 5, "metric": "kl"} == content["cfg"]
    assert content["nodes"]["logits"] == {"in_graph": True}
    assert len(content["edges"]) == found.graph.num_edges
    assert sum(edge["in_graph"] for edge in content["edges"].values()) == found.num_kept
    assert content["edges"]["m2->logits"].keys() == {"score", "in_graph", "test"}
    assert content["complete"]


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_thresholds_that_are_refused(threshold) -> None:
    with pytest.raises(InvalidRequestError, match="threshold"):
        ACDCConfig(threshold)


def test_a_metric_that_is_not_finite_is_refused(llama) -> None:
    graph, baseline, _ = llama
    broken = Metric("broken", "", lambda logits: logits[..., 0].double() * torch.nan)
    with pytest.raises(InvalidRequestError, match="finite"):
        discover(graph, baseline, broken, ACDCConfig(1.0))
