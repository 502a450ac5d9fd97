"""Monitor plans from what was found: one entry for each head, site or SAE, with the vector that is read there.

Each entry's score is a projection on a unit vector. Where one probe was fitted on several, its score is
Σ scale · score + bias, with the scales, the bias and a threshold in the plan's ``protocol``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steerserve.circuits.feature_attribution import FeatureAttribution
from steerserve.circuits.forward import head_outputs
from steerserve.circuits.monitoring.choice import CircuitHeads, Head, HeadCount
from steerserve.circuits.monitoring.probes import Probe
from steerserve.circuits.prompts import PromptPairs
from steerserve.models.loading import LoadedModel
from steerserve.steering.monitor_plan import (
    MAX_FEATURES,
    DirectionReading,
    FeatureReading,
    HeadReading,
    MonitorEntry,
    MonitorPlan,
    Provenance,
)
from steerserve.steering.packs import ModelRef
from steerserve.types import FloatArray


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of a plan with their vectors, and what is known of how to take them together."""

    entries: tuple[MonitorEntry, ...]
    vectors: dict[str, FloatArray]
    protocol: dict[str, Any]


def entries_of_probe(probe: Probe, counts: Sequence[HeadCount], d_head: int) -> Entries:
    """A fitted reading, taken apart into heads and sites; ``counts`` of the heads, where there are any."""
    count_of = {each.head: each for each in counts}
    entries, vectors, done = [], {}, 0
    for head in probe.reading.heads:
        name = str(head)
        vectors[name] = probe.weight[done : done + d_head].astype(np.float32)
        entries.append(_head_entry(head, count_of.get(head)))
        done += d_head
    for site in probe.reading.sites:
        name = f"resid-L{site.layer}"
        width = (len(probe.weight) - done) // len(probe.reading.sites)
        vectors[name] = probe.weight[done : done + width].astype(np.float32)
        entries.append(MonitorEntry(name=name, reading=DirectionReading(site=str(site), vector=name)))
        done += width
    scales = {name: float(np.linalg.norm(vector)) for name, vector in vectors.items()}
    combined = {"scales": scales, "bias": probe.bias, "threshold": probe.threshold}
    return Entries(tuple(entries), vectors, {"combined": combined})


@torch.no_grad()
def entries_of_pairs(model: LoadedModel, pairs: PromptPairs, counts: Sequence[HeadCount]) -> Entries:
    """Each head along the difference of its mean outputs at the end of clean and of corrupted prompts."""
    rows = torch.arange(len(pairs)), pairs.last
    clean, corrupted = (head_outputs(model, tokens) for tokens in (pairs.clean, pairs.corrupted))
    vectors, means = {}, {}
    for each in counts:
        layer, head = each.head
        on, off = (z[layer][rows][:, head].double().mean(0) for z in (clean, corrupted))
        unit = (on - off) / (on - off).norm().clamp(min=1e-12)
        vectors[str(each.head)] = (on - off).float().numpy()
        means[str(each.head)] = {"clean": float(on @ unit), "corrupted": float(off @ unit)}
    entries = tuple(_head_entry(each.head, each) for each in counts)
    return Entries(entries, vectors, {"mean_scores": means})


def entry_of_features(found: FeatureAttribution) -> MonitorEntry | None:
    """The sum of the features whose removal makes the metric worse; None if there is none."""
    chosen = [each for each in found.features if each.removed > 0][:MAX_FEATURES]
    if not chosen:
        return None
    reading = FeatureReading(sae=found.sae, sha256=found.sae_sha256, features=tuple(each.id for each in chosen))
    return MonitorEntry(name=f"features-{found.sae}", reading=reading)


def plan_of(
    name: str,
    behaviour: str,
    model: LoadedModel,
    parts: Iterable[Entries],
    circuits: Sequence[CircuitHeads],
    bootstraps: int,
    command: str,
    protocol: dict[str, Any],
) -> tuple[MonitorPlan, dict[str, FloatArray]]:
    """The plan and its vectors, for ``save_monitor_plan``."""
    parts = list(parts)
    provenance = Provenance(
        circuits={each.name: each.sha256 for each in circuits},
        bootstraps=bootstraps,
        thresholds=tuple(sorted({float(each.cfg["threshold"]) for each in circuits})),
        orders=tuple(sorted({str(each.cfg["order"]) for each in circuits})),
        command=command,
    )
    plan = MonitorPlan(
        name=name,
        behaviour=behaviour,
        model=ModelRef(name=model.name, fingerprint=model.fingerprint),
        entries=tuple(entry for part in parts for entry in part.entries),
        provenance=provenance,
        protocol={**{key: value for part in parts for key, value in part.protocol.items()}, **protocol},
    )
    return plan, {key: vector for part in parts for key, vector in part.vectors.items()}


def _head_entry(head: Head, count: HeadCount | None) -> MonitorEntry:
    return MonitorEntry(
        name=str(head),
        reading=HeadReading(head=str(head), vector=str(head)),
        frequency=None if count is None else count.frequency,
        specificity=None if count is None else count.specificity,
    )
