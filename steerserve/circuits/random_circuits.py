"""Circuits drawn at random, to measure a found one against."""

from __future__ import annotations

import numpy as np

from steerserve.circuits.agreement import reached
from steerserve.circuits.graph import Graph, Liveness, Present
from steerserve.errors import InvalidRequestError

MAX_RESTARTS = 20
MAX_MISFITS = 1000
"""Drawn ways in a row that have more edges than are left, after which the circuit is begun again."""


def random_circuit(graph: Graph, num_edges: int, generator: np.random.Generator) -> Present:
    """So many edges, drawn from all alike. Few of them are connected."""
    present = graph.empty()
    receivers, sources = np.nonzero(graph.full)
    chosen = generator.choice(len(receivers), num_edges, replace=False)
    present[receivers[chosen], sources[chosen]] = True
    return present


def random_connected_circuit(graph: Graph, num_edges: int, generator: np.random.Generator) -> Present:
    """So many edges, each on a path of them from the embedding to the logits.

    Edges are drawn from all alike, and each with a random way to it from the circuit so far, or from the embedding, and
    another one on from it, or to the logits.

    Raises:
        InvalidRequestError: no circuit of this size turned up: the graph has none, or hardly any.
    """
    for _ in range(MAX_RESTARTS if 0 <= num_edges <= graph.num_edges else 0):
        present, misfits = graph.empty(), 0
        while (left := num_edges - int(present.sum())) and misfits < MAX_MISFITS:
            added = _way(graph, present, generator) & ~present
            if added.sum() <= left:
                present |= added
                misfits = 0
            else:
                misfits += 1
        if not left:
            return present
    raise InvalidRequestError("num_edges", num_edges, "a size that connected circuits of this graph have")


def _way(graph: Graph, present: Present, generator: np.random.Generator) -> Present:
    """An edge that is not there, with a way that leads to it and one that leads on."""
    known, live = reached(graph, present), Liveness.of(graph, present).receivers
    absent = np.argwhere(graph.full & ~present)
    reader, source = absent[generator.integers(len(absent))]
    way = graph.empty()
    way[reader, source] = True
    while not known[source]:
        into = generator.choice(graph.readers[source])
        source = generator.integers(graph.receivers[into].num_parents)
        way[into, source] = True
    while not live[reader]:
        fed = generator.choice(graph.receivers[reader].feeds)
        reader = generator.choice(np.flatnonzero(graph.full[:, fed]))
        way[reader, fed] = True
    return way
