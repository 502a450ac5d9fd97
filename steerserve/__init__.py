"""A gRPC language-model server that edits sparse-autoencoder features per request and proves what ran."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerserve.client import Completion, Reply, SteerserveClient
    from steerserve.serving.steer_string import parse_guard, parse_intervention
    from steerserve.types import (
        ConceptTarget,
        DirectionTarget,
        FeatureTarget,
        Gate,
        Guard,
        GuardAction,
        HeadTarget,
        Intervention,
        Message,
        Op,
        Phase,
        Receipt,
        Rewind,
        SamplingParams,
        Site,
        SteeringSpec,
        Unit,
        Verdict,
        VerdictKind,
    )

_MODULE_OF = {
    "SteerserveClient": "client",
    "Completion": "client",
    "Reply": "client",
    "parse_guard": "serving.steer_string",
    "parse_intervention": "serving.steer_string",
}

__all__ = [
    "Completion",
    "ConceptTarget",
    "DirectionTarget",
    "FeatureTarget",
    "Gate",
    "Guard",
    "GuardAction",
    "HeadTarget",
    "Intervention",
    "Message",
    "Op",
    "Phase",
    "Receipt",
    "Reply",
    "Rewind",
    "SamplingParams",
    "Site",
    "SteeringSpec",
    "SteerserveClient",
    "Unit",
    "Verdict",
    "VerdictKind",
    "parse_guard",
    "parse_intervention",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line must answer --help without grpc or numpy.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'types')}"), name)
