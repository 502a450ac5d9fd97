"""What a policy's rules come to: edits and readings of the packs and heads they name, with every term worked out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.steering.edits import (
    FLOAT32_LIMIT,
    TAKES_VALUE,
    Detector,
    Edit,
    Watch,
    check_op,
    edit_label,
    monitor_of,
    operands,
)
from steerserve.steering.packs import ConceptPack, ModelFacts
from steerserve.steering.plan import FeatureRows, Stage
from steerserve.steering.policies import Policy, RewindTerms, Rule, RuleEdit, rewind_of
from steerserve.steering.targets import ResolvedTarget, detector_rows, edited_rows, resolve_head
from steerserve.types import ConceptTarget, HeadTarget, Intervention, Op, Phase, Target


@dataclass(frozen=True, eq=False)
class BoundPolicy:
    """A policy's edits, and what it watches, in the order of its rules."""

    policy: Policy
    edits: tuple[Edit, ...]
    watches: tuple[Watch, ...]


@dataclass(frozen=True, eq=False)
class _Place:
    """One rule of a policy, and what it is worked out on."""

    rule: Rule
    pack: ConceptPack | None
    model: ModelFacts | None
    path: str

    @property
    def concept(self) -> ConceptPack:
        """The pack of a rule that reads, or edits a concept."""
        assert self.pack is not None, "the schema lets only edits of heads go without"
        return self.pack


def bind_policy(
    policy: Policy, packs: Mapping[str, ConceptPack], model: ModelFacts | None, field: str | None = None
) -> BoundPolicy:
    """Work out a policy's rules on the packs, all of which must be there.

    Args:
        model: whose heads they edit; None: edits of heads are left out.
        field: where a request names the policy: what is wrong with its edits among others is refused there, not at
            the policy's own fields.

    Raises:
        InvalidRequestError: a term of a rule does not fit what it edits.
        IncompatibleError: the model has no such head.
    """
    edits: list[Edit] = []
    watches: list[Watch] = []
    for index, rule in enumerate(policy.rules):
        pack = None if rule.concept is None else packs[rule.concept]
        place = _Place(rule, pack, model, f"rules[{index}]")
        edits += _edits_of(place, policy.source)
        if rule.guard_action is not None:
            watches.append(_watch_of(place, index, policy.source))
    if field is not None:
        edits = [replace(edit, field=field) for edit in edits]
        watches = [_named_at(watch, field) for watch in watches]
    return BoundPolicy(policy, tuple(edits), tuple(watches))


def _named_at(watch: Watch, field: str) -> Watch:
    rewound = tuple(replace(edit, field=field) for edit in watch.rewound)
    return replace(watch, monitor=replace(watch.monitor, field=field), rewound=rewound)


def _edits_of(place: _Place, source: str) -> list[Edit]:
    rule = place.rule
    match rule.applied_edit:
        case "calibrated":
            bare = _calibrated(place)
        case RuleEdit() as edit:
            bare = _explicit(edit, place, f"{place.path}.edit")
        case None:
            bare = []
    return [replace(edit, source=source, fail_open=rule.fail_open) for edit in bare]


def _calibrated(place: _Place) -> list[Edit]:
    """The pack's own action at each site; a pack that only reads is read."""
    pack, phase = place.concept, place.rule.phase
    action = pack.card.policy
    targets = (detector_rows(pack),) if action.op is Op.MONITOR else edited_rows(pack)
    return [_edit(target, action.op, action.always, _recorded(pack, target), phase or action.phase, place.path)
            for target in targets]  # fmt: skip


def _recorded(pack: ConceptPack, target: ResolvedTarget) -> list[float]:
    values = pack.at(target.site).value[target.features]
    return [float(value) if pack.card.policy.op in TAKES_VALUE else 0.0 for value in values]


def _explicit(edit: RuleEdit, place: _Place, path: str, max_retries: int = 1) -> list[Edit]:
    phase = place.rule.phase or Phase.ALL
    edits: list[Edit] = []
    for target, resolved in _aims(edit, place, path):
        intervention = Intervention(target, edit.op, edit.value, edit.unit, edit.always)
        check_op(intervention, path)
        edits += [
            _edit(each, edit.op, edit.always, operands(intervention, each, path, max_retries), phase, path)
            for each in resolved
        ]
    return edits


