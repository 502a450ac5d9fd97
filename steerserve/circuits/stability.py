"""How firmly a circuit stands: searches over resampled prompts, orders of the parents and thresholds.

One search is one sample: another draw of prompts, another order in which edges are tested or another τ keeps other
edges. Edges and heads that most searches keep are those to rely on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.acdc import sweep
from steerserve.circuits.agreement import connected, jaccard, mean_jaccard
from steerserve.circuits.discovery import Discovery
from steerserve.circuits.graph import Graph, Present
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.prompts import PromptPairs
from steerserve.circuits.settings import ACDCConfig
from steerserve.circuits.sliced import SlicedModel
from steerserve.errors import InvalidRequestError

Report = Callable[[float, str], None]
"""Takes the share of the searches that is done, and the name of the one under way."""


class Setting(NamedTuple):
    """What one search differs from another in."""

    bootstrap: int
    order: str
    threshold: float

    @property
    def name(self) -> str:
        return f"bootstrap{self.bootstrap}-{self.order}-{self.threshold}"


@dataclass(frozen=True, eq=False)
class Stability:
    """What the circuits of several searches have in common.

    Attributes:
        found: by search the edges that lie on a path from the embedding to the logits.
    """

    graph: Graph
    found: dict[Setting, Present]

    @property
    def circuits(self) -> dict[str, Present]:
        """By the name of the search, which is that of its file."""
        return {setting.name: present for setting, present in self.found.items()}

    @property
    def edges(self) -> NDArray[np.float64]:
        """``[receivers, sources]``: the share of circuits that have the edge."""
        return _shares(list(self.circuits.values()))

    @property
    def sources(self) -> NDArray[np.float64]:
        """``[sources]``: the share of circuits that have an edge from the source."""
        return _shares([np.any(present, axis=0) for present in self.circuits.values()])

    @property
    def heads(self) -> NDArray[np.float64]:
        """``[layers, heads]``: the share of circuits that have an edge from the head."""
        return self.sources[1:].reshape(self.graph.n_layers, -1)[:, :-1]

    def agreement(self) -> dict[str, float | None]:
        """Mean Jaccard index of circuits whose searches differ in one respect alone, neighbours in it; None: no two."""
        of: dict[str, float | None] = {}
        for axis, field in enumerate(Setting._fields):
            values = list(dict.fromkeys(setting[axis] for setting in self.found))
            pairs = [
                jaccard(self.found[one], self.found[other])
                for one, other in combinations(self.found, 2)
                if one[:axis] + one[axis + 1 :] == other[:axis] + other[axis + 1 :]
                and (field != "threshold" or abs(values.index(one[axis]) - values.index(other[axis])) == 1)
            ]
            of[field] = float(np.mean(pairs)) if pairs else None
        return of

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; nodes and edges that no circuit has are left out."""
        graph, edges = self.graph, self.edges
        circuits = list(self.circuits.values())
        return {
            "circuits": {name: int(present.sum()) for name, present in self.circuits.items()},
            "mean_jaccard": mean_jaccard(circuits) if len(circuits) > 1 else None,
            "agreement": self.agreement(),
            "nodes": {
                node.name: float(share) for node, share in zip(graph.sources, self.sources, strict=True) if share
            },
            "edges": {graph.edge_name(*edge): float(edges[edge]) for edge in graph.edges if edges[edge]},
        }


def measure_stability(
    model: SlicedModel,
    graph: Graph,
    pairs: PromptPairs,
    metric: str,
    configs: Sequence[ACDCConfig],
    thresholds: Sequence[float],
    num_bootstraps: int,
    directory: Path,
    report: Report = lambda *_: None,
) -> Stability:
    """Search on every bootstrap of the prompts, with every config, at every threshold in place of the config's own.

    Args:
        metric: a key of ``METRICS``.
        configs: orders of the parents and their seeds; no two alike.
        directory: gets one checkpoint a search, and ``stability.json``. A search that is there already is not run
            again; one that was cut off goes on.
        report: called whenever a receiver is decided.

    Raises:
        AssetError: a checkpoint cannot be read.
        IncompatibleError: a checkpoint is of another search.
        InvalidRequestError: there is nothing to search, or the metric is unknown or not finite.
    """
    for name, value in (("configs", configs), ("thresholds", thresholds)):
        if not value:
            raise InvalidRequestError(name, value, "at least one")
    if num_bootstraps < 1:
        raise InvalidRequestError("num_bootstraps", num_bootstraps, "at least 1")
    if metric not in METRICS:
        raise InvalidRequestError("metric", metric, f"one of {', '.join(METRICS)}")
    directory.mkdir(parents=True, exist_ok=True)
    taus = sorted(set(thresholds))
    circuits: dict[Setting, Present] = {}
    total = num_bootstraps * len(configs) * len(taus)
    for bootstrap in range(num_bootstraps):
        drawn = pairs.take(_draw(len(pairs), bootstrap))
        baseline = Baseline(model, drawn, Ablation.CORRUPTED)
        judge = METRICS[metric](drawn, baseline.clean_logits)
        for config in configs:
            settings = {tau: Setting(bootstrap, f"{config.order.value}{config.seed}", tau) for tau in taus}
            paths = {tau: directory / f"{setting.name}.json" for tau, setting in settings.items()}
            under_way = partial(_tell, report, settings, len(circuits), total)
            found = sweep(graph, baseline, judge, config, taus, paths.__getitem__, under_way)
            circuits |= {settings[tau]: connected(graph, each.present) for tau, each in zip(taus, found, strict=True)}
    result = Stability(graph, circuits)
    (directory / "stability.json").write_text(json.dumps(result.to_json()), encoding="utf-8")
    return result


def _tell(report: Report, settings: dict[float, Setting], num_before: int, total: int, found: Discovery) -> None:
    """Of a sweep before which ``num_before`` searches were done."""
    tau = found.cfg["threshold"]
    done = num_before + list(settings).index(tau) + len(found.decisions) / found.graph.num_edges
    report(done / total, settings[tau].name)


def _shares(marks: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.stack(marks).mean(0, dtype=np.float64)
    return shares


def _draw(num_prompts: int, seed: int) -> list[int]:
    """As many prompts, drawn with replacement."""
    return sorted(int(i) for i in np.random.default_rng(seed).integers(num_prompts, size=num_prompts))
