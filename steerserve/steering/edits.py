"""One intervention, gate or guard of a request on its own: checked, its target resolved, its operands worked out.

Whatever is wrong with it is refused under the path of its field. What several of them may not do
together is the compiler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.steering.catalog import Catalog
from steerserve.steering.plan import FeatureKey, Stage
from steerserve.steering.targets import ResolvedTarget, resolve_edited, resolve_read
from steerserve.types import (
    DirectionTarget,
    Gate,
    Guard,
    GuardAction,
    HeadTarget,
    Intervention,
    Op,
    Phase,
    Rewind,
    Site,
    Unit,
)

TAKES_VALUE = frozenset({Op.CLAMP, Op.CLIP, Op.SCALE, Op.ADD})
TAKES_MAX_ACTIVATION = frozenset({Op.CLAMP, Op.CLIP, Op.ADD})
FLOAT32_LIMIT = 2.0**128 - 2.0**103
"""The smallest number that rounds to infinity in float32."""

REQUEST = "request"
"""Source of everything that no policy brought."""

DetectorKey = tuple[Site, tuple[FeatureKey, ...], float, Phase]


@dataclass(frozen=True, eq=False)
class Detector:
    """A target's score and the threshold, rounded to float32, that a gate or a guard compares it with."""

    target: ResolvedTarget
    threshold: float
    phase: Phase

    @property
    def key(self) -> DetectorKey:
        """Equal for detectors that give the same answer when read in the same stage."""
        return self.target.site, self.target.keys, self.threshold, self.phase


@dataclass(frozen=True, eq=False)
class Edit:
    """One intervention at one site, with its target resolved.

    Attributes:
        field: its path in the request.
        value: ``[k]`` operands in activation units; of a monitor that feeds a score, the features' weights in it.
        detector: what a monitor feeds, or what gates an edit.
        score: index of the detector's score; −1 without one, or as long as the compiler has not numbered them.
        fail_open: the response goes on where this could not be read or edited; only of guards and policies.
        grows: of a rewind, the r-th retry makes the edit 1 + r times as large, instead of its operands r times.
    """

    field: str
    source: str
    label: str
    stage: Stage
    phase: Phase
    target: ResolvedTarget
    op: Op
    always: bool
    value: Sequence[float]
    detector: Detector | None = None
    score: int = -1
    fail_open: bool = False
    grows: bool = False


@dataclass(frozen=True, eq=False)
class Watch:
    """A guard of the request, or a rule of a policy that acts on a score.

    Attributes:
        monitor: what feeds the score.
        place: its index among the request's guards, or the policy's rules.
        rewound: the edits of its rewind, if it has one, as the first retry has them.
    """

    monitor: Edit
    place: int
    label: str
    action: GuardAction
    rewind: Rewind | None = None
    rewound: tuple[Edit, ...] = ()


def compile_intervention(intervention: Intervention, path: str, catalog: Catalog, max_retries: int = 1) -> list[Edit]:
    """An intervention of a request, an edit for each site; ``max_retries`` times its operands must still be in range.

    Raises:
        InvalidRequestError: unknown names or bad values.
        IncompatibleError: a site or a vector that does not fit the model.
    """
    check_op(intervention, path)
    if intervention.op is Op.MONITOR:
        targets: Sequence[ResolvedTarget] = [resolve_read(intervention.target, f"{path}.target", catalog)]
    else:
        targets = resolve_edited(intervention.target, f"{path}.target", catalog)
    return [_edit_at(intervention, target, path, catalog, max_retries) for target in targets]


def _edit_at(intervention: Intervention, target: ResolvedTarget, path: str, catalog: Catalog, max_retries: int) -> Edit:
    values = operands(intervention, target, path, max_retries)
    return Edit(
        field=path,
        source=REQUEST,
        label=edit_label(target, intervention.op, intervention.always, values),
        stage=Stage.REQUEST,
        phase=intervention.phase,
        target=target,
        op=intervention.op,
        always=intervention.always,
        value=values,
        detector=_compile_gate(intervention, target, path, catalog),
    )


def compile_guard(guard: Guard, place: int, path: str, catalog: Catalog) -> Watch:
    """A guard of the request, the ``place``-th.

    Raises:
        InvalidRequestError: unknown names, a bad threshold, or a bad rewind.
        IncompatibleError: a site or a vector that does not fit the model.
    """
    monitor = monitor_of(_compile_detector(guard, guard.phase, path, catalog), path, Stage.POLICY, "guard")
    rewound = () if guard.rewind is None else compile_rewind(guard.rewind, f"{path}.rewind", catalog)
    monitor = replace(monitor, fail_open=guard.fail_open)
    return Watch(monitor, place, monitor.label, guard.action, guard.rewind, tuple(rewound))


