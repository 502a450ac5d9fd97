"""Which heads to watch: those that the circuits of a behaviour have, and circuits of other behaviours have not.

One search gives one circuit; another threshold, order or draw of prompts gives another one. Of each head counts

    frequency    the share of the behaviour's circuits that have it
    specificity  (k + ½) / (n + 1) over (k' + ½) / (n' + 1), where k of the behaviour's n circuits have it and k' of n'
                 control circuits: how much more often, finite whatever the counts
    effect       what the removal of the edges it has in a circuit added to the metric, summed, mean over circuits

A head belongs to a circuit if a path of kept edges leads from it to the logits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steerserve.circuits.edge_attribution import EdgeScores
from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError

_HEAD = re.compile(r"a(\d+)\.h(\d+)")


class Head(NamedTuple):
    """A head of the model."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False)
class CircuitHeads:
    """What of a circuit file counts here.

    Attributes:
        name, sha256: of the file; the name with its directory's, as all directories have a ``circuit-0.02.json``.
        cfg: what was searched, as ``discover`` wrote it.
        effect: of every head that the circuit has.
    """

    name: str
    sha256: str
    cfg: dict[str, Any]
    effect: dict[Head, float]

    @classmethod
    def read(cls, path: Path) -> CircuitHeads:
        """Read a file of ``discover``, or a checkpoint of ``measure_stability``.

        Raises:
            AssetError: it cannot be read, holds something else, or a search that is not complete.
        """
        try:
            data = path.read_bytes()
            content = json.loads(data)
            cfg, complete = dict(content["cfg"]), bool(content["complete"])
            live = {name for name, node in content["nodes"].items() if node["in_graph"]}
            effect: dict[Head, float] = {}
            for name, edge in content["edges"].items():
                source = name.partition("->")[0]
                if edge["in_graph"] and source in live and (match := _HEAD.fullmatch(source)):
                    head = Head(int(match[1]), int(match[2]))
                    effect[head] = effect.get(head, 0.0) + float(edge["score"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AssetError(f"{path}: not a circuit that `steerserve discover` wrote: {error!r}") from error
        if not complete:
            raise AssetError(f"{path}: the search was cut off; give the same `steerserve discover` again to finish it")
        return cls(str(Path(path.parent.name, path.name)), hashlib.sha256(data).hexdigest(), cfg, effect)


@dataclass(frozen=True)
class HeadCount:
    """One head, over circuits; ``specificity`` is None without control circuits."""

    head: Head
    frequency: float
    specificity: float | None
    effect: float


def count_heads(circuits: Sequence[CircuitHeads], controls: Sequence[CircuitHeads]) -> list[HeadCount]:
    """Every head of the circuits, the largest mean effect first.

    Raises:
        InvalidRequestError: there is no circuit.
        IncompatibleError: a circuit is of other weights than the first.
    """
    if not circuits:
        raise InvalidRequestError("circuits", circuits, "at least one")
    for each in (*circuits, *controls):
        if each.cfg.get("model_fingerprint") != circuits[0].cfg.get("model_fingerprint"):
            expected = f"circuits of the weights of {circuits[0].name}"
            raise IncompatibleError("circuits", f"{each.name}, of {each.cfg.get('model')}", expected)
    n, m = len(circuits), len(controls)
    counts = []
    for head in {head for circuit in circuits for head in circuit.effect}:
        found = sum(head in circuit.effect for circuit in circuits)
        elsewhere = sum(head in control.effect for control in controls)
        ratio = (found + 0.5) / (n + 1) * (m + 1) / (elsewhere + 0.5) if controls else None
        counts.append(HeadCount(head, found / n, ratio, sum(c.effect.get(head, 0.0) for c in circuits) / n))
    return sorted(counts, key=lambda each: (-each.effect, each.head))


def choose_heads(
    counts: Sequence[HeadCount], count: int, min_frequency: float = 0.5, min_specificity: float = 0.0
) -> list[HeadCount]:
    """The ``count`` heads of the largest effect among those that are frequent and specific enough; fewer if fewer are.

    Raises:
        InvalidRequestError: none is.
    """
    chosen = [
        each
        for each in counts
        if each.frequency >= min_frequency and (each.specificity is None or each.specificity >= min_specificity)
    ][:count]
    if not chosen:
        found = f"frequency {min_frequency:g}, specificity {min_specificity:g}"
        raise InvalidRequestError("thresholds", found, f"ones that at least one of {len(counts)} heads passes")
    return chosen


def attributed_heads(found: EdgeScores) -> list[Head]:
    """All heads, those first whose outgoing edges have the largest sum of |score|."""
    sums = np.abs(found.scores).sum(0)
    of_head = {
        Head(s.layer, s.head): total for s, total in zip(found.graph.sources, sums, strict=True) if s.head is not None
    }
    return sorted(of_head, key=lambda head: (-of_head[head], head))
