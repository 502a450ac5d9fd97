"""The search decides as one full pass per edge does, for every family, order, ablation and kind of graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from acdc_oracle import NaiveModel, naive_acdc

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.acdc import discover
from steerserve.circuits.metrics import kl
from steerserve.circuits.settings import ACDCConfig, ParentOrder
from steerserve.circuits.slicing import slice_model
from steerserve.models.families import FAMILIES

ONE = torch.ones((), dtype=torch.float64)


def by_name(found) -> dict[tuple[str, str], tuple[bool, float]]:
    graph = found.graph
    return {
        (graph.sources[each.source].name, graph.receivers[each.receiver].name): (each.kept, each.effect)
        for each in found.decisions
    }


def assert_same(found, expected) -> None:
    ours = by_name(found)
    assert ours.keys() == expected.keys()
    assert {edge for edge in ours if ours[edge][0]} == {edge for edge in expected if expected[edge][0]}
    np.testing.assert_allclose([ours[e][1] for e in expected], [expected[e][1] for e in expected], rtol=1e-6, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("ablation", list(Ablation))
@pytest.mark.parametrize(
    ("split", "kv", "order"),
    [(True, "grouped", "later_first"), (False, "expanded", "earlier_first"), (False, "grouped", "random")],
)
def test_the_edges_are_those_of_the_naive_search(family, ablation, split, kv, order, load_exact, make_pairs) -> None:
    model, pairs = slice_model(load_exact(family)), make_pairs()
    baseline, graph = Baseline(model, pairs, ablation), model.graph(split, kv)
    metric = kl(baseline.clean_logits)
    naive = NaiveModel(model, split, kv)
    config = ACDCConfig(1e-12, ParentOrder(order), seed=3)
    names = {receiver.name: i for i, receiver in enumerate(graph.receivers)}

    def in_order(receiver: str, parents: list[str]) -> list[str]:
        return [parents[i] for i in config.parents(graph, names[receiver])]

    effects = [each.effect for each in discover(graph, baseline, metric, config).decisions]
    shares = []
    for tau in np.quantile(effects, [0.5, 0.8]):
        expected = naive_acdc(naive, pairs, ablation is Ablation.ZERO, metric, tau, in_order)
        found = discover(graph, baseline, metric, ACDCConfig(tau, ParentOrder(order), seed=3))
        assert_same(found, expected)
        shares.append(found.num_kept / graph.num_edges)
    assert 0.7 > shares[0] > shares[-1] > 0.02
