"""Compile a steering spec and policies into a ``Plan``: names become arrays, here and nowhere later.

Everything that can be wrong with a spec is refused here, at admission, under the path of its field.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.catalog import Catalog
from steerserve.steering.edits import (
    Detector,
    DetectorKey,
    Edit,
    compile_guard,
    compile_intervention,
    compile_policy,
    compile_rewind,
    monitor_of,
)
from steerserve.steering.packs import ConceptPack
from steerserve.steering.plan import (
    ByteArray,
    Plan,
    PlannedGuard,
    PlannedIntervention,
    PlannedScore,
    Segments,
    SitePlan,
    Stage,
    plan_hash,
)
from steerserve.steering.refusals import (
    refuse_double_edits,
    refuse_edits_behind_policies,
    refuse_large_plan,
    refuse_other_sites,
)
from steerserve.steering.targets import Identity, gather_rows
from steerserve.types import FloatArray, Guard, Op, Site, SteeringSpec

OP_CODES = {
    Op.CLAMP: OpCode.CLAMP,
    Op.CLIP: OpCode.CLIP,
    Op.BLOCK: OpCode.SCALE,  # by 0
    Op.SCALE: OpCode.SCALE,
    Op.ADD: OpCode.ADD,
    Op.MONITOR: OpCode.MONITOR,
}

Place = tuple[Site, Stage]
NumberedEdit = tuple[int, Edit]
"""An edit and its index in ``Plan.interventions``."""


def compile_plan(spec: SteeringSpec, policies: Sequence[str], catalog: Catalog, sites: Set[Site] | None = None) -> Plan:
    """Compile for the catalog's model; an empty spec without policies gives the empty plan.

    Args:
        sites: those that can be steered; None: all.

    Raises:
        InvalidRequestError: unknown names, bad values, a feature edited twice in one stage, a gate behind its edit,
            an edit behind a policy, a second guard that rewinds, or too many features.
        IncompatibleError: a site or a vector that does not fit the model, or a site that can not be steered.
    """
    asked = [
        edit
        for index, intervention in enumerate(spec.interventions)
        for edit in compile_intervention(intervention, f"steering.interventions[{index}]", catalog)
    ]
    guards = [compile_guard(guard, f"steering.guards[{index}]", catalog) for index, guard in enumerate(spec.guards)]
    rewound, max_retries = _compile_rewind(spec.guards, catalog)
    packs = _find_policies(policies, catalog)
    bound = [edit for index, pack in enumerate(packs) for edit in compile_policy(pack, f"policies[{index}]")]
    for together in (asked, rewound, bound):
        refuse_double_edits(together)
    refuse_edits_behind_policies([*asked, *rewound], bound)
    gates = _gates([*asked, *rewound])
    monitors = [replace(monitor, score=index) for index, monitor in enumerate([*gates.values(), *guards])]
    kept = [*_gated(asked, gates), *monitors]
    edits = [*kept, *_gated(rewound, gates), *bound]
    refuse_other_sites(edits, sites)
    refuse_large_plan(edits)
    plan = Plan(
        interventions=tuple(_planned(edit) for edit in edits),
        levels=_levels(edits, range(len(kept), len(kept) + len(rewound)), max_retries),
        scores=tuple(_planned_scores(edits)),
        guards=tuple(_planned_guards(spec.guards, monitors[len(gates) :])),
        policies=tuple(pack.tag for pack in packs),
        packs={pack.tag: pack.sha256 for edit in edits if (pack := edit.target.pack) is not None},
        hash="",
    )
    return replace(plan, hash=plan_hash(plan)) if edits else plan


def _compile_rewind(guards: Sequence[Guard], catalog: Catalog) -> tuple[list[Edit], int]:
    """The edits of the one guard that may rewind, as the first retry has them, and how many retries there are."""
    rewinds = [(f"steering.guards[{i}].rewind", guard.rewind) for i, guard in enumerate(guards) if guard.rewind]
    if len(rewinds) > 1:
        raise InvalidRequestError(rewinds[1][0], "a second rewind", f"none: a request has one, here {rewinds[0][0]}")
    if not rewinds:
        return [], 0
    path, rewind = rewinds[0]
    return compile_rewind(rewind, path, catalog), rewind.max_retries


def _find_policies(names: Sequence[str], catalog: Catalog) -> list[ConceptPack]:
    packs: list[ConceptPack] = []
    for index, name in enumerate(names):
        pack = catalog.policy(name, f"policies[{index}]")
        if pack in packs:
            raise InvalidRequestError(f"policies[{index}]", name, f"each policy once: {pack.tag} is already named")
        packs.append(pack)
    return packs


def _gates(edits: Iterable[Edit]) -> dict[DetectorKey, Edit]:
    """The monitors that the edits' gates read; equal gates share one."""
    detectors: dict[DetectorKey, Detector] = {}
    gated: dict[DetectorKey, dict[str, None]] = {}  # of one intervention at several sites, the field once
    for edit in edits:
        if edit.detector is not None:
            detectors.setdefault(edit.detector.key, edit.detector)
            gated.setdefault(edit.detector.key, {})[edit.field] = None
    monitors = {}
    for key, (first, *others) in gated.items():
        purpose = f"gate of {first.removeprefix('steering.')}{f' and {len(others)} more' if others else ''}"
        monitors[key] = monitor_of(detectors[key], f"{first}.gate", Stage.REQUEST, purpose)
    return monitors


