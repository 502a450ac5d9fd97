"""Compile a steering spec and policies into a ``Plan``: names become arrays, here and nowhere later.

Everything that can be wrong with a spec is refused here, at admission, under the path of its field.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.bound_policies import bind_policy, enlarged, without_repeats
from steerserve.steering.catalog import Catalog
from steerserve.steering.edits import (
    Detector,
    DetectorKey,
    Edit,
    Watch,
    compile_guard,
    compile_intervention,
    monitor_of,
)
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
from steerserve.steering.policies import Policy
from steerserve.steering.refusals import (
    overriding,
    refuse_double_edits,
    refuse_edits_behind_policies,
    refuse_foreign_rewinds,
    refuse_large_plan,
    refuse_other_sites,
    refuse_second_rewind,
)
from steerserve.steering.targets import Identity, gather_rows
from steerserve.types import FloatArray, Op, Site, SteeringSpec

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


def compile_plan(
    spec: SteeringSpec,
    policies: Sequence[str],
    catalog: Catalog,
    sites: Set[Site] | None = None,
    monitors: Sequence[Edit] = (),
) -> Plan:
    """Compile for the catalog's model; an empty spec without policies and monitors gives the empty plan.

    Args:
        sites: those that can be steered; None: all.
        monitors: what the server reads besides, at any site; no limit of a request counts it.

    Raises:
        InvalidRequestError: unknown names, bad values, a feature edited twice in one stage, a gate behind its edit,
            an edit behind a policy, a second guard or rule that rewinds, or too many features.
        IncompatibleError: a site or a vector that does not fit the model, or a site that can not be steered.
    """
    asked = [
        edit
        for index, intervention in enumerate(spec.interventions)
        for edit in compile_intervention(intervention, f"steering.interventions[{index}]", catalog)
    ]
    guards = [compile_guard(guard, i, f"steering.guards[{i}]", catalog) for i, guard in enumerate(spec.guards)]
    named = find_policies(policies, catalog)
    bound = [
        bind_policy(policy, catalog.packs, catalog.model, f"policies[{index}]") for index, policy in enumerate(named)
    ]
    rules = [watch for policy in bound for watch in policy.watches]
    enforced = without_repeats(edit for policy in bound for edit in policy.edits)
    rewinding = refuse_second_rewind([*rules, *guards])
    rewound = () if rewinding is None else rewinding.rewound
    own_rewound = [edit for edit in rewound if edit.stage is Stage.REQUEST]
    for together in (asked, own_rewound, enforced):
        refuse_double_edits(together)
    refuse_foreign_rewinds(rewound, enforced)
    refuse_edits_behind_policies([*asked, *own_rewound], enforced)
    gates = _gates([*asked, *own_rewound])
    watches = [*guards, *rules]
    scored = (*gates.values(), *(watch.monitor for watch in watches))
    detectors = [replace(monitor, score=index) for index, monitor in enumerate(scored)]
    num_own = len(gates) + len(guards)
    front = [*monitors, *_gated(asked, gates), *detectors[:num_own], *_gated(own_rewound, gates)]
    edits = [*front, *enforced, *detectors[num_own:], *(edit for edit in rewound if edit.stage is Stage.POLICY)]
    refuse_other_sites(edits[len(monitors) :], sites)
    refuse_large_plan(edits[len(monitors) :])
    last = len(front) if own_rewound else len(edits)
    plan = Plan(
        interventions=tuple(_planned(edit, enforced) for edit in edits),
        levels=_levels(edits, range(last - len(rewound), last), rewinding),
        scores=tuple(_planned_scores(edits)),
        guards=tuple(_planned_guards(watches, detectors[len(gates) :])),
        policies=tuple(policy.tag for policy in named),
        packs={pack.tag: pack.sha256 for edit in edits if (pack := edit.target.pack) is not None},
        hash="",
        num_monitors=len(monitors),
    )
    return replace(plan, hash=plan_hash(plan)) if edits else plan


def find_policies(names: Sequence[str], catalog: Catalog) -> list[Policy]:
    """The policies that a request names.

    Raises:
        InvalidRequestError: one that is not loaded, or named twice.
    """
    policies: list[Policy] = []
    for index, name in enumerate(names):
        policy = catalog.policy(name, f"policies[{index}]")
        if policy in policies:
            raise InvalidRequestError(f"policies[{index}]", name, f"each policy once: {policy.tag} is already named")
        policies.append(policy)
    return policies


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


def _planned_guards(watches: Sequence[Watch], monitors: Sequence[Edit]) -> Iterator[PlannedGuard]:
    for watch, monitor in zip(watches, monitors, strict=True):
        yield PlannedGuard(
            monitor.score, monitor.source, watch.place, watch.label, watch.action, watch.rewind, monitor.fail_open
        )


def _planned(edit: Edit, enforced: Sequence[Edit]) -> PlannedIntervention:
    return PlannedIntervention(
        edit.source,
        edit.label,
        edit.target.site,
        edit.stage,
        edit.phase,
        edit.op is not Op.MONITOR,
        edit.fail_open,
        overriding(edit, enforced),
    )


def _levels(edits: Sequence[Edit], rewound: range, rewinding: Watch | None) -> tuple[tuple[SitePlan, ...], ...]:
    """The site plans of every level; a site's plan that several levels share is one object.

    Args:
        rewound: which of the edits belong to the rewind. They follow all others of their stage.
        rewinding: whose rewind it is.
    """
    base = [(index, edit) for index, edit in enumerate(edits) if index not in rewound]
    places = [_by_place(base)]
    retries = range(1, rewinding.rewind.max_retries + 1 if rewinding and rewinding.rewind else 1)
    if retries:
        replaced = {
            (edits[i].stage, edits[i].target.site, identity) for i in rewound for identity in edits[i].target.identities
        }
        left = [(index, rest) for index, edit in base if (rest := _without(edit, replaced)) is not None]
    for retry in retries:
        places.append(_by_place([*left, *((i, _grown(edits[i], retry)) for i in rewound)]))
    distinct = {members: place for level in places for place, members in level.items()}
    built = {members: _site_plan(place, members) for members, place in distinct.items()}
    levels = [tuple(built[members] for members in level.values()) for level in places]
    scaled = [i for i in rewound if not edits[i].grows]
    return (*levels[:2], *(tuple(_escalated(p, scaled, r + 2) for p in level) for r, level in enumerate(levels[2:])))


def _grown(edit: Edit, retry: int) -> Edit:
    """The edit of the ``retry``-th retry, if it is one that grows; ``_escalated`` scales the operands of the others."""
    return enlarged(edit, 1 + retry) if edit.grows else edit


def _without(edit: Edit, replaced: Set[tuple[Stage, Site, Identity]]) -> Edit | None:
    """An edit without the features that the edits of a rewind replace; None if nothing is left of it."""
    target = edit.target
    kept = [i for i, identity in enumerate(target.identities) if (edit.stage, target.site, identity) not in replaced]
    if edit.op is Op.MONITOR or len(kept) == len(target.identities):
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


def _escalated(part: SitePlan, scaled: Sequence[int], retry: int) -> SitePlan:
    """What the first retry does, with the operands that the ``retry``-th gives the ``scaled`` interventions."""
    factor = np.where(np.isin(part.intervention, scaled), np.float32(retry), np.float32(1.0))
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
