"""From plans to the kernel's arrays, and from what the kernel left to each request's tally.

The entries of a row change only when a request joins or leaves, so their arrays are built then. A
decode step hands the kernel the next line of a log to write into; nothing is copied, and the lines
are read in bulk when the log is full or the batch changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steerserve.engine.feature_bank import FeatureBank
from steerserve.engine.receipt import Tally
from steerserve.kernels.steer_delta import OpCode
from steerserve.models.splice import SiteBank, SiteWork
from steerserve.steering.plan import ByteArray, IntArray, Plan, SitePlan, Stage
from steerserve.types import FloatArray, Phase, PositionScores, Site

LOG_STEPS = 64
"""Decode steps between two readings of the log."""


@dataclass(frozen=True)
class Segment:
    """The columns of one intervention among a row's entries."""

    intervention: int
    columns: slice


@dataclass(frozen=True, eq=False)
class RowEntries:
    """One request's ``m`` entries at one site in one phase, stage after stage.

    Attributes:
        stage_sizes: ``[stages]`` entries of each stage.
        guard_limit: largest |x| on which all its policy entries are defined, if the request edits too;
            else infinite.
    """

    slot: IntArray
    op: ByteArray
    value: FloatArray
    stage_sizes: tuple[int, ...]
    segments: tuple[Segment, ...]
    guard_limit: float


SiteEntries = Mapping[Site, RowEntries]


def entries_in_phase(plan: Plan, slots: Sequence[IntArray], phase: Phase) -> SiteEntries:
    """The entries that cover positions of ``phase`` (``PROMPT`` or ``GENERATED``).

    Args:
        slots: for each ``SitePlan``, the bank slots of its rows.
    """
    parts: dict[Site, list[tuple[SitePlan, IntArray]]] = {}
    for part, part_slots in zip(plan.sites, slots, strict=True):
        covers = np.array([plan.interventions[i].phase in (Phase.ALL, phase) for i in part.intervention])
        chosen = np.flatnonzero(covers).astype(np.int32)
        if len(chosen):
            parts.setdefault(part.site, []).append((_restricted(part, chosen), part_slots))
    request_edits = any(part.stage is Stage.REQUEST and (part.op != OpCode.MONITOR).any() for part in plan.sites)
    return {site: _row_entries(at_site, request_edits) for site, at_site in parts.items()}


def _restricted(part: SitePlan, chosen: IntArray) -> SitePlan:
    return SitePlan(
        site=part.site,
        stage=part.stage,
        rows=part.rows,
        row=part.row[chosen],
        op=part.op[chosen],
        value=part.value[chosen],
        intervention=part.intervention[chosen],
    )


def _row_entries(at_site: Sequence[tuple[SitePlan, IntArray]], request_edits: bool) -> RowEntries:
    ordered = sorted(at_site, key=lambda item: item[0].stage)
    intervention = np.concatenate([part.intervention for part, _ in ordered])
    starts = np.flatnonzero(np.diff(intervention, prepend=-1)).tolist()
    stops = [*starts[1:], len(intervention)]
    sizes = {part.stage: len(part.row) for part, _ in ordered}
    return RowEntries(
        slot=np.concatenate([slots[part.row] for part, slots in ordered]),
        op=np.concatenate([part.op for part, _ in ordered]),
        value=np.concatenate([part.value for part, _ in ordered]),
        stage_sizes=tuple(sizes.get(stage, 0) for stage in Stage),
        segments=tuple(
            Segment(int(intervention[start]), slice(start, stop)) for start, stop in zip(starts, stops, strict=True)
        ),
        guard_limit=min(
            (float(p.rows.max_norm[p.row].min()) for p, _ in ordered if request_edits and p.stage is Stage.POLICY),
            default=np.inf,
        ),
    )


