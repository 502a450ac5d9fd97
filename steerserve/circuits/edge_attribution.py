"""Edge attribution patching: the effect of every edge's removal, to first order. Approximate, unlike ACDC.

    score(u → v) = (corrupted output of u − clean output of u) · ∂metric / ∂input of v

summed over positions, mean over prompts. A score has ACDC's sign: above 0 where removal makes the metric worse. EAP
(Syed et al. 2023) takes the slope at the clean run. EAP-IG (Hanna et al. 2024) takes the mean slope over m runs whose
embeddings lie at k/m, k = 1 … m, on the way from the corrupted to the clean ones; with m = 1 it is EAP.

A receiver's input is the residual before its norm. Where heads are summed before a norm (Gemma), a head's change goes
through the slope of that norm, at the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerserve.circuits.ablation import Ablation, record
from steerserve.circuits.agreement import Scores, connected, top_edges
from steerserve.circuits.graph import Graph, Part, Present
from steerserve.circuits.metrics import METRICS
from steerserve.circuits.prompts import PromptPairs
from steerserve.circuits.sliced import Layer, Positions, SlicedModel
from steerserve.errors import InvalidRequestError

KL = "kl"
COPIES = 4
"""Tensors of the size of all receivers' inputs that one pass holds, about: inputs, norms, slopes, work."""


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Approximate effects of the removal of every edge.

    Attributes:
        cfg: the model, its graph, the prompts and the method, as JSON values.
        scores: ``[receivers, sources]``, 0 where there is no edge. ``curve`` takes them as they are for CPR, and
            their absolute values for CMD.
    """

    graph: Graph
    cfg: Mapping[str, Any]
    scores: Scores

    def circuit(self, count: int) -> Present:
        """The ``count`` edges of the largest |score|, less those on no path from the embedding to the logits.

        Raises:
            InvalidRequestError: there are not so many edges.
        """
        return connected(self.graph, top_edges(self.graph, np.abs(self.scores), count))

    def to_json(self, present: Present) -> dict[str, Any]:
        """The form of EAP-IG and MIB; ``in_graph`` says which edges are ``present``."""
        graph = self.graph
        return {
            "cfg": dict(self.cfg),
            "nodes": {
                **{node.name: {"in_graph": bool(present[:, i].any())} for i, node in enumerate(graph.sources)},
                "logits": {"in_graph": True},
            },
            "edges": {
                graph.edge_name(*edge): {"score": float(self.scores[edge]), "in_graph": bool(present[edge])}
                for edge in graph.edges
            },
        }


def attribute_edges(
    model: SlicedModel,
    graph: Graph,
    pairs: PromptPairs,
    metric: str,
    steps: int = 1,
    max_bytes: int = 2**30,
    report: Callable[[float], None] = lambda _: None,
) -> EdgeScores:
    """Approximate effects of every edge of ``graph``, by EAP, or by EAP-IG for ``steps`` above 1.

    Args:
        metric: a key of ``METRICS``.
        max_bytes: memory for a batch of prompts, about.
        report: gets the share of the passes that are done.

    Raises:
        InvalidRequestError: a setting is out of range, or the metric is KL, which has no slope at the clean run, with
            one step; or the scores are not finite.
    """
    if steps < 1:
        raise InvalidRequestError("steps", steps, "at least 1")
    if metric not in METRICS:
        raise InvalidRequestError("metric", metric, f"one of {', '.join(METRICS)}")
    if metric == KL and steps == 1:
        raise InvalidRequestError("metric", metric, "another one, or more than 1 step: KL is flat at the clean run")
    per_prompt = COPIES * len(graph.receivers) * pairs.clean.shape[1] * model.d_model * model.dtype.itemsize
    size = max(1, max_bytes // per_prompt)
    scores = np.zeros(graph.full.shape)
    for start in range(0, len(pairs), size):
        batch = pairs.take(range(start, min(start + size, len(pairs))))
        for step, summed in enumerate(_batch_scores(model, graph, batch, metric, steps), 1):
            scores += summed
            report((start + len(batch) * step / steps) / len(pairs))
    if not np.isfinite(scores).all():
        raise InvalidRequestError("metric", metric, "finite slopes on these prompts")
    cfg = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "n_kv_heads": graph.n_kv_heads,
        "d_model": model.d_model,
        "parallel_attn_mlp": graph.parallel,
        "split_qkv_input": graph.split,
        "kv": graph.kv,
        "task": pairs.name,
        "num_prompts": len(pairs),
        "ablation": Ablation.CORRUPTED.value,
        "metric": metric,
        "method": "EAP" if steps == 1 else "EAP-IG (inputs)",
        "steps": steps,
        "approximate": True,
    }
    return EdgeScores(graph, cfg, np.where(graph.full, scores / (steps * len(pairs)), 0.0))


def _batch_scores(model: SlicedModel, graph: Graph, pairs: PromptPairs, metric: str, steps: int) -> Iterator[Scores]:
    """By step ``[receivers, sources]``, summed over prompts."""
    with torch.no_grad():
        clean, corrupted = record(model, pairs.clean), record(model, pairs.corrupted)
        reference = model.logits(_at(clean.residuals[-1], pairs.last))
    changes = [other - x for x, other in zip(clean.outputs, corrupted.outputs, strict=True)]
    judge = METRICS[metric](pairs, reference)
    for step in range(1, steps + 1):
        embedding = torch.lerp(corrupted.outputs[0], clean.outputs[0], step / steps).detach().requires_grad_()
        with torch.enable_grad():
            run = _Run(model, graph, embedding)
            value = judge.per_prompt(model.logits(_at(run.inputs[-1], pairs.last))).sum()
            slopes = torch.cat(torch.autograd.grad(value, run.inputs)).detach()
        total = np.zeros(graph.full.shape)
        for first, written, seen in _written(model, graph, changes, run.attention, slopes):
            products = torch.einsum("snpd,rnpd->rs", written, seen).double()
            total[:, first : first + len(written)] += products.cpu().numpy()
        yield total


def _written(
    model: SlicedModel, graph: Graph, changes: list[Tensor], attention: list[Tensor], slopes: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """By layer the embedding, the MLP, the heads: first source, changes ``[sources, N, S, d_model]``, and slopes."""
    yield 0, changes[0], slopes
    for index, layer in enumerate(model.layers):
        heads = range(graph.head(index, 0), graph.mlp(index))
        yield graph.mlp(index), changes[graph.mlp(index)], slopes
        z = torch.cat([changes[source] for source in heads])
        yield heads.start, z @ layer.W_O[:, None], _before_norm(layer, attention[index], slopes)


def _before_norm(layer: Layer, attention: Tensor, slopes: Tensor) -> Tensor:
    """Slopes with respect to the sum of the heads, from slopes with respect to what it adds to the stream."""
    if layer.post_attn_norm is None:
        return slopes
    with torch.enable_grad():
        x = attention.detach().expand_as(slopes).clone().requires_grad_()
        (before,) = torch.autograd.grad(layer.to_stream(x), x, slopes)
    return before


class _Run:
    """An ordinary pass in which every receiver reads a copy of the residual.

    Attributes:
        inputs: ``[receivers, N, S, d_model]`` in parts, in the graph's order.
        attention: by layer, the sum of the heads and ``b_O``, ``[1, N, S, d_model]``.
    """

    def __init__(self, model: SlicedModel, graph: Graph, embedding: Tensor) -> None:
        self.inputs: list[Tensor] = []
        self.attention: list[Tensor] = []
        length = embedding.shape[2]
        positions = Positions(torch.arange(length, device=embedding.device)[None], length)
        x = embedding
        for index, layer in enumerate(model.layers):
            attention = self._attention(model, graph, index, x, positions)
            self.attention.append(attention)
            after = x + layer.to_stream(attention)
            x = after + layer.mlp(self._read(x if model.parallel else after))
        self._read(x)

    def _read(self, x: Tensor, count: int = 1) -> Tensor:
        self.inputs.append(x.repeat(count, 1, 1, 1))
        return self.inputs[-1]

    def _attention(self, model: SlicedModel, graph: Graph, index: int, x: Tensor, positions: Positions) -> Tensor:
        layer, readers = model.layers[index], graph.receivers_of_layer[index]
        normed = layer.attn_norm(self._read(x, len(readers)))
        known: dict[tuple[int, Part], Tensor] = {}

        def projected(source: int, part: Part) -> Tensor:
            reader = next(i for i in graph.readers[source] if part in graph.receivers[i].parts)
            if (reader, part) not in known:
                row = readers.index(reader)
                y = getattr(layer, part.kind)(part.head, normed[row : row + 1])
                known[reader, part] = y if part.kind == "v" else positions.rotate(layer.rope, y)
            return known[reader, part]

        total = layer.constant.expand_as(x)
        for head in range(model.n_heads):
            source, shared = graph.head(index, head), head // model.group_size
            q, k, v = (projected(source, part) for part in (Part("q", head), Part("k", shared), Part("v", shared)))
            total = total + layer.attend(q, k, v, positions) @ layer.W_O[head]
        return total


def _at(x: Tensor, last: Tensor) -> Tensor:
    """``[N, d_model]`` at the last position of ``[1, N, S, d_model]``."""
    return x[0, torch.arange(len(last)), last]
