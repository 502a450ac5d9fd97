"""How far circuits, and scores of edges, agree with each other.

Scores are ``[receivers, sources]`` and only count where the graph has an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from steerserve.circuits.graph import Graph, Liveness, Present
from steerserve.errors import InvalidRequestError

Scores = NDArray[np.float64]


def connected(graph: Graph, present: Present) -> Present:
    """The edges that lie on a path of kept edges from the embedding to the logits."""
    return present & reached(graph, present) & Liveness.of(graph, present).receivers[:, None]


def reached(graph: Graph, present: Present) -> NDArray[np.bool_]:
    """``[sources]``: a path of kept edges leads there from the embedding."""
    found = np.zeros(len(graph.sources), bool)
    found[0] = True
    for source in range(1, len(graph.sources)):
        found[source] = (present[list(graph.readers[source])] & found).any()
    return found


def top_edges(graph: Graph, scores: Scores, count: int) -> Present:
    """The ``count`` edges with the largest scores; of equal ones, the first.

    Raises:
        InvalidRequestError: there are not so many.
    """
    if not 0 <= count <= graph.num_edges:
        raise InvalidRequestError("count", count, f"0 to {graph.num_edges}")
    receivers, sources = np.nonzero(graph.full)
    chosen = np.argsort(-scores[receivers, sources], kind="stable")[:count]
    present = graph.empty()
    present[receivers[chosen], sources[chosen]] = True
    return present


def auroc(graph: Graph, scores: Scores, truth: Present) -> float:
    """The chance that an edge of the circuit ``truth`` scores higher than another edge; equal scores count half.

    Raises:
        InvalidRequestError: the circuit has no edge, or all.
    """
    values, inside = scores[graph.full], truth[graph.full]
    num_inside, num_outside = int(inside.sum()), int((~inside).sum())
    if not num_inside or not num_outside:
        raise InvalidRequestError("truth", num_inside, f"1 to {graph.num_edges - 1} edges")
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[index]
    return float((ranks[inside].sum() - num_inside * (num_inside + 1) / 2) / (num_inside * num_outside))


def overlap(graph: Graph, scores: Scores, truth: Present) -> float:
    """The share of the circuit's edges among as many of the highest scores; 1 for an empty circuit."""
    count = int(truth.sum())
    return float((top_edges(graph, scores, count) & truth).sum() / count) if count else 1.0


def jaccard(one: Present, other: Present) -> float:
    """Edges in both over edges in either; 1 for two empty circuits."""
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else 1.0


def mean_jaccard(circuits: Sequence[Present]) -> float:
    """Over all pairs of circuits; NaN for fewer than two."""
    each = [jaccard(*pair) for pair in combinations(circuits, 2)]
    return float(np.mean(each)) if each else float("nan")