class SiteLog:
    """One site's kernel arguments for a fixed set of rows, and the log it writes.

    A line of the log holds one position of every row: ``activation`` and ``edit`` ``[lines, nnz]``,
    ``x_norm`` ``[lines, rows*stages]``. A decode step writes one line, a prefill all of them.
    """

    def __init__(self, rows: Sequence[RowEntries | None], bank: SiteBank, lines: int, is_prefill: bool) -> None:
        self._rows = rows
        self._guard_limit = np.array([np.inf if entries is None else entries.guard_limit for entries in rows])
        self._bank = bank
        self._is_prefill = is_prefill
        self._lines_per_run = lines_per_run = lines if is_prefill else 1
        present = [entries for entries in rows if entries is not None]
        no_entries = (0,) * len(Stage)
        sizes = np.array([no_entries if entries is None else entries.stage_sizes for entries in rows]).ravel()
        nnz = int(sizes.sum())
        self._ptr = torch.from_numpy(np.cumsum([0, *np.tile(sizes, lines_per_run)], dtype=np.int32))
        self._slot = _tiled([entries.slot for entries in present], lines_per_run)
        self._op = _tiled([entries.op for entries in present], lines_per_run)
        self._value = _tiled([entries.value for entries in present], lines_per_run)
        self._score_index = torch.full((len(self._slot),), -1, dtype=torch.int32)
        self._score_ptr = torch.zeros(len(rows) * lines_per_run + 1, dtype=torch.int32)
        self._score_threshold, self._score = torch.empty(0), torch.empty(0)
        ends = np.cumsum([0 if entries is None else len(entries.slot) for entries in rows])
        self._columns = [slice(end - (0 if e is None else len(e.slot)), end) for e, end in zip(rows, ends, strict=True)]
        self._guard_row = _guard_columns(rows)
        self._activation = torch.empty(lines, nnz)
        self._edit = torch.empty(lines, nnz)
        self._x_norm = torch.empty(lines, len(sizes))
        self._num_lines = lines
        self._used = 0
        self._clear()

    @property
    def is_full(self) -> bool:
        """No line is left for another run."""
        return self._used == self._num_lines

    def next_run(self) -> SiteWork:
        """Arguments of the next forward pass, which writes the next lines."""
        lines = slice(self._used, self._used + self._lines_per_run)
        self._used = lines.stop
        return SiteWork(
            self._bank,
            self._ptr,
            self._slot,
            self._op,
            self._value,
            self._score_index,
            self._score_ptr,
            self._score_threshold,
            self._score,
            self._activation[lines].view(-1),
            self._edit[lines].view(-1),
            self._x_norm[lines].view(-1),
        )

    def rows_with_failed_guard(self) -> set[int]:
        """Rows in which a policy of the last run read a non-finite activation, or was pushed where it reads nothing.

        Beyond an SAE's largest norm every feature is 0. Attention sinks lie there by nature, and the first
        position of a prompt is one; anywhere else, behind a request's edits, a guard must not take it for silence.
        """
        columns, owner = self._guard_row
        read = self._last_run(self._activation)[:, columns]
        norm = self._last_run(self._x_norm).reshape(self._lines_per_run, len(self._rows), len(Stage))
        first = 1 if self._is_prefill else 0
        pushed = (norm[first:, :, Stage.POLICY] > self._guard_limit).any(axis=0)
        return set(owner[~np.isfinite(read).all(axis=0)].tolist()) | set(np.flatnonzero(pushed).tolist())

    def last_scores(self, row: int, plan: Plan) -> list[tuple[int, FloatArray]]:
        """(intervention, score at every position of the last run) of one row."""
        entries = self._rows[row]
        if entries is None:
            return []
        read = self._last_run(self._activation)[:, self._columns[row]]
        return [
            (s.intervention, read[:, s.columns] @ plan.interventions[s.intervention].weight) for s in entries.segments
        ]

    def flush(self, tallies: Sequence[Tally]) -> None:
        """Add the lines written so far to each row's tally and empty the log."""
        activation, edit = self._activation[: self._used].numpy(), self._edit[: self._used].numpy()
        x_norm = self._x_norm[: self._used].numpy().reshape(self._used, len(self._rows), len(Stage))
        for row, (entries, columns) in enumerate(zip(self._rows, self._columns, strict=True)):
            for segment in entries.segments if entries is not None else ():
                read, edited = activation[:, columns][:, segment.columns], edit[:, columns][:, segment.columns]
                tallies[row].record(segment.intervention, read, edited, x_norm[:, row])
        self._clear()

    def _last_run(self, written: torch.Tensor) -> FloatArray:
        last: FloatArray = written[self._used - self._lines_per_run : self._used].numpy()
        return last

    def _clear(self) -> None:
        # A norm is never negative: one that still is was not written, so the kernel did not run there.
        self._x_norm.fill_(-1.0)
        self._edit.zero_()
        self._activation.fill_(torch.nan)
        self._used = 0


