"""Steering specs: wire messages to plain types and back."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.serving.fields import bounded, expect, refuse_too_many, rooted_at
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    Guard,
    GuardAction,
    HeadTarget,
    Intervention,
    Op,
    Phase,
    Rewind,
    Site,
    SteeringSpec,
    Target,
    Unit,
)
from steerserve.v1 import steering_pb2 as pb

EnumT = TypeVar("EnumT", bound=StrEnum)
NumberT = TypeVar("NumberT", bound=int)
TargetMessage = pb.Intervention | pb.Gate | pb.Guard

MAX_INTERVENTIONS = 4096
MAX_GUARDS = 64
MAX_REWIND_EDITS = 64

_UINT32_MAX = 2**32 - 1
_OPS = {pb.Op.Value(f"OP_{op.name}"): op for op in Op}
_PHASES = {pb.PHASE_UNSPECIFIED: Phase.ALL} | {pb.Phase.Value(f"PHASE_{phase.name}"): phase for phase in Phase}
GUARD_ACTIONS = {pb.GuardAction.Value(f"GUARD_ACTION_{action.name}"): action for action in GuardAction}
_OTHERWISE = {pb.GUARD_ACTION_UNSPECIFIED: GuardAction.BLOCK} | {
    number: action for number, action in GUARD_ACTIONS.items() if action is not GuardAction.REWIND
}


def refuse_large_spec(message: pb.SteeringSpec, path: str) -> None:
    """Count the parts of a spec before anything looks at each; ``path`` is where it stands in the request."""
    refuse_too_many(len(message.interventions), f"{path}.interventions", MAX_INTERVENTIONS)
    refuse_too_many(len(message.guards), f"{path}.guards", MAX_GUARDS)
    for i, guard in enumerate(message.guards):
        refuse_too_many(len(guard.rewind.edits), f"{path}.guards[{i}].rewind.edits", MAX_REWIND_EDITS)


def spec_from_proto(message: pb.SteeringSpec, path: str) -> SteeringSpec:
    """Read a spec; ``path`` is where it stands in the request.

    Raises:
        InvalidRequestError: what no loaded model is needed to see; the rest is the engine's to check.
    """
    return SteeringSpec(
        interventions=tuple(
            _intervention_from_proto(intervention, f"{path}.interventions[{i}]")
            for i, intervention in enumerate(message.interventions)
        ),
        guards=tuple(_guard_from_proto(guard, f"{path}.guards[{i}]") for i, guard in enumerate(message.guards)),
    )


def spec_to_proto(spec: SteeringSpec, path: str) -> pb.SteeringSpec:
    """Write a spec.

    Raises:
        InvalidRequestError: a number that its field cannot hold.
    """
    return pb.SteeringSpec(
        interventions=[
            _intervention_to_proto(intervention, f"{path}.interventions[{i}]")
            for i, intervention in enumerate(spec.interventions)
        ],
        guards=[_guard_to_proto(guard, f"{path}.guards[{i}]") for i, guard in enumerate(spec.guards)],
    )


def _intervention_from_proto(message: pb.Intervention, path: str) -> Intervention:
    value_field = message.WhichOneof("value")
    return Intervention(
        target=_target_from_proto(message, path),
        op=_member(_OPS, "OP", message.op, f"{path}.op"),
        value=None if value_field is None else getattr(message, value_field),
        unit=Unit.RAW if value_field is None else Unit(value_field),
        always=message.always,
        phase=_member(_PHASES, "PHASE", message.phase, f"{path}.phase"),
        gate=_gate_from_proto(message.gate, f"{path}.gate") if message.HasField("gate") else None,
    )


def _intervention_to_proto(intervention: Intervention, path: str) -> pb.Intervention:
    message = pb.Intervention(
        op=pb.Op.Value(f"OP_{intervention.op.name}"),
        always=intervention.always,
        phase=pb.Phase.Value(f"PHASE_{intervention.phase.name}"),
    )
    if intervention.value is not None:
        setattr(message, intervention.unit.value, intervention.value)
    if intervention.gate is not None:
        message.gate.threshold = intervention.gate.threshold
        _write_target(intervention.gate.target, message.gate, f"{path}.gate")
    _write_target(intervention.target, message, path)
    return message


def _gate_from_proto(message: pb.Gate, path: str) -> Gate:
    return Gate(_target_from_proto(message, path), _threshold(message, path))


def _guard_from_proto(message: pb.Guard, path: str) -> Guard:
    target = _target_from_proto(message, path)
    threshold = _threshold(message, path)
    action = _member(GUARD_ACTIONS, "GUARD_ACTION", message.action, f"{path}.action")
    rewind = _rewind_from_proto(message.rewind, f"{path}.rewind") if message.HasField("rewind") else None
    phase = _member(_PHASES, "PHASE", message.phase, f"{path}.phase")
    with rooted_at(path):
        return Guard(target, threshold, action, rewind, phase, message.fail_open)


def _guard_to_proto(guard: Guard, path: str) -> pb.Guard:
    message = pb.Guard(
        threshold=guard.threshold,
        action=guard_action_to_proto(guard.action),
        rewind=None if guard.rewind is None else _rewind_to_proto(guard.rewind, f"{path}.rewind"),
        phase=pb.Phase.Value(f"PHASE_{guard.phase.name}"),
        fail_open=guard.fail_open,
    )
    _write_target(guard.target, message, path)
    return message


def _rewind_from_proto(message: pb.Rewind, path: str) -> Rewind:
    edits = tuple(_intervention_from_proto(edit, f"{path}.edits[{i}]") for i, edit in enumerate(message.edits))
    otherwise = _member(_OTHERWISE, "GUARD_ACTION", message.otherwise, f"{path}.otherwise")
    max_retries = message.max_retries if message.HasField("max_retries") else 1
    with rooted_at(path):
        return Rewind(message.num_tokens, edits, max_retries, otherwise)


def _rewind_to_proto(rewind: Rewind, path: str) -> pb.Rewind:
    return pb.Rewind(
        num_tokens=rewind.num_tokens,
        edits=[_intervention_to_proto(edit, f"{path}.edits[{i}]") for i, edit in enumerate(rewind.edits)],
        max_retries=rewind.max_retries,
        otherwise=guard_action_to_proto(rewind.otherwise),
    )


def guard_action_to_proto(action: GuardAction) -> pb.GuardAction.ValueType:
    """Write what a guard does."""
    return pb.GuardAction.Value(f"GUARD_ACTION_{action.name}")


def _target_from_proto(message: TargetMessage, path: str) -> Target:
    match message.WhichOneof("target"):
        case "feature":
            feature = message.feature
            expect(feature.HasField("feature"), f"{path}.feature.feature", None, "the index of a feature")
            return FeatureTarget(feature.sae, feature.feature)
        case "concept":
            return ConceptTarget(message.concept)
        case "direction":
            site = Site.parse(message.direction.site, f"{path}.direction.site")
            num_bytes = len(message.direction.vector)
            expect(
                num_bytes > 0 and num_bytes % 4 == 0,
                f"{path}.direction.vector",
                f"{num_bytes} bytes",
                "little-endian float32 values, 4 bytes each",
            )
            vector = np.frombuffer(message.direction.vector, dtype="<f4").astype(np.float32)
            head = message.direction.head if message.direction.HasField("head") else None
            return DirectionTarget(site, vector, head)
        case "head":
            assert isinstance(message, pb.Intervention)
            for part in ("layer", "head"):
                expect(message.head.HasField(part), f"{path}.head.{part}", None, f"the index of a {part}")
            return HeadTarget(message.head.layer, message.head.head)
        case _:
            choices = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["target"].fields)
            raise InvalidRequestError(f"{path}.target", None, f"one of {choices}")


def _write_target(target: Target, message: TargetMessage, path: str) -> None:
    match target:
        case FeatureTarget(sae, feature):
            message.feature.sae = sae
            message.feature.feature = bounded(feature, f"{path}.feature.feature", 0, _UINT32_MAX)
        case ConceptTarget(concept):
            message.concept = concept
        case DirectionTarget(site, vector, head):
            message.direction.site = str(site)
            message.direction.vector = np.asarray(vector, dtype="<f4").tobytes()
            if head is not None:
                message.direction.head = bounded(head, f"{path}.direction.head", 0, _UINT32_MAX)
        case HeadTarget(layer, head):
            expected = "a direction of the head to read: a head alone has no score"
            expect(isinstance(message, pb.Intervention), f"{path}.target", f"head {target}", expected)
            assert isinstance(message, pb.Intervention)
            message.head.layer = bounded(layer, f"{path}.head.layer", 0, _UINT32_MAX)
            message.head.head = bounded(head, f"{path}.head.head", 0, _UINT32_MAX)


def _threshold(message: pb.Gate | pb.Guard, path: str) -> float:
    expect(message.HasField("threshold"), f"{path}.threshold", None, "a finite number")
    return message.threshold


def _member(table: Mapping[NumberT, EnumT], prefix: str, number: NumberT, field: str) -> EnumT:
    expected = ", ".join(dict.fromkeys(f"{prefix}_{member.name}" for member in table.values()))
    expect(number in table, field, number, f"one of {expected}")
    return table[number]
