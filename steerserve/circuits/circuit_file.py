"""Reads the circuits that ``discover`` and ``analyse edges`` write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerserve.circuits.ablation import Ablation
from steerserve.circuits.agreement import Scores
from steerserve.circuits.graph import Graph, Present
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.sliced import SlicedModel
from steerserve.errors import AssetError, IncompatibleError


@dataclass(frozen=True, eq=False)
class CircuitFile:
    """A circuit and what its edges are ranked by.

    Attributes:
        cfg: of the search or the attribution; from there ``ablation`` and ``metric``, a key of ``METRICS``.
        scores: ``[receivers, sources]``, 0 where an edge was not tested.
    """

    name: str
    sha256: str
    cfg: Mapping[str, Any]
    ablation: Ablation
    metric: str
    graph: Graph
    present: Present
    scores: Scores

    @classmethod
    def read(cls, path: Path, model: SlicedModel) -> CircuitFile:
        """Read a circuit of a model's graph.

        Raises:
            AssetError: the file holds no circuit, or a search that has not come to its end.
            IncompatibleError: it is the circuit of another model.
        """
        try:
            raw = path.read_bytes()
            content = json.loads(raw)
            cfg = dict(content["cfg"])
            fingerprint, ablation, metric = cfg["model_fingerprint"], Ablation(cfg["ablation"]), cfg["metric"]
            edges = {name: (float(edge["score"]), bool(edge["in_graph"])) for name, edge in content["edges"].items()}
            split, kv, is_whole = bool(cfg["split_qkv_input"]), cfg["kv"], content.get("complete", True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = "a circuit that `steerserve discover` or `steerserve analyse edges` wrote"
            raise AssetError(f"{path}: not {wanted}: {error!r}") from error
        if fingerprint != model.fingerprint:
            expected = f"one of {model.name}, whose weights have the fingerprint {model.fingerprint[:12]}"
            raise IncompatibleError(f"circuit {path}", f"a circuit of {cfg.get('model')}", expected)
        graph = model.graph(split, kv)
        if metric not in METRICS:
            raise AssetError(f"{path}: metric {metric!r} is none of {', '.join(METRICS)}")
        known = {graph.edge_name(*edge): edge for edge in graph.edges}
        if not is_whole or edges.keys() != known.keys():
            raise AssetError(f"{path}: {len(edges):,} edges are decided where the model's graph has {len(known):,}")
        scores, present = np.zeros(graph.full.shape), graph.empty()
        for name, (score, is_kept) in edges.items():
            scores[known[name]], present[known[name]] = score, is_kept
        return cls(path.name, hashlib.sha256(raw).hexdigest(), cfg, ablation, metric, graph, present, scores)