def _tiled(parts: Sequence[np.ndarray], repeats: int) -> torch.Tensor:
    return torch.from_numpy(np.tile(np.concatenate(parts), repeats))


def _guard_columns(rows: Sequence[RowEntries | None]) -> tuple[IntArray, IntArray]:
    """Columns of policy entries, and the row that owns each."""
    columns: list[int] = []
    owners: list[int] = []
    start = 0
    for row, entries in enumerate(rows):
        if entries is None:
            continue
        stop = start + len(entries.slot)
        num_guards = entries.stage_sizes[Stage.POLICY]
        columns += range(stop - num_guards, stop)
        owners += [row] * num_guards
        start = stop
    return np.array(columns, dtype=np.int32), np.array(owners, dtype=np.int32)


class SteeringLog:
    """The logs of every site that some row of a fixed batch has entries at."""

    def __init__(
        self, rows: Sequence[SiteEntries], tallies: Sequence[Tally], bank: FeatureBank, lines: int, is_prefill: bool
    ) -> None:
        self._tallies = tallies
        sites = sorted({site for entries in rows for site in entries})
        self._logs = {
            site: SiteLog([entries.get(site) for entries in rows], bank.arrays(site), lines, is_prefill)
            for site in sites
        }

    @classmethod
    def for_prefill(cls, entries: SiteEntries, tally: Tally, bank: FeatureBank, num_tokens: int) -> SteeringLog:
        """One row, ``num_tokens`` positions in one run."""
        return cls([entries], [tally], bank, lines=num_tokens, is_prefill=True)

    @classmethod
    def for_decode(cls, rows: Sequence[SiteEntries], tallies: Sequence[Tally], bank: FeatureBank) -> SteeringLog:
        """One position of every row a run."""
        return cls(rows, tallies, bank, lines=LOG_STEPS, is_prefill=False)

    def next_run(self) -> dict[Site, SiteWork]:
        """Work of the next forward pass."""
        if any(log.is_full for log in self._logs.values()):
            self.flush()
        return {site: log.next_run() for site, log in self._logs.items()}

    def rows_with_failed_guard(self) -> set[int]:
        """Rows in which a policy of the last run could not read its activation."""
        return {row for log in self._logs.values() for row in log.rows_with_failed_guard()}

    def last_scores(self, row: int, plan: Plan, first_position: int, num_positions: int) -> tuple[PositionScores, ...]:
        """Scores of one row at every position of the last run; NaN out of scope."""
        scores = np.full((num_positions, len(plan.interventions)), np.nan, dtype=np.float32)
        for log in self._logs.values():
            for intervention, read in log.last_scores(row, plan):
                scores[:, intervention] = read
        return tuple(PositionScores(first_position + i, line) for i, line in enumerate(scores))

    def flush(self) -> None:
        """Add everything written so far to the tallies."""
        for log in self._logs.values():
            log.flush(self._tallies)
