"""Circuits at the two ends have known figures; those between are compared with runs."""

from __future__ import annotations

import numpy as np
import pytest

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.acdc import discover
from steerserve.circuits.agreement import connected
from steerserve.circuits.faithfulness import BUDGETS, completeness, curve, faithfulness, metric_of
from steerserve.circuits.graph import Graph
from steerserve.circuits.metrics import kl
from steerserve.circuits.random_circuits import random_circuit, random_connected_circuit
from steerserve.circuits.settings import ACDCConfig
from steerserve.circuits.slicing import slice_model
from steerserve.errors import InvalidRequestError


@pytest.fixture
def held_out(load_exact, make_pairs):
    """Graph, baseline and metric on prompts of another seed."""
    model = slice_model(load_exact("llama"))
    baseline = Baseline(model, make_pairs(seed=7), Ablation.CORRUPTED)
    return model.graph(), baseline, kl(baseline.clean_logits)


def test_the_whole_model_and_nothing(held_out) -> None:
    graph = held_out[0]
    whole = faithfulness(*held_out, graph.full, num_random=2)
    nothing = faithfulness(*held_out, graph.empty(), num_random=0)
    assert whole.circuit == pytest.approx(whole.model, abs=1e-12)
    assert whole.knock_out == whole.nothing == nothing.circuit > 0.1
    assert whole.random == (whole.circuit, whole.circuit)
    assert whole.faithfulness == pytest.approx(1)
    assert nothing.faithfulness == 0
    assert nothing.knock_out == pytest.approx(whole.model, abs=1e-12)


def test_a_found_circuit_beats_random_ones_of_its_size(held_out, make_pairs) -> None:
    graph, baseline, _ = held_out
    search = Baseline(baseline.model, make_pairs(), Ablation.CORRUPTED)
    found = discover(graph, search, kl(search.clean_logits), ACDCConfig(0.05))
    measured = faithfulness(*held_out, found.present, num_random=5)
    assert measured.circuit < min(measured.random + measured.random_connected)
    assert len(measured.random_connected) == 5
    assert measured.knock_out > measured.model


def test_random_circuits_have_the_size_asked_for(held_out) -> None:
    graph = held_out[0]
    present = random_circuit(graph, 17, np.random.default_rng(0))
    assert present.sum() == 17
    assert not (present & ~graph.full).any()


@pytest.mark.parametrize(("split", "kv"), [(True, "grouped"), (False, "expanded")])
@pytest.mark.parametrize("num_edges", [0, 1, 2, 17, 60])
def test_random_connected_circuits_have_the_size_and_no_loose_end(split, kv, num_edges) -> None:
    graph = Graph(3, 4, 2, split=split, kv=kv)
    drawn = [random_connected_circuit(graph, num_edges, np.random.default_rng(seed)) for seed in range(5)]
    for present in drawn:
        assert present.sum() == num_edges
        assert not (present & ~graph.full).any()
        assert (connected(graph, present) == present).all()
    assert num_edges < 17 or len({present.tobytes() for present in drawn}) == 5


def test_a_size_that_no_connected_circuit_has_is_refused() -> None:
    graph = Graph(1, 1, 1, split=False)
    with pytest.raises(InvalidRequestError, match="num_edges: got 99"):
        random_connected_circuit(graph, 99, np.random.default_rng(0))


def test_the_whole_model_is_complete(held_out) -> None:
    gaps = completeness(*held_out, held_out[0].full, num_parts=4)
    assert len({part.num_edges for part in gaps}) == 4
    assert all(part.gap == 0 for part in gaps)
    assert max(part.model for part in gaps) > 0.01
    with pytest.raises(InvalidRequestError, match="edge"):
        completeness(*held_out, held_out[0].empty())


def test_a_curve_keeps_the_highest_scores_first(held_out) -> None:
    graph = held_out[0]
    scores = np.random.default_rng(0).random(graph.full.shape)
    found = curve(*held_out, scores)
    assert found.shares == BUDGETS
    assert found.faithfulness[-1] == pytest.approx(1)
    cut = np.sort(scores[graph.full])[-round(0.2 * graph.num_edges)]
    assert found.values[BUDGETS.index(0.2)] == metric_of(*held_out, graph.full & (scores >= cut))
    heights = np.array(found.faithfulness)
    widths = np.diff(BUDGETS)
    assert found.cpr == pytest.approx((widths * (heights[1:] + heights[:-1]) / 2).sum())
    gaps = abs(1 - heights)
    assert found.cmd == pytest.approx((widths * (gaps[1:] + gaps[:-1]) / 2).sum())
