"""EAP against finite differences of the model with one edge turned down by a little."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steerserve.circuits.ablation import Ablation, Baseline, record
from steerserve.circuits.agreement import connected
from steerserve.circuits.circuit import Circuit
from steerserve.circuits.edge_attribution import attribute_edges
from steerserve.circuits.faithfulness import curve, metric_of
from steerserve.circuits.graph import descendants
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.propagation import Propagation
from steerserve.circuits.slicing import slice_model
from steerserve.errors import InvalidRequestError

FRACTION = 1e-5


@torch.no_grad()
def partly_removed(circuit: Circuit, receiver: int, source: int, fraction: float) -> torch.Tensor:
    """Logits ``[N, V]`` of the whole model, one edge weakened."""
    graph = circuit.graph
    deltas = {**circuit.deltas, source: circuit.deltas[source] * (1 - fraction)}
    x = circuit.mix(receiver, circuit.base(receiver), circuit.parents(receiver), deltas)
    changed = descendants(graph, circuit.present, [receiver], circuit.live)
    return Propagation(circuit, changed, fold=False).run({receiver: x})[1][0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3_text", "qwen3", "gpt_neox"])
def test_eap_is_the_slope_of_weakening_each_edge(family, load_exact, make_pairs) -> None:
    model, pairs = slice_model(load_exact(family)), make_pairs()
    graph, baseline = model.graph(), Baseline(model, pairs, Ablation.CORRUPTED)
    metric = METRICS["logit_difference"](pairs, baseline.clean_logits)
    circuit = Circuit.whole(graph, baseline)
    scores = attribute_edges(model, graph, pairs, "logit_difference").scores
    assert np.abs(scores[graph.full]).max() > 1e-3
    edges = list(graph.edges)
    for index in np.random.default_rng(0).choice(len(edges), 40, replace=False):
        up, down = (
            float(metric(partly_removed(circuit, *edges[index], fraction))) for fraction in (FRACTION, -FRACTION)
        )
        assert scores[edges[index]] == pytest.approx((up - down) / (2 * FRACTION), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize(("split", "kv"), [(False, "grouped"), (True, "expanded")])
def test_receivers_that_are_merged_have_the_sum_of_the_scores(split, kv, load_exact, make_pairs) -> None:
    model, pairs = slice_model(load_exact("llama")), make_pairs()
    finest = attribute_edges(model, model.graph(), pairs, "log_odds").scores
    other = attribute_edges(model, model.graph(split, kv), pairs, "log_odds").scores
    np.testing.assert_allclose(finest.sum(0), other.sum(0), atol=1e-12)


def test_batches_and_memory_do_not_change_the_scores(load_exact, make_pairs) -> None:
    model, pairs = slice_model(load_exact("llama")), make_pairs()
    together, apart = (
        attribute_edges(model, model.graph(), pairs, "kl", 3, max_bytes).scores for max_bytes in (2**30, 1)
    )
    np.testing.assert_allclose(together, apart, atol=1e-12)


def test_eap_ig_is_the_mean_over_steps_of_the_slope_at_the_embedding(load_exact, make_pairs) -> None:
    """Every receiver reads the embedding: all of its edges together have the whole model's slope there."""
    model, pairs = slice_model(load_exact("llama", 1)), make_pairs()
    graph, steps = model.graph(), 4
    scores = attribute_edges(model, graph, pairs, "logit_difference", steps).scores
    clean, corrupted = (record(model, tokens) for tokens in (pairs.clean, pairs.corrupted))
    change, start = corrupted.outputs[0] - clean.outputs[0], corrupted.outputs[0]
    expected = 0.0
    for k in range(1, steps + 1):
        x = (start - k / steps * change).detach().requires_grad_()
        total = METRICS["logit_difference"](pairs, torch.empty(0))(_logits(model, x, pairs))
        (slope,) = torch.autograd.grad(total, x)
        expected += float((slope * change).detach().sum()) / steps
    assert scores[:, 0].sum() == pytest.approx(expected, abs=1e-9)


def _logits(model, x, pairs):
    """``[N, V]`` from given embeddings, by the recorder."""

    class FromEmbedding:
        def __getattr__(self, name):
            return getattr(model, name)

        def embed(self, _):
            return x[0]

    run = record(FromEmbedding(), pairs.clean)
    return model.logits(run.residuals[-1][0, torch.arange(len(pairs)), pairs.last])


def test_at_the_logits_eap_is_exact_where_the_model_is_linear(load_exact, make_pairs) -> None:
    """Without the last norm the logit difference is linear in what the logits read."""
    model, pairs = slice_model(load_exact("gpt2")), make_pairs()
    object.__setattr__(model, "final_norm", lambda x: x)
    graph, baseline = model.graph(), Baseline(model, pairs, Ablation.CORRUPTED)
    metric = METRICS["logit_difference"](pairs, baseline.clean_logits)
    scores = attribute_edges(model, graph, pairs, "logit_difference").scores
    whole = metric_of(graph, baseline, metric, graph.full)
    for source in range(len(graph.sources)):
        present = graph.full.copy()
        present[-1, source] = False
        assert scores[-1, source] == pytest.approx(metric_of(graph, baseline, metric, present) - whole, abs=1e-10)


def test_scores_make_circuits_curves_and_files(load_exact, make_pairs) -> None:
    model, pairs = slice_model(load_exact("llama")), make_pairs()
    graph, baseline = model.graph(), Baseline(model, pairs, Ablation.CORRUPTED)
    found = attribute_edges(model, graph, pairs, "kl", 5)
    present = found.circuit(60)
    assert 0 < present.sum() <= 60
    assert (connected(graph, present) == present).all()
    content = found.to_json(present)
    assert content["cfg"]["approximate"]
    assert len(content["edges"]) == graph.num_edges
    assert sum(edge["in_graph"] for edge in content["edges"].values()) == present.sum()
    measured = curve(graph, baseline, METRICS["kl"](pairs, baseline.clean_logits), found.scores)
    assert measured.faithfulness[-1] == pytest.approx(1)


@pytest.mark.parametrize(("metric", "steps"), [("kl", 1), ("loss", 2), ("log_odds", 0)])
def test_what_has_no_slope_is_refused(metric, steps, load_exact, make_pairs) -> None:
    model = slice_model(load_exact("gpt2"))
    with pytest.raises(InvalidRequestError, match=r"metric|steps"):
        attribute_edges(model, model.graph(), make_pairs(), metric, steps)
