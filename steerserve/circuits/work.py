"""What it takes to recompute some nodes of a circuit: layers and memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steerserve.circuits.circuit import Circuit


@dataclass(frozen=True)
class Work:
    """Of one row.

    Attributes:
        sequence_layers: sequences × layers, each node as its share of a layer's multiply-adds and positions.
        touched: sequences × layers, every layer in full in which anything is computed.
        num_bytes: what is held at once, about.
    """

    sequence_layers: float
    touched: int
    num_bytes: int

    @classmethod
    def of(cls, circuit: Circuit, changed: NDArray[np.bool_]) -> Work:
        """To recompute ``changed`` sources."""
        model, graph, baseline = circuit.baseline.model, circuit.graph, circuit.baseline
        num_positions, length = baseline.everywhere.ids.shape[1], baseline.everywhere.length
        copies = model.group_size if graph.kv == "grouped" else 1
        projection = model.d_model * model.d_head
        memory, query = 2 * projection / copies, 2 * projection
        mlp = sum(parameter.numel() for parameter in model.layers[0].mlp_module.parameters())
        layer_total = length * (model.n_heads * (memory + query) + mlp)
        share, floats = 0.0, 0
        for source in np.flatnonzero(changed):
            positions = num_positions if circuit.live.everywhere[source] else 1
            is_head = graph.sources[source].head is not None
            share += (num_positions * memory + positions * query if is_head else positions * mlp) / layer_total
            floats += positions * (model.d_head if is_head else model.d_model)
        floats += num_positions * (6 * model.d_model + 3 * model.d_mlp) + 5 * model.vocab_size
        layers = {graph.sources[source].layer for source in np.flatnonzero(changed)}
        num_bytes = baseline.num_prompts * floats * model.dtype.itemsize
        return cls(share * baseline.num_prompts, len(layers) * baseline.num_prompts, num_bytes)
