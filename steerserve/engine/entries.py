"""A plan in the kernel's terms: what one token of a request asks for at each site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from steerserve.engine.receipt import Account, Share
from steerserve.steering.plan import ByteArray, IntArray, Plan, Segments, SitePlan, Stage
from steerserve.types import FloatArray, Phase, Site

NOTHING = bytes(32)
"""Digest of entries that ask for nothing."""


@dataclass(frozen=True, eq=False)
class RowEntries:
    """The ``m`` entries of one token at one site, stage after stage.

    Attributes:
        score_index: ``[m]`` index into the token's own scores; −1 for none.
        stage_sizes: ``[stages]`` entries of each stage.
        segments: where each intervention's entries are, with their stage.
        must_read: ``[j]`` entries of policies and guards that are not to fail open: they must not fail to read.
        guard_limit: largest |x| on which all of these are defined, if the request edits too; else infinite.
    """

    slot: IntArray
    op: ByteArray
    value: FloatArray
    score_index: IntArray
    stage_sizes: tuple[int, ...]
    segments: tuple[tuple[Stage, Segments], ...]
    must_read: IntArray
    guard_limit: float

    def __len__(self) -> int:
        return len(self.slot)

    @cached_property
    def accounts(self) -> list[Account]:
        """Accounts of this row alone."""
        return accounts_of([self], [0])


def accounts_of(rows: Sequence[RowEntries | None], first_entry: Sequence[int]) -> list[Account]:
    """Accounts of several rows of one site's log, each row's entries beginning at its ``first_entry``."""
    by_width: dict[int, list[Share]] = {}
    for row, entries in enumerate(rows):
        for stage, segments in entries.segments if entries is not None else ():
            shifted = replace(segments, first=segments.first + first_entry[row])
            by_width.setdefault(segments.width, []).append(Share(row, row * len(Stage) + stage, shifted))
    return [Account(shares) for shares in by_width.values()]


@dataclass(frozen=True, eq=False)
class Entries:
    """What one token asks for at every site, in one phase and at one level of a plan.

    Attributes:
        threshold: ``[G]`` of the token's scores, none if the phase has none.
        guards: (index into ``Plan.guards``, index of its score) of the guards that read in this phase.
        digest: equal for entries that do, read and account for the same.
    """

    at: Mapping[Site, RowEntries]
    threshold: FloatArray
    guards: tuple[tuple[int, int], ...]
    digest: bytes

    @property
    def num_scores(self) -> int:
        """Scores of a token."""
        return len(self.threshold)


class PlanEntries:
    """The entries of one request's plan, made when they first come into force; its responses share them.

    Args:
        slots: for each level and each ``SitePlan`` of it, the bank slots of its rows.
    """

    def __init__(self, plan: Plan, slots: Sequence[Sequence[IntArray]]) -> None:
        self.plan = plan
        self._slots = slots
        self._made: dict[tuple[int, Phase, bool], Entries] = {}

    def in_force(self, level: int, phase: Phase, at_start: bool = False) -> Entries:
        """What a position of ``phase`` (``PROMPT`` or ``GENERATED``) asks for after ``level`` rewinds.

        Args:
            at_start: the first position of all, see ``Plan.covers``.
        """
        key = level, phase, at_start
        if key not in self._made:
            self._made[key] = entries_in_force(self.plan, level, phase, self._slots[level], at_start)
        return self._made[key]

    @property
    def record_bytes(self) -> int:
        """Most memory that the record of a position takes."""
        sizes = [sum(8 * len(part.row) + 4 * len(Stage) for part in level) for level in self.plan.levels]
        return max(sizes) + 4 * len(self.plan.scores)


def most_entries(plan: Plan) -> int:
    """Most entries that a token ever has at one site."""
    counts: Counter[tuple[int, Site]] = Counter()
    for level, parts in enumerate(plan.levels):
        for part in parts:
            counts[level, part.site] += len(part.row)
    return max(counts.values(), default=0)


def entries_in_force(
    plan: Plan, level: int, phase: Phase, slots: Sequence[IntArray], at_start: bool = False
) -> Entries:
    """The entries at positions of ``phase`` (``PROMPT`` or ``GENERATED``) after ``level`` rewinds.

    Args:
        slots: for each ``SitePlan`` of the level, the bank slots of its rows.
        at_start: the first position of all, see ``Plan.covers``.
    """
    covers = plan.covers(phase, at_start)
    parts: dict[Site, list[tuple[SitePlan, IntArray]]] = {}
    for part, part_slots in zip(plan.levels[level], slots, strict=True):
        if covers[part.intervention].any():
            parts.setdefault(part.site, []).append((_restricted(part, covers), part_slots))
    request_edits = plan.request_edits(level)
    fail_open = np.array([planned.fail_open for planned in plan.interventions], dtype=bool)
    reads = any(covers[score.intervention] for score in plan.scores)
    return Entries(
        at={site: _row_entries(at_site, request_edits, fail_open) for site, at_site in parts.items()},
        threshold=np.array([score.threshold for score in plan.scores if reads], dtype=np.float32),
        guards=tuple(
            (index, guard.score)
            for index, guard in enumerate(plan.guards)
            if covers[plan.scores[guard.score].intervention]
        ),
        digest=plan.effective_digest(level, phase, at_start) or NOTHING,
    )


def _restricted(part: SitePlan, covers: npt.NDArray[np.bool_]) -> SitePlan:
    """Without the entries of interventions that do not cover the phase."""
    chosen = covers[part.intervention]
    if chosen.all():
        return part
    moved = np.cumsum(chosen, dtype=np.int32) - 1
    restricted = []
    for segments in part.segments:
        kept = covers[segments.intervention]
        if kept.any():
            first = moved[segments.first[kept]]
            restricted.append(Segments(segments.intervention[kept], first, segments.weight[kept], segments.gram[kept]))
    return replace(
        part,
        row=part.row[chosen],
        op=part.op[chosen],
        value=part.value[chosen],
        intervention=part.intervention[chosen],
        score_index=part.score_index[chosen],
        segments=tuple(restricted),
    )


def _row_entries(
    at_site: Sequence[tuple[SitePlan, IntArray]], request_edits: bool, fail_open: npt.NDArray[np.bool_]
) -> RowEntries:
    """The entries at one site; ``fail_open`` ``[interventions]`` those that may fail."""
    ordered = sorted(at_site, key=lambda item: item[0].stage)
    sizes = {part.stage: len(part.row) for part, _ in ordered}
    starts = np.cumsum([0, *sizes.values()], dtype=np.int32)[:-1]
    op, score_index = (np.concatenate([getattr(part, name) for part, _ in ordered]) for name in ("op", "score_index"))
    is_policy = np.repeat([part.stage is Stage.POLICY for part, _ in ordered], list(sizes.values()))
    may_fail = np.concatenate([fail_open[part.intervention] for part, _ in ordered])
    must_read = np.flatnonzero(is_policy & ~may_fail).astype(np.int32)
    max_norm = np.concatenate([part.rows.max_norm[part.row] for part, _ in ordered])
    return RowEntries(
        slot=np.concatenate([slots[part.row] for part, slots in ordered]),
        op=op,
        value=np.concatenate([part.value for part, _ in ordered]),
        score_index=score_index,
        stage_sizes=tuple(sizes.get(stage, 0) for stage in Stage),
        segments=tuple(
            (part.stage, replace(segments, first=segments.first + start))
            for (part, _), start in zip(ordered, starts, strict=True)
            for segments in part.segments
        ),
        must_read=must_read,
        guard_limit=float(max_norm[must_read].min(initial=np.inf)) if request_edits else np.inf,
    )
