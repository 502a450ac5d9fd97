"""What the kernel left for consecutive positions of one request: kept with cached blocks, so that a hit replays it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steerserve.engine.entries import Entries
from steerserve.engine.receipt import Tally, scores
from steerserve.steering.plan import Stage
from steerserve.types import FloatArray, Site


@dataclass(frozen=True, eq=False)
class SiteRecord:
    """``n`` positions at one site: ``activation`` and ``edit`` ``[n, m]``, ``x_norm`` ``[n, stages]``."""

    activation: FloatArray
    edit: FloatArray
    x_norm: FloatArray

    def part(self, begin: int, end: int) -> SiteRecord:
        """Positions ``begin`` to ``end`` of it."""
        return SiteRecord(self.activation[begin:end], self.edit[begin:end], self.x_norm[begin:end])


@dataclass(frozen=True, eq=False)
class Record:
    """``n`` positions at every site that their entries name, and their scores ``[n, G]``."""

    sites: Mapping[Site, SiteRecord]
    score: FloatArray

    def part(self, begin: int, end: int) -> Record:
        """Positions ``begin`` to ``end`` of it."""
        return Record({site: at.part(begin, end) for site, at in self.sites.items()}, self.score[begin:end])

    def add_to(self, tally: Tally, entries: Entries) -> None:
        """Account for the positions."""
        for site, row in entries.at.items():
            at = self.sites[site]
            for account in row.accounts:
                account.add(at.activation, at.edit, at.x_norm, [tally])

    def intervention_scores(self, entries: Entries, num_interventions: int) -> FloatArray:
        """``[n, interventions]``; NaN out of scope."""
        scored = np.full((len(self.score), num_interventions), np.nan, dtype=np.float32)
        for site, row in entries.at.items():
            for _, segments in row.segments:
                scored[:, segments.intervention] = scores(segments, self.sites[site].activation)
        return scored

    def first_failure(self, entries: Entries, first_position: int) -> int | None:
        """The first of its positions where a policy or guard did not run, read what is not finite, or could not read.

        Beyond an SAE's largest norm every feature is 0. Attention sinks lie there by nature, and the first
        position of a prompt is one; anywhere else, behind a request's edits, that must not be taken for silence.
        """
        failed = np.zeros(len(self.score), dtype=bool)
        for site, row in entries.at.items():
            at = self.sites[site]
            beyond = at.x_norm[:, Stage.POLICY] > row.guard_limit
            beyond[: first_position == 0] = False
            failed |= beyond | ~np.isfinite(at.activation[:, row.must_read]).all(axis=1)
        return int(failed.argmax()) if failed.any() else None


def joined(records: Sequence[Record]) -> Record:
    """Records of positions that follow each other, all with the same entries, as one."""
    if len(records) == 1:
        return records[0]
    sites = {
        site: SiteRecord(
            *(
                np.concatenate([getattr(record.sites[site], name) for record in records])
                for name in ("activation", "edit", "x_norm")
            )
        )
        for site in records[0].sites
    }
    return Record(sites, np.concatenate([record.score for record in records]))


def empty_record(num_positions: int, num_scores: int) -> Record:
    """Of positions at which nothing is asked for."""
    return Record({}, np.zeros((num_positions, num_scores), dtype=np.float32))
