"""The kernel's arguments of one step, written into buffers that never move.

The flat batch of a step is a list of pieces; decoding requests come first, each a piece of one token. What was
written for the pieces in front stands for as long as they stay the same, so that a step in which nobody joins or
leaves writes nothing but zeros over the last step's results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from steerserve.engine.entries import Entries
from steerserve.engine.feature_bank import FeatureBank
from steerserve.engine.records import Record, SiteRecord
from steerserve.models.splice import ScoreBuffers, SiteBank, SiteBuffers
from steerserve.steering.plan import Stage
from steerserve.types import FloatArray, Site

Layout = Sequence[tuple[Entries, int]]
"""For each piece, what each of its tokens asks for, and how many tokens it has."""

NUM_STAGES = len(Stage)


class StepTables:
    """Fills the arguments of every site, and reads what the kernel left there, piece by piece."""

    def __init__(self, buffers: Mapping[Site, SiteBuffers], scores: ScoreBuffers, bank: FeatureBank) -> None:
        self._tables = {site: _SiteTable(site, at_site) for site, at_site in buffers.items()}
        self._score_ptr, self._threshold = scores.ptr.numpy(), scores.threshold.numpy()
        self._score = scores.score.numpy()
        self._bank = bank
        self._layout: list[tuple[Entries, int]] = []
        self._first_token = self._first_score = [0]
        self._active: dict[Site, _SiteTable] = {}

    def prepare(self, layout: Layout) -> None:
        """Make the buffers say what ``layout`` asks for, with nothing read or done yet."""
        if list(layout) != self._layout:
            self._place(layout)
        self._score[: self._first_score[-1]] = 0.0
        for table in self._active.values():
            table.fill(self._layout, self._first_token, self._first_score)

    def score(self, piece: int) -> FloatArray:
        """``[tokens, G]`` scores of a piece; to be read before the next step."""
        begin, end = self._first_score[piece : piece + 2]
        count = self._layout[piece][1]
        scores: FloatArray = self._score[begin:end].reshape(count, -1)
        return scores

    def leading_scores(self, num_pieces: int) -> FloatArray:
        """Scores of the pieces in front, one after another; to be read before the next step."""
        scores: FloatArray = self._score[: self._first_score[num_pieces]]
        return scores

    def record(self, piece: int) -> Record:
        """What the kernel left for a piece; a copy."""
        entries, count = self._layout[piece]
        return Record(
            sites={site: self._active[site].record(piece, count, self._first_token[piece]) for site in entries.at},
            score=self.score(piece).copy(),
        )

    def outputs(self, site: Site, num_pieces: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """``activation``, ``edit`` ``[nnz]``, ``x_norm`` ``[tokens*stages]`` of the pieces in front at one site."""
        return self._active[site].outputs(num_pieces, self._first_token[num_pieces])

    def _place(self, layout: Layout) -> None:
        self._layout = list(layout)
        counts = [count for _, count in layout]
        self._first_token = np.cumsum([0, *counts]).tolist()
        self._first_score = np.cumsum([0, *(entries.num_scores * count for entries, count in layout)]).tolist()
        num_scores = np.repeat([entries.num_scores for entries, _ in layout], counts)
        np.cumsum(num_scores, out=self._score_ptr[1 : len(num_scores) + 1])
        for (entries, count), begin, end in zip(layout, self._first_score[:-1], self._first_score[1:], strict=True):
            self._threshold[begin:end] = np.tile(entries.threshold, count)
        needed = {site for entries, _ in layout for site in entries.at}
        for site in self._active.keys() - needed:
            self._active.pop(site).deactivate()
        for site in sorted(needed - self._active.keys()):
            table = self._active[site] = self._tables[site]
            table.activate(self._bank.arrays(site))


class _SiteTable:
    """One site's arguments; the lists hold a place for each piece, and one for the end."""

    def __init__(self, site: Site, buffers: SiteBuffers) -> None:
        self._site = site
        self._buffers = buffers
        names = ("ptr", "slot", "op", "value", "score_index", "activation", "edit", "x_norm")
        self._array = {name: getattr(buffers, name).numpy() for name in names}
        self._filled: list[tuple[Entries, int]] = []
        self._first_entry = [0]

    def activate(self, bank: SiteBank) -> None:
        self._buffers.bank = bank
        self._buffers.active = True

    def deactivate(self) -> None:
        self._buffers.active = False

    def fill(self, layout: Layout, first_token: Sequence[int], first_score: Sequence[int]) -> None:
        if self._filled != layout:
            kept = _num_equal(self._filled, layout)
            del self._first_entry[kept + 1 :]
            for piece in range(kept, len(layout)):
                self._write(*layout[piece], first_token[piece], first_score[piece])
            self._filled = list(layout)
        array = self._array
        array["activation"][: self._first_entry[-1]] = np.nan
        array["edit"][: self._first_entry[-1]] = 0.0
        # A norm is never negative: one that still is was not written, so the kernel did not run there.
        array["x_norm"][: first_token[len(layout)] * NUM_STAGES] = -1.0

    def record(self, piece: int, count: int, first_token: int) -> SiteRecord:
        begin, end = self._first_entry[piece : piece + 2]
        norms = slice(first_token * NUM_STAGES, (first_token + count) * NUM_STAGES)
        return SiteRecord(
            activation=self._array["activation"][begin:end].reshape(count, -1).copy(),
            edit=self._array["edit"][begin:end].reshape(count, -1).copy(),
            x_norm=self._array["x_norm"][norms].reshape(count, NUM_STAGES).copy(),
        )

    def outputs(self, num_pieces: int, num_tokens: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        array, nnz = self._array, self._first_entry[num_pieces]
        return array["activation"][:nnz], array["edit"][:nnz], array["x_norm"][: num_tokens * NUM_STAGES]

    def _write(self, entries: Entries, count: int, first_token: int, first_score: int) -> None:
        array, begin = self._array, self._first_entry[-1]
        row = entries.at.get(self._site)
        size = 0 if row is None else len(row)
        end = begin + size * count
        ends_of_stages = np.cumsum((0,) * NUM_STAGES if row is None else row.stage_sizes)
        ends = begin + size * np.arange(count)[:, None] + ends_of_stages
        array["ptr"][first_token * NUM_STAGES + 1 : (first_token + count) * NUM_STAGES + 1] = ends.ravel()
        if row is not None:
            for name in ("slot", "op", "value"):
                array[name][begin:end].reshape(count, size)[:] = getattr(row, name)
            first = first_score + entries.num_scores * np.arange(count)[:, None]
            index = np.where(row.score_index >= 0, row.score_index + first, -1)
            array["score_index"][begin:end].reshape(count, size)[:] = index
        self._first_entry.append(end)


def _num_equal(before: Layout, now: Layout) -> int:
    """How many pieces in front are the same."""
    for index, (old, new) in enumerate(zip(before, now, strict=False)):
        if old != new:
            return index
    return min(len(before), len(now))
