"""ACDC as it is written in the paper: one full pass of the whole model for every edge, one edge after the other.

Nothing is skipped, cached or batched, and nodes and edges are named here anew. Only the functions of single nodes are
the product's; the identities and the patching tests hold them against ``transformers``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from steerserve.circuits.sliced import Positions, SlicedModel

Edge = tuple[str, str]


class NaiveModel:
    """The model on one batch of token ids; node outputs by name, of heads before ``W_O``."""

    def __init__(self, model: SlicedModel, split: bool, kv: str) -> None:
        self.model = model
        self.split = split
        self.kv_of = {h: h // model.group_size for h in range(model.n_heads)}
        self.is_grouped = kv == "grouped" and model.group_size > 1

    def sources_before(self, layer: int, with_heads: bool = False) -> list[str]:
        names = ["input"]
        for each in range(layer):
            names += [f"a{each}.h{h}" for h in range(self.model.n_heads)] + [f"m{each}"]
        return names + ([f"a{layer}.h{h}" for h in range(self.model.n_heads)] if with_heads else [])

    def unit(self, head: int) -> str:
        return f"g{self.kv_of[head]}" if self.is_grouped else f"h{head}"

    def receiver(self, layer: int, head: int, kind: str) -> str:
        if not self.split:
            return f"a{layer}.{self.unit(head)}"
        return f"a{layer}.h{head}<q>" if kind == "q" else f"a{layer}.{self.unit(head)}<{kind}>"

    def edges(self) -> list[tuple[str, list[str]]]:
        """Receivers with their parents, in topological order."""
        receivers: list[tuple[str, list[str]]] = []
        for layer in range(len(self.model.layers)):
            names: list[str] = []
            for group in sorted({self.unit(h) for h in self.kv_of}, key=lambda unit: int(unit[1:])):
                members = [h for h in self.kv_of if self.unit(h) == group]
                for kind in "qkv":
                    names += [self.receiver(layer, head, kind) for head in members]
            receivers += [(name, self.sources_before(layer)) for name in dict.fromkeys(names)]
            receivers.append((f"m{layer}", self.sources_before(layer, with_heads=not self.model.parallel)))
        return [*receivers, ("logits", self.sources_before(len(self.model.layers)))]

    def run(
        self, tokens: torch.Tensor, removed: set[Edge] = frozenset(), ablated: dict[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Outputs, and logits at all positions; a removed edge carries ``ablated``, or nothing."""
        model, length = self.model, tokens.shape[1]
        positions = Positions(torch.arange(length)[None], length)
        outputs = {"input": model.embed(tokens)[None]}

        def carried(source: str, receiver: str) -> torch.Tensor:
            if (source, receiver) not in removed:
                return outputs[source]
            return torch.zeros_like(outputs[source]) if ablated is None else ablated[source]

        def read(receiver: str, num_attention: int, num_mlps: int) -> torch.Tensor:
            x = carried("input", receiver)
            for layer in range(num_attention):
                total = model.layers[layer].constant
                for head in range(model.n_heads):
                    total = total + carried(f"a{layer}.h{head}", receiver) @ model.layers[layer].W_O[head]
                x = x + model.layers[layer].to_stream(total)
                if layer < num_mlps:
                    x = x + carried(f"m{layer}", receiver)
            return x

        for i, layer in enumerate(model.layers):
            for head, kv in self.kv_of.items():
                x = {kind: layer.attn_norm(read(self.receiver(i, head, kind), i, i)) for kind in "qkv"}
                q = positions.rotate(layer.rope, layer.q(head, x["q"]))
                k = positions.rotate(layer.rope, layer.k(kv, x["k"]))
                outputs[f"a{i}.h{head}"] = layer.attend(q, k, layer.v(kv, x["v"]), positions)
            outputs[f"m{i}"] = layer.mlp(read(f"m{i}", i if model.parallel else i + 1, i))
        count = len(model.layers)
        return outputs, model.logits(read("logits", count, count))[0]


def naive_acdc(
    naive: NaiveModel, pairs, zero: bool, metric: Callable, tau: float, order: Callable[[str, list[str]], list[str]]
) -> dict[Edge, tuple[bool, float]]:
    """Every edge: whether it is kept, and what its removal added to the metric when its turn came."""
    ablated = None if zero else naive.run(pairs.corrupted)[0]

    def value(removed: set[Edge]) -> float:
        logits = naive.run(pairs.clean, removed, ablated)[1]
        return float(metric(logits[torch.arange(len(pairs.last)), pairs.last]))

    removed: set[Edge] = set()
    current = value(removed)
    decisions = {}
    for receiver, parents in reversed(naive.edges()):
        for source in order(receiver, parents):
            new = value(removed | {(source, receiver)})
            keep = new - current >= tau
            decisions[source, receiver] = (keep, new - current)
            if not keep:
                removed.add((source, receiver))
                current = new
    return decisions