def monitor_of(detector: Detector, path: str, stage: Stage, purpose: str) -> Edit:
    """The monitor that feeds a detector's score."""
    return Edit(
        field=path,
        source=REQUEST,
        label=f"{purpose}: {detector.target.label} > {detector.threshold:g}",
        stage=stage,
        phase=detector.phase,
        target=detector.target,
        op=Op.MONITOR,
        always=False,
        value=detector.target.weight.tolist(),
        detector=detector,
    )


def compile_rewind(rewind: Rewind, path: str, catalog: Catalog) -> list[Edit]:
    """The edits of a rewind as the first retry has them.

    Raises:
        InvalidRequestError: no edit, a reading, another phase than ``ALL``, unknown names or bad values.
        IncompatibleError: a site or a vector that does not fit the model.
    """
    if not rewind.edits:
        raise InvalidRequestError(f"{path}.edits", [], "at least one: without, the same tokens would come back")
    edits: list[Edit] = []
    for index, intervention in enumerate(rewind.edits):
        field = f"{path}.edits[{index}]"
        if intervention.op is Op.MONITOR:
            raise InvalidRequestError(
                f"{field}.op", str(Op.MONITOR), "add, block, clamp, clip or scale: a rewind edits"
            )
        if intervention.phase is not Phase.ALL:
            expected = f"{Phase.ALL}: it covers every position from the rewind on"
            raise InvalidRequestError(f"{field}.phase", str(intervention.phase), expected)
        compiled = compile_intervention(intervention, field, catalog, rewind.max_retries)
        edits += [replace(edit, label=f"rewind: {edit.label}") for edit in compiled]
    return edits


def _compile_gate(intervention: Intervention, edited: ResolvedTarget, path: str, catalog: Catalog) -> Detector | None:
    if intervention.gate is None:
        return None
    if intervention.op is Op.MONITOR:
        raise InvalidRequestError(f"{path}.gate", "a gate", f"none: {Op.MONITOR} has no edit to gate")
    detector = _compile_detector(intervention.gate, intervention.phase, f"{path}.gate", catalog)
    if edited.site < detector.target.site:
        expected = f"a site at or before {edited.site}, where the edit is: a gate must be read first"
        raise InvalidRequestError(f"{path}.gate.target", str(detector.target.site), expected)
    return detector


def _compile_detector(condition: Gate | Guard, phase: Phase, path: str, catalog: Catalog) -> Detector:
    target = resolve_read(condition.target, f"{path}.target", catalog)
    if not abs(condition.threshold) < FLOAT32_LIMIT:
        raise InvalidRequestError(f"{path}.threshold", condition.threshold, "a finite number that float32 can hold")
    return Detector(target, float(np.float32(condition.threshold)), phase)


def check_op(intervention: Intervention, path: str) -> None:
    """Refuse an operation whose terms do not fit it.

    Raises:
        InvalidRequestError: names the term.
    """
    op = intervention.op
    if isinstance(intervention.target, HeadTarget) and op not in (Op.SCALE, Op.BLOCK):
        expected = "scale or block: a head has no activation of its own; a direction of it has"
        raise InvalidRequestError(f"{path}.op", str(op), expected)
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


def operands(intervention: Intervention, target: ResolvedTarget, path: str, max_retries: int) -> list[float]:
    """The operand of each feature, in activation units and rounded to float32; zeros where the op takes none.

    Raises:
        InvalidRequestError: float32 cannot hold one, or ``max_retries`` times one, or the unit is not on record.
    """
    unit: Sequence[float] = (1.0,) * len(target.keys)
    if intervention.unit is Unit.MAX_ACTIVATION:
        if target.max_activation is None or not min(target.max_activation) > 0:  # 0: it never fired
            expected = f"{Unit.RAW}: {target.label} has no recorded maximum activation"
            raise InvalidRequestError(f"{path}.unit", str(intervention.unit), expected)
        unit = target.max_activation
    value = float(intervention.value or 0.0)
    values = [value * maximum for maximum in unit]
    if not all(abs(operand) < FLOAT32_LIMIT for operand in values):
        raise InvalidRequestError(f"{path}.value", intervention.value, "a finite number that float32 can hold")
    rounded = [float(np.float32(operand)) for operand in values]
    if not all(abs(operand) * max_retries < FLOAT32_LIMIT for operand in rounded):
        expected = f"a number that float32 can hold {max_retries} times: retry r multiplies it by r"
        raise InvalidRequestError(f"{path}.value", intervention.value, expected)
    return rounded


def edit_label(target: ResolvedTarget, op: Op, always: bool, values: Sequence[float]) -> str:
    """The edit in words."""
    operand = f" {values[0]:g}" if op in TAKES_VALUE and len(set(values)) == 1 else ""
    return f"{target.label}: {op}{' always' if always else ''}{operand}"
