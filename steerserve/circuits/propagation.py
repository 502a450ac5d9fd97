"""Recompute the nodes of a circuit that a change reaches, for many changes at once.

A run takes new inputs of some receivers, one row per change, and recomputes the live sources downstream of them. The
others keep their deltas; keys, queries and values that no change reaches are computed once.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerserve.circuits.ablation import Baseline
from steerserve.circuits.circuit import Circuit
from steerserve.circuits.graph import Graph, Liveness, Part, Present


@torch.no_grad()
def run_circuit(graph: Graph, baseline: Baseline, present: Present) -> tuple[Circuit, Tensor]:
    """Run a circuit from its embedding on, and its logits ``[N, V]``."""
    live = Liveness.of(graph, present)
    circuit = Circuit(graph, baseline, present, live, {0: baseline.clean[0]})
    changed = live.sources & (np.arange(len(graph.sources)) > 0)
    deltas, logits = Propagation(circuit, changed, fold=False).run({})
    return replace(circuit, deltas={**circuit.deltas, **deltas}), logits[0]


class Propagation:
    """Runs of a circuit in which the deltas of some sources vary."""

    def __init__(self, circuit: Circuit, changed: NDArray[np.bool_], fold: bool = True) -> None:
        """Prepare.

        Args:
            changed: ``[sources]``, live ones only.
            fold: sum once what no change reaches. Else every sum runs over all parents in their order each time, so
                that its rounding depends on the circuit alone.
        """
        self.circuit = circuit
        self.changed = [int(source) for source in np.flatnonzero(changed)]
        reached = (circuit.present & changed).any(1) & circuit.live.receivers
        self.moving = {int(i): self._split(int(i), changed, fold) for i in np.flatnonzero(reached)}
        self.still: dict[tuple[int, Part], Tensor] = {}

    def run(self, given: Mapping[int, Tensor], num_rows: int = 1) -> tuple[dict[int, Tensor], Tensor]:
        """New deltas of the changed sources, and logits ``[num_rows, N, V]``.

        Args:
            given: inputs of receivers ``[num_rows, N, P, d_model]``; all others follow from the circuit.
        """
        run = _Run(self, given, num_rows)
        for source in self.changed:
            run.recompute(source)
        return run.new, run.logits()

    def _split(self, receiver: int, changed: NDArray[np.bool_], fold: bool) -> tuple[Tensor, list[int]]:
        """The sum of what stays the same, and the parents that are still to be added to it."""
        circuit = self.circuit
        parents = circuit.parents(receiver)
        if not fold:
            return circuit.base(receiver), parents
        moving = [source for source in parents if changed[source] or self._is_normed_with(source, changed)]
        still = sorted(set(parents) - set(moving))
        return circuit.mix(receiver, circuit.base(receiver), still, circuit.deltas), moving

    def _is_normed_with(self, source: int, changed: NDArray[np.bool_]) -> bool:
        """A head that shares a norm with heads that change."""
        graph, layers = self.circuit.graph, self.circuit.baseline.model.layers
        node = graph.sources[source]
        if node.head is None or layers[node.layer].post_attn_norm is None:
            return False
        return bool(changed[graph.head(node.layer, 0) : graph.mlp(node.layer)].any())


class _Run:
    """What one run has computed so far: new deltas, and within a layer the inputs and projections."""

    def __init__(self, propagation: Propagation, given: Mapping[int, Tensor], num_rows: int) -> None:
        self.new: dict[int, Tensor] = {}
        self._propagation = propagation
        self._circuit = propagation.circuit
        self._deltas = ChainMap(self.new, dict(self._circuit.deltas))
        self._given = given
        self._num_rows = num_rows
        self._layer = -1
        self._normed: dict[int, Tensor] = {}
        self._projected: dict[tuple[int, Part], Tensor] = {}

    def recompute(self, source: int) -> None:
        """Put a source's delta into ``new``, after those that it depends on."""
        node, ablated = self._circuit.graph.sources[source], self._circuit.baseline.ablated
        if node.layer != self._layer:
            self._layer = node.layer
            self._normed.clear()
            self._projected.clear()
        output = self._mlp(source) if node.head is None else self._head(source, node.head)
        if ablated is not None:
            output = output - self._where_needed(ablated[source], source)
        self.new[source] = output

    def logits(self) -> Tensor:
        return self._circuit.baseline.model.logits(self._input(len(self._circuit.graph.receivers) - 1))[:, :, 0]

    def _mlp(self, source: int) -> Tensor:
        (reader,) = self._circuit.graph.readers[source]
        return self._circuit.baseline.model.layers[self._layer].mlp(self._input(reader))

    def _head(self, source: int, head: int) -> Tensor:
        baseline = self._circuit.baseline
        positions = baseline.everywhere if self._circuit.live.everywhere[source] else baseline.last
        kv_head = head // baseline.model.group_size
        parts = (Part("q", head), Part("k", kv_head), Part("v", kv_head))
        q, k, v = (self._projection(source, part) for part in parts)
        return baseline.model.layers[self._layer].attend(q, k, v, positions)

    def _projection(self, source: int, part: Part) -> Tensor:
        """The query, key or value that a head reads, rotated; keys and values with those of the prefix."""
        graph = self._circuit.graph
        reader = next(i for i in graph.readers[source] if part in graph.receivers[i].parts)
        is_reached = reader in self._given or reader in self._propagation.moving
        known = self._projected if is_reached else self._propagation.still
        if (reader, part) not in known:
            known[reader, part] = self._project(source, reader, part)
        return known[reader, part]

    def _project(self, source: int, reader: int, part: Part) -> Tensor:
        baseline = self._circuit.baseline
        layer = baseline.model.layers[self._layer]
        if reader not in self._normed:
            self._normed[reader] = layer.attn_norm(self._input(reader))
        x = self._normed[reader]
        if part.kind == "v":
            return baseline.with_prefix("v", self._layer, part.head, layer.v(part.head, x))
        if part.kind == "k":
            keys = baseline.everywhere.rotate(layer.rope, layer.k(part.head, x))
            return baseline.with_prefix("k", self._layer, part.head, keys)
        positions = baseline.everywhere if self._circuit.live.everywhere[source] else baseline.last
        return positions.rotate(layer.rope, layer.q(part.head, self._where_needed(x, source)))

    def _where_needed(self, x: Tensor, source: int) -> Tensor:
        """``x`` at the positions at which a source's value counts."""
        return x if self._circuit.live.everywhere[source] else self._circuit.baseline.at_last(x)

    def _input(self, receiver: int) -> Tensor:
        """``[num_rows, N, P, d_model]``, or one row where no change reaches."""
        if receiver in self._given:
            return self._given[receiver]
        if receiver not in self._propagation.moving:
            return self._circuit.input_of(receiver)
        start, sources = self._propagation.moving[receiver]
        return self._circuit.mix(receiver, start, sources, self._deltas, self._num_rows)
