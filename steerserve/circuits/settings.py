"""Settings of a search for a circuit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from steerserve.circuits.graph import Graph
from steerserve.errors import InvalidRequestError


class ParentOrder(StrEnum):
    """In which order a receiver's parents are tested. The circuit that is found depends on it."""

    LATER_FIRST = "later_first"
    """Later layers first, an MLP before the heads of its layer, higher heads first."""
    EARLIER_FIRST = "earlier_first"
    RANDOM = "random"


@dataclass(frozen=True)
class ACDCConfig:
    """Settings of a search.

    Attributes:
        threshold: τ; an edge stays if its removal adds at least this much to the metric. Above 0.
        seed: of the random order.
        max_rows: tests that are run at once at most.
        max_bytes: memory for a batch of tests, about.
    """

    threshold: float
    order: ParentOrder = ParentOrder.LATER_FIRST
    seed: int = 0
    max_rows: int = 32
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise InvalidRequestError("threshold", self.threshold, "a finite number above 0")
        for name in ("max_rows", "max_bytes"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(name, getattr(self, name), "at least 1")

    def parents(self, graph: Graph, receiver: int) -> list[int]:
        """Sources in the order in which their edges to the receiver are tested."""
        parents = np.arange(graph.receivers[receiver].num_parents)
        match self.order:
            case ParentOrder.LATER_FIRST:
                parents = parents[::-1]
            case ParentOrder.RANDOM:
                parents = np.random.default_rng([self.seed, receiver]).permutation(parents)
        return [int(source) for source in parents]