def _aims(edit: RuleEdit, place: _Place, path: str) -> Iterator[tuple[Target, Sequence[ResolvedTarget]]]:
    """What an edit that is written out changes."""
    if edit.heads is None:
        yield ConceptTarget(place.concept.name), edited_rows(place.concept)
        return
    for index, name in enumerate(edit.heads):
        head = HeadTarget.parse(name)
        yield head, () if place.model is None else (resolve_head(head, f"{path}.heads[{index}]", place.model),)


def _edit(target: ResolvedTarget, op: Op, always: bool, values: list[float], phase: Phase, path: str) -> Edit:
    label = edit_label(target, op, always, values)
    return Edit(path, "", label, Stage.POLICY, phase, target, op, always, values)


def _watch_of(place: _Place, index: int, source: str) -> Watch:
    rule, pack, path = place.rule, place.concept, place.path
    assert rule.guard_action is not None
    threshold = pack.card.detector.threshold if rule.threshold is None else rule.threshold
    if not abs(threshold) < FLOAT32_LIMIT:
        raise InvalidRequestError(f"{path}.threshold", threshold, "a finite number that float32 can hold")
    detector = Detector(detector_rows(pack), float(np.float32(threshold)), rule.phase or Phase.ALL)
    monitor = monitor_of(detector, path, Stage.POLICY, f"rule {rule.label}")
    monitor = replace(monitor, source=source, fail_open=rule.fail_open)
    terms = rule.rewind_terms
    if terms is None:
        return Watch(monitor, index, rule.label, rule.guard_action)
    rewound = tuple(
        replace(edit, source=source, label=f"rewind: {edit.label}", phase=Phase.ALL, fail_open=rule.fail_open)
        for edit in _rewound(terms, place)
    )
    return Watch(monitor, index, rule.label, rule.guard_action, rewind_of(terms), rewound)


def _rewound(terms: RewindTerms, place: _Place) -> list[Edit]:
    rule, pack, path = place.rule, place.concept, place.path
    if terms.edit is not None:
        return _explicit(terms.edit, place, f"{path}.rewind.edit", terms.retries)
    if not isinstance(rule.edit, RuleEdit) and pack.card.policy.op is Op.MONITOR:
        expected = f"an edit: concept {pack.name} has no calibrated one, and the same tokens would come back"
        raise InvalidRequestError(f"{path}.rewind.edit", None, expected)
    own = _explicit(rule.edit, place, path) if isinstance(rule.edit, RuleEdit) else _calibrated(place)
    return [replace(edit, grows=True) for edit in own]


def enlarged(edit: Edit, times: int) -> Edit:
    """The edit ``times`` as large: x' = x + times · Σ (f' − f) W_dec, whatever its operation."""
    target, source = edit.target, edit.target.source
    assert isinstance(source, FeatureRows), "policies edit the rows of packs and of heads"
    keys = tuple((f"{name}x{times}", row) for name, row in source.keys)
    rows = replace(source, keys=keys, W_dec=np.float32(times) * source.W_dec)
    chosen = tuple(keys[feature] for feature in target.features)
    return replace(edit, target=replace(target, source=rows, keys=chosen))


def without_repeats(edits: Iterable[Edit]) -> list[Edit]:
    """Policies that make the very same edit make it once, in the name of the first; it fails open if all of them do."""
    kept: list[Edit] = []
    for edit in edits:
        same = next((index for index, other in enumerate(kept) if is_same_edit(edit, other)), None)
        if same is None:
            kept.append(edit)
        else:
            kept[same] = replace(kept[same], fail_open=kept[same].fail_open and edit.fail_open)
    return kept


def is_same_edit(edit: Edit, other: Edit) -> bool:
    """Both do the same at the same positions."""

    def terms(each: Edit) -> tuple[object, ...]:
        target = each.target
        return target.site, target.keys, each.op, each.always, list(each.value), each.phase

    return terms(edit) == terms(other)
