"""Tests of one receiver's edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from steerserve.circuits.circuit import Circuit
from steerserve.circuits.discovery import Counts
from steerserve.circuits.graph import descendants
from steerserve.circuits.metrics import Metric
from steerserve.circuits.propagation import Propagation
from steerserve.circuits.removal import Removal
from steerserve.circuits.work import Work
from steerserve.errors import InvalidRequestError


class Trials:
    """Runs of a circuit with fewer and fewer edges into one live receiver.

    Attributes:
        work: of one row.
    """

    def __init__(self, circuit: Circuit, receiver: int, metric: Metric, counts: Counts) -> None:
        self._circuit = circuit
        self._receiver = receiver
        self._metric = metric
        self._counts = counts
        self._changed = descendants(circuit.graph, circuit.present, [receiver], circuit.live)
        self._removal = Removal(circuit, receiver)
        self._fast = Propagation(circuit, self._changed)
        self._exact = Propagation(circuit, self._changed, fold=False)
        self.work = Work.of(circuit, self._changed)

    def without(self, sources: Sequence[int]) -> list[float]:
        """Metrics without the first, the first two, ... of ``sources``, as one batch."""
        _, logits = self._fast.run({self._receiver: self._removal.inputs(sources)}, len(sources))
        self._count(len(sources))
        return values(self._metric, logits)

    def remove(self, sources: Sequence[int]) -> None:
        """Take these edges away for good."""
        self._removal.remove(sources)

    def effect_again(self, removed: Sequence[int], source: int) -> float:
        """What one edge's removal after others' adds to the metric, at the batch shape of the circuit itself."""
        inputs = (self._removal.canonical(without) for without in ([*removed, source], removed))
        reduced, current = (values(self._metric, self._exact.run({self._receiver: x})[1])[0] for x in inputs)
        self._count(2)
        return reduced - current

    def settle(self) -> tuple[Circuit, float]:
        """The circuit without the removed edges, and its metric."""
        deltas, logits = self._exact.run({self._receiver: self._removal.canonical()})
        self._count(1)
        present = self._circuit.present.copy()
        present[self._receiver] = self._removal.kept
        circuit = replace(self._circuit, present=present, deltas={**self._circuit.deltas, **deltas})
        return circuit, values(self._metric, logits)[0]

    def _count(self, num_rows: int) -> None:
        self._counts.sequence_layers += num_rows * self.work.sequence_layers
        self._counts.sequence_layers_touched += num_rows * self.work.touched


def values(metric: Metric, logits: Tensor) -> list[float]:
    """The metric of every row of ``logits`` ``[rows, N, V]``.

    Raises:
        InvalidRequestError: it is not finite.
    """
    result = metric(logits)
    if not result.isfinite().all():
        raise InvalidRequestError("metric", metric.name, "a finite value on these prompts")
    return [float(value) for value in result]
