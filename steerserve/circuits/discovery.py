"""What a search for a circuit found: every edge's fate, and what it took.

The file is JSON in the form of EAP-IG and MIB, ``{"cfg", "nodes", "edges": {name: {"score", "in_graph"}}}``, with
fields of ours beside theirs. Names are theirs too where inputs are split and every head has its own key and value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerserve.circuits.graph import Graph, Liveness, Present
from steerserve.errors import AssetError


@dataclass(frozen=True)
class Decision:
    """The fate of one edge.

    Attributes:
        effect: what its removal added to the metric; exactly 0 where not tested.
        test: number of its test, from 0; None: not tested, because no path leads from its receiver to the logits.
    """

    receiver: int
    source: int
    kept: bool
    effect: float
    test: int | None


@dataclass
class Counts:
    """What a search took. A row is one circuit run on all prompts.

    Attributes:
        tested: edges.
        rows: rows run for tests, the void ones included.
        void: rows that assumed the removal of an edge that was then kept.
        retested: decisions within the noise of the threshold, taken again at a fixed batch shape.
        sequence_layers: sequences × layers evaluated, re-tests and the upkeep of the circuit included. A node counts as
            its share of its layer's multiply-adds, and where only some positions are computed as their share.
        sequence_layers_touched: the same with every layer counted in full in which anything is computed.
        sequence_layers_naive: of a full pass for each tested edge.
        sequence_layers_every_edge: of a full pass for each edge, as Algorithm 1 has it.
        seconds: of wall time.
        noise: largest difference seen between two computations of one metric; at least some units of rounding.
    """

    tested: int = 0
    rows: int = 0
    void: int = 0
    retested: int = 0
    sequence_layers: float = 0.0
    sequence_layers_touched: int = 0
    sequence_layers_naive: int = 0
    sequence_layers_every_edge: int = 0
    seconds: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class Discovery:
    """A circuit and how it was found.

    Attributes:
        cfg: the model, its graph, the prompts and the settings, as JSON values.
        decisions: in the order they were taken; fewer than there are edges while a search is under way.
        value: the circuit's metric.
    """

    graph: Graph
    cfg: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    counts: Counts
    value: float

    @cached_property
    def present(self) -> Present:
        """Edges that are kept; those not decided count as kept."""
        present = self.graph.full.copy()
        for decision in self.decisions:
            present[decision.receiver, decision.source] = decision.kept
        return present

    @cached_property
    def effects(self) -> NDArray[np.float64]:
        """``[receivers, sources]``: what each edge's removal added to the metric, 0 where it was not tested."""
        effects = np.zeros(self.graph.full.shape)
        for decision in self.decisions:
            effects[decision.receiver, decision.source] = decision.effect
        return effects

    @property
    def num_kept(self) -> int:
        return int(self.present.sum())

    @property
    def num_remaining(self) -> int:
        """Edges that are not decided yet."""
        return self.graph.num_edges - len(self.decisions)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(self.to_json()), encoding="utf-8")
        os.replace(temporary, path)

    def to_json(self) -> dict[str, Any]:
        graph, live = self.graph, Liveness.of(self.graph, self.present)
        return {
            "cfg": dict(self.cfg),
            "nodes": {
                **{node.name: {"in_graph": bool(on)} for node, on in zip(graph.sources, live.sources, strict=True)},
                "logits": {"in_graph": True},
            },
            "edges": {
                graph.edge_name(each.receiver, each.source): {
                    "score": each.effect,
                    "in_graph": each.kept,
                    "test": each.test,
                }
                for each in self.decisions
            },
            "complete": self.num_remaining == 0,
            "value": self.value,
            "counts": asdict(self.counts),
        }

    @classmethod
    def load(cls, path: Path, graph: Graph) -> Discovery:
        """Read a file that ``save`` wrote.

        Raises:
            AssetError: there is none, or it is of another graph.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
            edges = {graph.edge_name(*edge): edge for edge in graph.edges}
            decisions = tuple(
                Decision(*edges[name], bool(each["in_graph"]), float(each["score"]), each["test"])
                for name, each in content["edges"].items()
            )
            counts = Counts(**{field.name: content["counts"][field.name] for field in fields(Counts)})
            return cls(graph, content["cfg"], decisions, counts, float(content["value"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AssetError(f"{path} holds no circuit of this model's graph: {error!r}") from error