def _gated(edits: Iterable[Edit], gates: Iterable[DetectorKey]) -> list[Edit]:
    """The edits with the indices of their gates' scores; the gates' are the first."""
    score = {key: index for index, key in enumerate(gates)}
    return [edit if edit.detector is None else replace(edit, score=score[edit.detector.key]) for edit in edits]


def _planned_scores(edits: Iterable[Edit]) -> Iterator[PlannedScore]:
    """In the order in which the monitors that feed them are numbered."""
    for index, edit in enumerate(edits):
        if edit.op is Op.MONITOR and edit.detector is not None:
            yield PlannedScore(index, edit.detector.threshold, edit.phase)


def _planned_guards(guards: Sequence[Guard], monitors: Sequence[Edit]) -> Iterator[PlannedGuard]:
    for guard, monitor in zip(guards, monitors, strict=True):
        yield PlannedGuard(monitor.score, monitor.label, guard.action, guard.rewind, guard.fail_open)


def _planned(edit: Edit) -> PlannedIntervention:
    return PlannedIntervention(edit.source, edit.label, edit.target.site, edit.stage, edit.phase)


def _levels(edits: Sequence[Edit], rewound: range, max_retries: int) -> tuple[tuple[SitePlan, ...], ...]:
    """The site plans of every level; a site's plan that several levels share is one object.

    Args:
        rewound: which of the edits belong to the rewind. They follow all others of their stage.
    """
    base = [(index, edit) for index, edit in enumerate(edits) if index not in rewound]
    places = [_by_place(base)]
    if max_retries:
        replaced = {(edits[i].target.site, identity) for i in rewound for identity in edits[i].target.identities}
        left = [(index, rest) for index, edit in base if (rest := _without(edit, replaced)) is not None]
        places.append(_by_place([*left, *((i, edits[i]) for i in rewound)]))
    distinct = {members: place for level in places for place, members in level.items()}
    built = {members: _site_plan(place, members) for members, place in distinct.items()}
    levels = [tuple(built[members] for members in level.values()) for level in places]
    further = range(2, max_retries + 1)
    return (*levels, *(tuple(_escalated(part, rewound, retry) for part in levels[-1]) for retry in further))


def _without(edit: Edit, replaced: Set[tuple[Site, Identity]]) -> Edit | None:
    """A request's edit without the features that the edits of a rewind replace; None if nothing is left of it."""
    target = edit.target
    kept = [i for i, identity in enumerate(target.identities) if (target.site, identity) not in replaced]
    if edit.stage is Stage.POLICY or edit.op is Op.MONITOR or len(kept) == len(target.identities):
        return edit
    if not kept:
        return None
    rest = replace(
        target,
        features=[target.features[i] for i in kept],
        keys=tuple(target.keys[i] for i in kept),
        identities=tuple(target.identities[i] for i in kept),
        weight=target.weight[kept],
    )
    return replace(edit, target=rest, value=[edit.value[i] for i in kept])


def _escalated(part: SitePlan, rewound: range, retry: int) -> SitePlan:
    """What the first retry does, with the operands of the ``retry``-th."""
    factor = np.where(np.isin(part.intervention, rewound), np.float32(retry), np.float32(1.0))
    value = part.value * factor
    return part if np.array_equal(value, part.value) else replace(part, value=value)


def _by_place(edits: Iterable[NumberedEdit]) -> dict[Place, tuple[NumberedEdit, ...]]:
    """The edits at each site and stage, in the order in which they apply."""
    places: dict[Place, list[NumberedEdit]] = {}
    for index, edit in edits:
        places.setdefault((edit.target.site, edit.stage), []).append((index, edit))
    return {place: tuple(places[place]) for place in sorted(places)}


def _site_plan(place: Place, members: Sequence[NumberedEdit]) -> SitePlan:
    numbers, chosen = [index for index, _ in members], [edit for _, edit in members]
    rows = gather_rows(edit.target for edit in chosen)
    index = {key: i for i, key in enumerate(rows.keys)}
    row = np.array([index[key] for edit in chosen for key in edit.target.keys], dtype=np.int32)
    counts = [len(edit.target.keys) for edit in chosen]
    return SitePlan(
        site=place[0],
        stage=place[1],
        rows=rows,
        row=row,
        op=np.concatenate(
            [_op_codes(edit, rows.threshold[[index[key] for key in edit.target.keys]]) for edit in chosen]
        ),
        value=np.array([value for edit in chosen for value in edit.value], dtype=np.float32),
        intervention=np.repeat(np.array(numbers, dtype=np.int32), counts),
        score_index=np.repeat(np.array([edit.score for edit in chosen], dtype=np.int32), counts),
        segments=tuple(_segments(chosen, numbers, counts, rows.W_dec[row])),
    )


def _segments(
    chosen: Sequence[Edit], members: Sequence[int], counts: Sequence[int], decoder: FloatArray
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


def _op_codes(edit: Edit, threshold: FloatArray) -> ByteArray:
    """The code of each row; ``threshold`` ``[k]`` is the rows' own.

    A policy clips features where they are active. The kernel's clip would push an inactive one, which reads 0,
    down to a cap below 0; where the feature is active, such a cap is a clamp.
    """
    code = OpCode.CLAMP_ALWAYS if edit.always else OP_CODES[edit.op]
    codes = np.full(len(threshold), code, dtype=np.uint8)
    if edit.op is Op.CLIP and edit.stage is Stage.POLICY:
        codes[np.isfinite(threshold) & (np.array(edit.value) < 0)] = OpCode.CLAMP
    return codes
