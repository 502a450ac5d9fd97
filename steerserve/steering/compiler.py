"""Compile a steering spec and policies into a ``Plan``: names become arrays, here and nowhere later.

Everything that can be wrong with a spec is refused here, at admission, under the path of its field.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack
from steerserve.steering.plan import FeatureRows, IntArray, Plan, PlannedIntervention, SitePlan, Stage
from steerserve.steering.targets import Identity, ResolvedTarget, resolve_concept, resolve_target
from steerserve.types import DirectionTarget, FloatArray, Intervention, Op, Phase, Site, SteeringSpec, Unit

TAKES_VALUE = frozenset({Op.CLAMP, Op.CLIP, Op.SCALE, Op.ADD})
TAKES_MAX_ACTIVATION = frozenset({Op.CLAMP, Op.CLIP, Op.ADD})


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
    value: FloatArray

    @property
    def label(self) -> str:
        operand = f" {self.value[0]:g}" if self.op in TAKES_VALUE and len(set(self.value.tolist())) == 1 else ""
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
        sites=tuple(_site_plans(edits)),
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
        value=pack.tensors.value,
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


def _values(intervention: Intervention, target: ResolvedTarget, path: str) -> FloatArray:
    """The operand of each feature, in activation units; zeros where the op takes none."""
    unit = np.ones(len(target.rows))
    if intervention.unit is Unit.MAX_ACTIVATION:
        if target.max_activation is None:
            expected = f"{Unit.RAW}: {target.label} has no recorded maximum activation"
            raise InvalidRequestError(f"{path}.unit", str(intervention.unit), expected)
        unit = target.max_activation.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        values = ((intervention.value or 0.0) * unit).astype(np.float32)
    if not np.isfinite(values).all():
        raise InvalidRequestError(f"{path}.value", intervention.value, "a finite number that float32 can hold")
    return values


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
    decoder = edit.target.rows.W_dec.astype(np.float64)
    return PlannedIntervention(
        source=edit.source,
        label=edit.label,
        site=edit.target.site,
        stage=edit.stage,
        phase=edit.phase,
        weight=edit.target.weight,
        gram=(decoder @ decoder.T).astype(np.float32),
    )


def _site_plans(edits: Sequence[_Edit]) -> Iterator[SitePlan]:
    places = sorted({(edit.target.site, edit.stage) for edit in edits})
    for site, stage in places:
        members = [i for i, edit in enumerate(edits) if (edit.target.site, edit.stage) == (site, stage)]
        rows, row = _distinct_rows([edits[i].target.rows for i in members])
        counts = [len(edits[i].target.rows) for i in members]
        yield SitePlan(
            site=site,
            stage=stage,
            rows=rows,
            row=row,
            op=np.repeat([_op_code(edits[i]) for i in members], counts).astype(np.uint8),
            value=np.concatenate([edits[i].value for i in members]),
            intervention=np.repeat(members, counts).astype(np.int32),
        )


def _distinct_rows(parts: Sequence[FeatureRows]) -> tuple[FeatureRows, IntArray]:
    """All rows without repeats, and for each row of ``parts`` its index among them."""
    keys = [key for part in parts for key in part.keys]
    first_at: dict[tuple[str, int], int] = {}
    for position, key in enumerate(keys):
        first_at.setdefault(key, position)
    first = list(first_at.values())
    index = {key: i for i, key in enumerate(first_at)}
    rows = FeatureRows(
        keys=tuple(index),
        W_enc=np.concatenate([part.W_enc for part in parts])[first],
        b_enc=np.concatenate([part.b_enc for part in parts])[first],
        threshold=np.concatenate([part.threshold for part in parts])[first],
        max_norm=np.concatenate([part.max_norm for part in parts])[first],
        W_dec=np.concatenate([part.W_dec for part in parts])[first],
    )
    return rows, np.array([index[key] for key in keys], dtype=np.int32)


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
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def _pieces(plan: Plan) -> Iterator[bytes]:
    for planned in plan.interventions:
        names = (planned.source, planned.label, str(planned.site), planned.stage.name, planned.phase)
        yield from (name.encode() for name in names)
        yield planned.weight.tobytes()
    for part in plan.sites:
        yield f"{part.site} {part.stage.name}".encode()
        yield repr(part.rows.keys).encode()
        rows = part.rows
        bank = (rows.W_enc, rows.b_enc, rows.threshold, rows.max_norm, rows.W_dec)
        for array in (*bank, part.row, part.op, part.value):
            yield array.tobytes()
        yield part.intervention.tobytes()
    for name in (*plan.policies, *plan.packs.keys(), *plan.packs.values()):
        yield name.encode()
