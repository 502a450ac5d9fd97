"""Compile a steering spec and policies into a ``Plan``: names become arrays, here and nowhere later.

Everything that can be wrong with a spec is refused here, at admission, under the path of its field.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from steerserve.errors import InvalidRequestError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack
from steerserve.steering.plan import Plan, PlannedIntervention, Segments, SitePlan, Stage
from steerserve.steering.targets import Identity, ResolvedTarget, gather_rows, resolve_concept, resolve_target
from steerserve.types import DirectionTarget, FloatArray, Intervention, Op, Phase, Site, SteeringSpec, Unit

TAKES_VALUE = frozenset({Op.CLAMP, Op.CLIP, Op.SCALE, Op.ADD})
TAKES_MAX_ACTIVATION = frozenset({Op.CLAMP, Op.CLIP, Op.ADD})
FLOAT32_LIMIT = 2.0**128 - 2.0**103
"""The smallest number that rounds to infinity in float32."""

Place = tuple[Site, Stage]


@dataclass(frozen=True, eq=False)
class _Edit:
    """One intervention with its target resolved; ``value`` is ``[k]``, ``field`` its path in the request."""

    field: str
    source: str
    stage: Stage
    phase: Phase
    target: ResolvedTarget
    op: Op
    always: bool
    value: Sequence[float]

    @property
    def label(self) -> str:
        operand = f" {self.value[0]:g}" if self.op in TAKES_VALUE and len(set(self.value)) == 1 else ""
        return f"{self.target.label}: {self.op}{' always' if self.always else ''}{operand}"


def compile_plan(spec: SteeringSpec, policies: Sequence[str], catalog: Catalog) -> Plan:
    """Compile for the catalog's model; an empty spec without policies gives the empty plan.

    Raises:
        InvalidRequestError: unknown names, bad values, or a feature edited twice in one stage.
        IncompatibleError: a site or a vector that does not fit the model.
    """
    edits = [
        _compile_intervention(intervention, f"steering.interventions[{index}]", catalog)
        for index, intervention in enumerate(spec.interventions)
    ]
    packs = _find_policies(policies, catalog)
    edits += [_compile_policy(pack, f"policies[{index}]") for index, pack in enumerate(packs)]
    _refuse_double_edits(edits)
    _refuse_edits_behind_guards(edits)
    used = {pack.tag: pack.sha256 for edit in edits if (pack := edit.target.pack) is not None}
    plan = Plan(
        interventions=tuple(_planned(edit) for edit in edits),
        sites=tuple(_site_plan(place, edits, members) for place, members in _by_place(edits)),
        policies=tuple(pack.tag for pack in packs),
        packs=used,
        hash="",
    )
    return replace(plan, hash=_plan_hash(plan)) if edits else plan


def _compile_intervention(intervention: Intervention, path: str, catalog: Catalog) -> _Edit:
    _check_op(intervention, path)
    target = resolve_target(intervention.target, f"{path}.target", catalog)
    return _Edit(
        field=path,
        source="request",
        stage=Stage.REQUEST,
        phase=intervention.phase,
        target=target,
        op=intervention.op,
        always=intervention.always,
        value=_values(intervention, target, path),
    )


def _compile_policy(pack: ConceptPack, path: str) -> _Edit:
    action = pack.card.policy
    return _Edit(
        field=path,
        source=f"policy:{pack.tag}",
        stage=Stage.POLICY,
        phase=action.phase,
        target=resolve_concept(pack),
        op=action.op,
        always=action.always,
        value=pack.tensors.value.tolist(),
    )


def _check_op(intervention: Intervention, path: str) -> None:
    op = intervention.op
    if op is Op.CLAMP and isinstance(intervention.target, DirectionTarget):
        raise InvalidRequestError(f"{path}.op", str(op), "add, clip, block, scale or monitor: a direction has no clamp")
    if intervention.always and op is not Op.CLAMP:
        raise InvalidRequestError(f"{path}.always", True, f"false: always is for clamp, not for {op}")
    if intervention.unit is Unit.MAX_ACTIVATION and op not in TAKES_MAX_ACTIVATION:
        expected = f"{Unit.RAW}: {op} takes no activation"
        raise InvalidRequestError(f"{path}.unit", str(intervention.unit), expected)
    if op in TAKES_VALUE and intervention.value is None:
        raise InvalidRequestError(f"{path}.value", None, f"a finite number: {op} needs one")
    if op not in TAKES_VALUE and intervention.value is not None:
        raise InvalidRequestError(f"{path}.value", intervention.value, f"no value: {op} takes none")


def _values(intervention: Intervention, target: ResolvedTarget, path: str) -> list[float]:
    """The operand of each feature, in activation units and rounded to float32; zeros where the op takes none."""
    unit: Sequence[float] = (1.0,) * len(target.keys)
    if intervention.unit is Unit.MAX_ACTIVATION:
        if target.max_activation is None:
            expected = f"{Unit.RAW}: {target.label} has no recorded maximum activation"
            raise InvalidRequestError(f"{path}.unit", str(intervention.unit), expected)
        unit = target.max_activation
    value = float(intervention.value or 0.0)
    values = [value * maximum for maximum in unit]
    if not all(abs(operand) < FLOAT32_LIMIT for operand in values):
        raise InvalidRequestError(f"{path}.value", intervention.value, "a finite number that float32 can hold")
    return [float(np.float32(operand)) for operand in values]


def _find_policies(names: Sequence[str], catalog: Catalog) -> list[ConceptPack]:
    packs: list[ConceptPack] = []
    for index, name in enumerate(names):
        pack = catalog.policy(name, f"policies[{index}]")
        if pack in packs:
            raise InvalidRequestError(f"policies[{index}]", name, f"each policy once: {pack.tag} is already named")
        packs.append(pack)
    return packs


def _refuse_double_edits(edits: Iterable[_Edit]) -> None:
    """Within a stage every edit reads the same f: two edits of one feature have no defined result."""
    edited: dict[tuple[Stage, Site, Identity], str] = {}
    for edit in edits:
        if edit.op is Op.MONITOR:
            continue
        for identity in edit.target.identities:
            key = (edit.stage, edit.target.site, identity)
            if key in edited:
                field = edit.field if edit.stage is Stage.POLICY else f"{edit.field}.target"
                expected = f"a feature that {edited[key]} does not already edit"
                raise InvalidRequestError(field, f"{edit.target.label}: feature {identity[1]}", expected)
            edited[key] = edit.field


def _refuse_edits_behind_guards(edits: Sequence[_Edit]) -> None:
    """A guard sees what a request did at or before its site; behind it, a request could undo the guard."""
    guards = [edit for edit in edits if edit.stage is Stage.POLICY]
    for edit in edits:
        for guard in guards:
            if edit.stage is Stage.REQUEST and edit.op is not Op.MONITOR and guard.target.site < edit.target.site:
                expected = f"a site not behind {guard.target.site}, where {guard.source} acts, or no such policy"
                raise InvalidRequestError(f"{edit.field}.target", str(edit.target.site), expected)


def _planned(edit: _Edit) -> PlannedIntervention:
    return PlannedIntervention(edit.source, edit.label, edit.target.site, edit.stage, edit.phase)


def _by_place(edits: Sequence[_Edit]) -> list[tuple[Place, list[int]]]:
    """The edits at each site and stage, as indices, in the order in which they apply."""
    places: dict[Place, list[int]] = {}
    for index, edit in enumerate(edits):
        places.setdefault((edit.target.site, edit.stage), []).append(index)
    return sorted(places.items())


def _site_plan(place: Place, edits: Sequence[_Edit], members: Sequence[int]) -> SitePlan:
    chosen = [edits[i] for i in members]
    rows = gather_rows(edit.target for edit in chosen)
    index = {key: i for i, key in enumerate(rows.keys)}
    row = np.array([index[key] for edit in chosen for key in edit.target.keys], dtype=np.int32)
    counts = [len(edit.target.keys) for edit in chosen]
    return SitePlan(
        site=place[0],
        stage=place[1],
        rows=rows,
        row=row,
        op=np.repeat(np.array([_op_code(edit) for edit in chosen], dtype=np.uint8), counts),
        value=np.array([value for edit in chosen for value in edit.value], dtype=np.float32),
        intervention=np.repeat(np.array(members, dtype=np.int32), counts),
        segments=tuple(_segments(chosen, members, counts, rows.W_dec[row])),
    )


def _segments(
    chosen: Sequence[_Edit], members: Sequence[int], counts: Sequence[int], decoder: FloatArray
) -> Iterator[Segments]:
    """The edits at one place by width; ``decoder`` has a row for each entry."""
    first, width = np.cumsum([0, *counts[:-1]], dtype=np.int32), np.array(counts)
    weight = np.concatenate([edit.target.weight for edit in chosen])
    for each in sorted(set(counts)):
        of_width = np.flatnonzero(width == each)
        entries = first[of_width, None] + np.arange(each)
        directions = decoder[entries].astype(np.float64)
        yield Segments(
            intervention=np.array(members, dtype=np.int32)[of_width],
            first=first[of_width],
            weight=weight[entries],
            gram=directions @ directions.transpose(0, 2, 1),
        )


def _op_code(edit: _Edit) -> OpCode:
    match edit.op:
        case Op.MONITOR:
            return OpCode.MONITOR
        case Op.CLAMP:
            return OpCode.CLAMP_ALWAYS if edit.always else OpCode.CLAMP
        case Op.CLIP:
            return OpCode.CLIP
        case Op.SCALE | Op.BLOCK:
            return OpCode.SCALE
        case Op.ADD:
            return OpCode.ADD


def _plan_hash(plan: Plan) -> str:
    """SHA-256 over every name and array of the plan; each piece is preceded by its length."""
    digest = hashlib.sha256()
    for piece in _pieces(plan):
        digest.update(struct.pack("<q", len(piece)))
        digest.update(piece)
    return digest.hexdigest()


def _pieces(plan: Plan) -> Iterator[bytes | memoryview]:
    names = [(p.source, p.label, str(p.site), p.stage.name, str(p.phase)) for p in plan.interventions]
    yield repr((names, plan.policies, list(plan.packs.items()))).encode()
    for part in plan.sites:
        yield repr((str(part.site), part.stage.name, part.rows.keys)).encode()
        rows = part.rows
        arrays: list[npt.NDArray[Any]] = [rows.W_enc, rows.b_enc, rows.threshold, rows.max_norm, rows.W_dec]
        arrays += [part.row, part.op, part.value, part.intervention]
        arrays += [segments.weight for segments in part.segments]
        yield from (array.ravel().view(np.uint8).data for array in arrays)
