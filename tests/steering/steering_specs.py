"""Short ways to write the parts of a spec against the catalog of ``conftest``."""

from __future__ import annotations

from typing import Any

import numpy as np

from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    Guard,
    GuardAction,
    Intervention,
    Op,
    Rewind,
    Site,
    SteeringSpec,
    Stream,
    Target,
)

SITE = Site(2, Stream.RESID_POST)
ONES = np.ones(8, dtype=np.float32)


def feature(index: int, op: Op = Op.BLOCK, value: float | None = None, **rest: Any) -> Intervention:
    return Intervention(FeatureTarget("toy-sae", index), op, value, **rest)


def concept(op: Op = Op.BLOCK, value: float | None = None, name: str = "mood", **rest: Any) -> Intervention:
    return Intervention(ConceptTarget(name), op, value, **rest)


def direction(
    op: Op = Op.BLOCK, value: float | None = None, vector: np.ndarray = ONES, site: Site = SITE, **rest: Any
) -> Intervention:
    return Intervention(DirectionTarget(site, vector), op, value, **rest)


def gate(target: Target | int = 0, threshold: float = 0.5) -> Gate:
    """A feature's index stands for the feature."""
    return Gate(FeatureTarget("toy-sae", target) if isinstance(target, int) else target, threshold)


def guard(target: Target | int = 0, threshold: float = 0.5, rewind: Rewind | None = None, **rest: Any) -> Guard:
    """Flags, or rewinds if it can."""
    action = GuardAction.FLAG if rewind is None else GuardAction.REWIND
    return Guard(gate(target).target, threshold, **{"action": action, "rewind": rewind} | rest)


def rewind(*edits: Intervention, max_retries: int = 2, num_tokens: int = 4) -> Rewind:
    return Rewind(num_tokens, edits, max_retries)


def spec(*interventions: Intervention, guards: tuple[Guard, ...] = ()) -> SteeringSpec:
    return SteeringSpec(interventions, guards)
