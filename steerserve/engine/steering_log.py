"""From plans to the kernel's arrays, and from what the kernel left to each request's tally.

The entries of a row change only when a request joins or leaves, so their arrays are built then. A
decode step hands the kernel the next line of a log to write into; nothing is copied, and the lines
are read in bulk when the log is full or the batch changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from steerserve.engine.feature_bank import FeatureBank
from steerserve.engine.receipt import Account, Share, Tally, scores
from steerserve.kernels.steer_delta import OpCode
from steerserve.models.splice import SiteBank, SiteWork
from steerserve.steering.plan import ByteArray, IntArray, Plan, Segments, SitePlan, Stage
from steerserve.types import FloatArray, Phase, PositionScores, Site

LOG_STEPS = 64
"""Decode steps between two readings of the log."""


@dataclass(frozen=True, eq=False)
class RowEntries:
    """One request's ``m`` entries at one site in one phase, stage after stage.

    Attributes:
        stage_sizes: ``[stages]`` entries of each stage.
        segments: where each intervention's entries are, with their stage.
        guard_limit: largest |x| on which all its policy entries are defined, if the request edits too;
            else infinite.
    """

    slot: IntArray
    op: ByteArray
    value: FloatArray
    stage_sizes: tuple[int, ...]
    segments: tuple[tuple[Stage, Segments], ...]
    guard_limit: float


SiteEntries = Mapping[Site, RowEntries]


def entries_in_phase(plan: Plan, slots: Sequence[IntArray], phase: Phase) -> SiteEntries:
    """The entries that cover positions of ``phase`` (``PROMPT`` or ``GENERATED``).

    Args:
        slots: for each ``SitePlan``, the bank slots of its rows.
    """
    covers = np.array([planned.phase in (Phase.ALL, phase) for planned in plan.interventions])
    parts: dict[Site, list[tuple[SitePlan, IntArray]]] = {}
    for part, part_slots in zip(plan.sites, slots, strict=True):
        if covers[part.intervention].any():
            parts.setdefault(part.site, []).append((_restricted(part, covers), part_slots))
    request_edits = any(part.stage is Stage.REQUEST and (part.op != OpCode.MONITOR).any() for part in plan.sites)
    return {site: _row_entries(at_site, request_edits) for site, at_site in parts.items()}


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
        segments=tuple(restricted),
    )


def _row_entries(at_site: Sequence[tuple[SitePlan, IntArray]], request_edits: bool) -> RowEntries:
    ordered = sorted(at_site, key=lambda item: item[0].stage)
    sizes = {part.stage: len(part.row) for part, _ in ordered}
    starts = np.cumsum([0, *sizes.values()], dtype=np.int32)[:-1]
    return RowEntries(
        slot=np.concatenate([slots[part.row] for part, slots in ordered]),
        op=np.concatenate([part.op for part, _ in ordered]),
        value=np.concatenate([part.value for part, _ in ordered]),
        stage_sizes=tuple(sizes.get(stage, 0) for stage in Stage),
        segments=tuple(
            (part.stage, replace(segments, first=segments.first + start))
            for (part, _), start in zip(ordered, starts, strict=True)
            for segments in part.segments
        ),
        guard_limit=min(
            (float(p.rows.max_norm[p.row].min()) for p, _ in ordered if request_edits and p.stage is Stage.POLICY),
            default=np.inf,
        ),
    )


def _accounts(rows: Sequence[RowEntries | None], first_column: Sequence[int]) -> list[Account]:
    by_width: dict[int, list[Share]] = {}
    for row, entries in enumerate(rows):
        for stage, segments in entries.segments if entries is not None else ():
            shifted = replace(segments, first=segments.first + first_column[row])
            by_width.setdefault(segments.width, []).append(Share(row, row * len(Stage) + stage, shifted))
    return [Account(shares) for shares in by_width.values()]


class SiteLog:
    """One site's kernel arguments for a fixed set of rows, and the log it writes.

    A line of the log holds one position of every row: ``activation`` and ``edit`` ``[nnz]``, ``x_norm``
    ``[rows*stages]``. A decode step writes one line, a prefill all of them.
    """

    def __init__(self, rows: Sequence[RowEntries | None], bank: SiteBank, lines: int, is_prefill: bool) -> None:
        self._rows = rows
        self._bank = bank
        self._is_prefill = is_prefill
        self._lines_per_run = lines_per_run = lines if is_prefill else 1
        self._num_runs = lines // lines_per_run
        present = [entries for entries in rows if entries is not None]
        no_entries = (0,) * len(Stage)
        sizes = np.array([no_entries if entries is None else entries.stage_sizes for entries in rows])
        stops = np.cumsum(sizes.sum(axis=1))
        self._nnz = nnz = int(stops[-1])
        self._ptr = torch.from_numpy(np.cumsum([0, *np.tile(sizes.ravel(), lines_per_run)], dtype=np.int32))
        self._slot = _tiled([entries.slot for entries in present], lines_per_run)
        self._op = _tiled([entries.op for entries in present], lines_per_run)
        self._value = _tiled([entries.value for entries in present], lines_per_run)
        self._score_index = torch.full((len(self._slot),), -1, dtype=torch.int32)
        self._score_ptr = torch.zeros(len(rows) * lines_per_run + 1, dtype=torch.int32)
        self._score_threshold, self._score = torch.empty(0), torch.empty(0)
        self._first_column = (stops - sizes.sum(axis=1)).tolist()
        self._accounts = _accounts(rows, self._first_column)
        is_guard = np.array([stage is Stage.POLICY for stage in Stage])
        self._guard_row = np.repeat(np.arange(len(rows)), sizes[:, Stage.POLICY])
        self._guard_column = np.flatnonzero(np.repeat(np.tile(is_guard, len(rows)), sizes.ravel()))
        self._guard_limit = np.array([np.inf if entries is None else entries.guard_limit for entries in rows])
        # A norm is never negative: one that still is was not written, so the kernel did not run there.
        self._activation = torch.full((self._num_runs, lines_per_run * nnz), torch.nan)
        self._edit = torch.zeros(self._num_runs, lines_per_run * nnz)
        self._x_norm = torch.full((self._num_runs, lines_per_run * sizes.size), -1.0)
        self._used_runs = 0

    @property
    def is_full(self) -> bool:
        """No line is left for another run."""
        return self._used_runs == self._num_runs

    def next_run(self) -> SiteWork:
        """Arguments of the next forward pass, which writes the next lines."""
        run = self._used_runs
        self._used_runs += 1
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
            self._activation[run],
            self._edit[run],
            self._x_norm[run],
        )

    def rows_with_failed_guard(self) -> set[int]:
        """Rows in which a policy of the last run read a non-finite activation, or was pushed where it reads nothing.

        Beyond an SAE's largest norm every feature is 0. Attention sinks lie there by nature, and the first
        position of a prompt is one; anywhere else, behind a request's edits, a guard must not take it for silence.
        """
        if len(self._guard_row) == 0:
            return set()
        read = self._last_activation()[:, self._guard_column]
        norm = self._x_norm[self._used_runs - 1].numpy().reshape(self._lines_per_run, len(self._rows), len(Stage))
        first = 1 if self._is_prefill else 0
        pushed = (norm[first:, :, Stage.POLICY] > self._guard_limit).any(axis=0)
        unread = ~np.isfinite(read).all(axis=0)
        return set(self._guard_row[unread].tolist()) | set(np.flatnonzero(pushed).tolist())

    def last_scores(self, row: int) -> list[tuple[IntArray, FloatArray]]:
        """(interventions ``[s]``, their scores ``[positions, s]`` in the last run) of one row, by width."""
        entries = self._rows[row]
        if entries is None:
            return []
        read = self._last_activation()[:, self._first_column[row] :]
        return [(segments.intervention, scores(segments, read)) for _, segments in entries.segments]

    def flush(self, tallies: Sequence[Tally]) -> None:
        """Add the lines written so far to each row's tally and empty the log."""
        if self._used_runs == 0:
            return
        num_lines = self._used_runs * self._lines_per_run
        activation, edit, x_norm = (
            written[: self._used_runs].numpy() for written in (self._activation, self._edit, self._x_norm)
        )
        read, edited = activation.reshape(num_lines, self._nnz), edit.reshape(num_lines, self._nnz)
        norm = x_norm.reshape(num_lines, len(self._rows) * len(Stage))
        for account in self._accounts:
            account.add(read, edited, norm, tallies)
        activation.fill(np.nan)
        edit.fill(0.0)
        x_norm.fill(-1.0)
        self._used_runs = 0

    def _last_activation(self) -> FloatArray:
        """``[lines of a run, nnz]``."""
        last: FloatArray = self._activation[self._used_runs - 1].numpy().reshape(self._lines_per_run, self._nnz)
        return last


def _tiled(parts: Sequence[np.ndarray], repeats: int) -> torch.Tensor:
    return torch.from_numpy(np.tile(np.concatenate(parts), repeats))


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
        scored = np.full((num_positions, len(plan.interventions)), np.nan, dtype=np.float32)
        for log in self._logs.values():
            for interventions, read in log.last_scores(row):
                scored[:, interventions] = read
        return tuple(PositionScores(first_position + i, line) for i, line in enumerate(scored))

    def flush(self) -> None:
        """Add everything written so far to the tallies."""
        for log in self._logs.values():
            log.flush(self._tallies)
