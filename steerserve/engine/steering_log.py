"""The results of decode steps, one line a step, read in bulk when the log is full or the rows change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steerserve.engine.entries import Entries, RowEntries, accounts_of
from steerserve.engine.receipt import Tally
from steerserve.engine.records import Record, SiteRecord
from steerserve.engine.step_tables import NUM_STAGES, StepTables
from steerserve.steering.plan import Stage
from steerserve.types import Site

LOG_STEPS = 64
"""Decode steps between two readings of the log."""


class DecodeLog:
    """What the kernel left for a fixed list of decoding rows, the pieces in front of every step's batch."""

    def __init__(self, rows: Sequence[Entries]) -> None:
        self._rows = rows
        sites = sorted({site for entries in rows for site in entries.at})
        self._sites = {site: _SiteLog([entries.at.get(site) for entries in rows]) for site in sites}
        self._first_score = np.cumsum([0, *(entries.num_scores for entries in rows)]).tolist()
        self._score = np.zeros((LOG_STEPS, self._first_score[-1]), dtype=np.float32)
        self.num_lines = 0

    @property
    def is_full(self) -> bool:
        """No line is left for another step."""
        return self.num_lines == LOG_STEPS

    def append(self, tables: StepTables) -> None:
        """Copy what the step that has just run left for the rows."""
        line, num_rows = self.num_lines, len(self._rows)
        for site, log in self._sites.items():
            log.activation[line], log.edit[line], log.x_norm[line] = tables.outputs(site, num_rows)
        self._score[line] = tables.leading_scores(num_rows)
        self.num_lines += 1

    def rows_with_failed_detector(self) -> set[int]:
        """Rows of the last line in which a policy or guard did not read; see ``Record.first_failure``."""
        return {row for log in self._sites.values() for row in log.rows_with_failed_detector(self.num_lines - 1)}

    def record(self, row: int, first_line: int = 0) -> Record:
        """The lines of one row from ``first_line`` on; a copy."""
        begin, end = self._first_score[row : row + 2]
        lines = slice(first_line, self.num_lines)
        sites: dict[Site, SiteRecord] = {site: self._sites[site].record(row, lines) for site in self._rows[row].at}
        return Record(sites, self._score[lines, begin:end].copy())

    def flush(self, tallies: Sequence[Tally]) -> None:
        """Add the lines to each row's tally and empty the log."""
        for log in self._sites.values():
            log.add_to(tallies, self.num_lines)
        self.num_lines = 0


class _SiteLog:
    def __init__(self, rows: Sequence[RowEntries | None]) -> None:
        sizes = np.array([(0,) * NUM_STAGES if row is None else row.stage_sizes for row in rows])
        self._ends = np.cumsum([0, *sizes.sum(axis=1)]).tolist()
        self._accounts = accounts_of(rows, self._ends[:-1])
        self.activation, self.edit = np.zeros((2, LOG_STEPS, self._ends[-1]), dtype=np.float32)
        self.x_norm = np.zeros((LOG_STEPS, sizes.size), dtype=np.float32)
        present = [(index, row) for index, row in enumerate(rows) if row is not None and len(row.must_read)]
        self._detector_row = np.repeat(
            np.array([index for index, _ in present], dtype=int), [len(row.must_read) for _, row in present]
        )
        columns = [row.must_read + self._ends[index] for index, row in present]
        self._detector_column = np.concatenate(columns) if columns else np.zeros(0, dtype=int)
        self._limit = np.array([np.inf if row is None else row.guard_limit for row in rows])
        self._is_limited = bool(np.isfinite(self._limit).any())

    def rows_with_failed_detector(self, line: int) -> set[int]:
        failed: set[int] = set()
        if len(self._detector_row):
            read = self.activation[line, self._detector_column]
            failed.update(self._detector_row[~np.isfinite(read)].tolist())
        if self._is_limited:
            norm = self.x_norm[line].reshape(-1, NUM_STAGES)[:, Stage.POLICY]
            failed.update(np.flatnonzero(norm > self._limit).tolist())
        return failed

    def record(self, row: int, lines: slice) -> SiteRecord:
        begin, end = self._ends[row : row + 2]
        return SiteRecord(
            activation=self.activation[lines, begin:end].copy(),
            edit=self.edit[lines, begin:end].copy(),
            x_norm=self.x_norm[lines, row * NUM_STAGES : (row + 1) * NUM_STAGES].copy(),
        )

    def add_to(self, tallies: Sequence[Tally], num_lines: int) -> None:
        for account in self._accounts:
            account.add(self.activation[:num_lines], self.edit[:num_lines], self.x_norm[:num_lines], tallies)
