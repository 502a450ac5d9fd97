"""How much of a behaviour a circuit carries, on prompts that it was not found on.

With m(C) the metric of circuit C, M the whole model and ∅ no edge:

faithfulness    f(C) = (m(∅) − m(C)) / (m(∅) − m(M)): 1 as the model, 0 as with everything ablated
knock-out       m(M ∖ C), the model without the circuit
completeness    |m(C ∖ K) − m(M ∖ K)| over parts K of the circuit: whether what is left behaves like the model without
                the same part
CPR, CMD        area under f and under |1 − f| over circuits of growing size (MIB)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steerserve.circuits.ablation import Baseline
from steerserve.circuits.graph import Graph, Present
from steerserve.circuits.metrics import Metric
from steerserve.circuits.propagation import run_circuit
from steerserve.circuits.random_circuits import random_circuit, random_connected_circuit
from steerserve.circuits.trials import values
from steerserve.errors import InvalidRequestError

BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges, as MIB has them."""


def metric_of(graph: Graph, baseline: Baseline, metric: Metric, present: Present) -> float:
    """The metric of a circuit."""
    _, logits = run_circuit(graph, baseline, present)
    return values(metric, logits[None])[0]


@dataclass(frozen=True)
class Faithfulness:
    """Metrics of a circuit C, and of what it is measured against.

    Attributes:
        circuit, knock_out: of C, and of the model without it.
        model, nothing: of the whole model, and with every edge ablated.
        random, random_connected: of random circuits with as many edges as C. Of the former hardly an edge leads to the
            logits, so that only the latter are a control worth the name.
    """

    circuit: float
    knock_out: float
    model: float
    nothing: float
    random: tuple[float, ...]
    random_connected: tuple[float, ...]

    @property
    def faithfulness(self) -> float:
        """1 as the model, 0 as with every edge ablated; NaN where these two do not differ."""
        return normalised(self.circuit, self.model, self.nothing)


def normalised(value: float, model: float, nothing: float) -> float:
    """The share of the way from ``nothing`` to ``model``."""
    return (nothing - value) / (nothing - model) if nothing != model else float("nan")


def faithfulness(
    graph: Graph, baseline: Baseline, metric: Metric, present: Present, num_random: int = 10, seed: int = 0
) -> Faithfulness:
    """Measure a circuit on the baseline's prompts, with ``num_random`` controls of either kind."""
    generator, num_edges = np.random.default_rng(seed), int(present.sum())
    random, random_connected = (
        tuple(metric_of(graph, baseline, metric, draw(graph, num_edges, generator)) for _ in range(num_random))
        for draw in (random_circuit, random_connected_circuit)
    )
    circuit, knock_out, nothing = (
        metric_of(graph, baseline, metric, each) for each in (present, graph.full & ~present, graph.empty())
    )
    model = values(metric, baseline.clean_logits[None])[0]
    return Faithfulness(circuit, knock_out, model, nothing, random, random_connected)


@dataclass(frozen=True)
class Incompleteness:
    """One part K of a circuit C: the metrics of C ∖ K and M ∖ K, and the size of K."""

    num_edges: int
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        return abs(self.circuit - self.model)


def completeness(
    graph: Graph, baseline: Baseline, metric: Metric, present: Present, num_parts: int = 10, seed: int = 0
) -> list[Incompleteness]:
    """Compare C ∖ K with M ∖ K for random parts K of the circuit, of every size.

    Raises:
        InvalidRequestError: the circuit has no edge.
    """
    if not present.any():
        raise InvalidRequestError("circuit", 0, "at least one edge")
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(num_parts):
        part = present & (generator.random(present.shape) < generator.random())
        circuit, model = (metric_of(graph, baseline, metric, of & ~part) for of in (present, graph.full))
        found.append(Incompleteness(int(part.sum()), circuit, model))
    return found


@dataclass(frozen=True)
class Curve:
    """Circuits of growing size.

    Attributes:
        shares: of all edges.
        values: metrics.
        faithfulness: f of each.
        cpr, cmd: areas under f and |1 − f| over ``shares``, by trapezoids.
    """

    shares: tuple[float, ...]
    values: tuple[float, ...]
    faithfulness: tuple[float, ...]
    cpr: float
    cmd: float


def curve(
    graph: Graph,
    baseline: Baseline,
    metric: Metric,
    scores: NDArray[np.float64],
    budgets: Sequence[float] = BUDGETS,
) -> Curve:
    """Keep the edges with the highest scores, more and more of them.

    Args:
        scores: ``[receivers, sources]``; higher is kept first.
    """
    receivers, sources = np.nonzero(graph.full)
    ranked = np.argsort(-scores[receivers, sources], kind="stable")
    measured = []
    for budget in budgets:
        present = graph.empty()
        chosen = ranked[: round(budget * len(ranked))]
        present[receivers[chosen], sources[chosen]] = True
        measured.append(metric_of(graph, baseline, metric, present))
    model = values(metric, baseline.clean_logits[None])[0]
    nothing = metric_of(graph, baseline, metric, graph.empty())
    f = [normalised(value, model, nothing) for value in measured]
    cpr, cmd = (float(np.trapezoid(y, budgets)) for y in (f, np.abs(1 - np.array(f))))
    return Curve(tuple(budgets), tuple(measured), tuple(f), cpr, cmd)
