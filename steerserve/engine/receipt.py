"""Accounting: what the kernel reported, added up for each intervention of one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from steerserve.steering.plan import DoubleArray, IntArray, Plan, Segments
from steerserve.types import FloatArray, InterventionReceipt, MonitorReceipt, Receipt

SMALLEST_NORM = np.finfo(np.float32).tiny
"""Stands for a norm of 0; x is not 0 where it was edited to be."""


def scores(segments: Segments, activation: FloatArray) -> FloatArray:
    """``[n, s]`` weight · f for activations ``[n, nnz]``, summed in one order whatever n and s are."""
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is a reading like any other
        terms = activation[:, segments.entries] * segments.weight.T
        scored: FloatArray = np.add.accumulate(terms, axis=1)[:, -1]
    return scored


def _lengths(gram: DoubleArray, edits: FloatArray) -> DoubleArray:
    """``[n, s]`` √(eᵀ gram e) of edits e ``[n, w, s]``."""
    if edits.shape[1] == 1:
        alone: DoubleArray = np.abs(edits[:, 0]) * np.sqrt(gram[:, 0, 0])
        return alone
    by_segment = edits.transpose(2, 0, 1).astype(np.float64)
    squared = np.einsum("snw,snw->ns", by_segment @ gram, by_segment)
    lengths: DoubleArray = np.sqrt(np.maximum(squared, 0.0))
    return lengths


class Tally:
    """The sums of one request's plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._waits_for_rewind = np.ones(len(plan.interventions), dtype=bool)
        for part in plan.sites:
            self._waits_for_rewind[part.intervention] = False
        self._sums = np.zeros((5, len(plan.interventions)))
        self._max_score = np.full(len(plan.interventions), np.nan, dtype=np.float32)

    def record(self, intervention: IntArray, sums: DoubleArray, max_score: FloatArray) -> None:
        """Add what positions in the scope of some interventions came to.

        Args:
            intervention: ``[s]``.
            sums: ``[5, s]`` positions in scope, those the kernel ran on, those it edited, Σ |x' − x| / |x|, and the sum
                of the finite scores.
            max_score: ``[s]``; NaN if no score was a number.
        """
        self._sums[:, intervention] += sums
        self._max_score[intervention] = np.fmax(self._max_score[intervention], max_score)

    def receipt(
        self, model_fingerprint: str, num_rewinds: int = 0, num_rewound_tokens: int = 0, num_cached_tokens: int = 0
    ) -> Receipt:
        """The proof so far."""
        plan, first = self._plan, self._plan.num_monitors
        in_scope, covered, edited, relative_edit = self._sums[:4, first:]
        counts = (count.astype(np.int64).tolist() for count in (in_scope, covered, edited))
        mean_edit = relative_edit / np.maximum(edited, 1)
        max_activation = np.where(covered > 0, self._max_score[first:], 0.0)
        idle = (in_scope == 0) & self._waits_for_rewind[first:] & (num_rewinds == 0)
        asked = plan.interventions[first:]
        lines = zip(asked, *counts, mean_edit.tolist(), max_activation.tolist(), strict=True)
        return Receipt(
            plan_hash=plan.hash,
            model_fingerprint=model_fingerprint,
            policies=plan.policies,
            packs=dict(plan.packs),
            interventions=tuple(
                InterventionReceipt(
                    planned.source, planned.label, planned.site, scope, ran, moved, mean, peak, planned.overridden_by
                )
                for planned, scope, ran, moved, mean, peak in lines
            ),
            steered=bool(asked) and bool((idle | ((in_scope > 0) & (covered == in_scope))).all()),
            num_rewinds=num_rewinds,
            num_rewound_tokens=num_rewound_tokens,
            num_cached_tokens=num_cached_tokens,
            monitors=tuple(self._monitors()),
        )

    def _monitors(self) -> Iterator[MonitorReceipt]:
        for index, planned in enumerate(self._plan.interventions[: self._plan.num_monitors]):
            in_scope, covered, _, _, total = self._sums[:, index].tolist()
            largest = float(self._max_score[index]) if covered else 0.0
            mean = total / max(covered, 1.0)
            yield MonitorReceipt(
                planned.source, planned.label, planned.site, int(in_scope), int(covered), largest, mean
            )


@dataclass(frozen=True, eq=False)
class Share:
    """One row's interventions of some width at one stage; ``norm_column`` of ``x_norm`` is what the stage saw."""

    row: int
    norm_column: int
    segments: Segments


class Account:
    """The interventions of one width among all rows of a log, added up together."""

    def __init__(self, shares: Sequence[Share]) -> None:
        counts = [len(share.segments.intervention) for share in shares]
        ends = np.cumsum(counts).tolist()
        self._shares = [(share, slice(end - n, end)) for share, n, end in zip(shares, counts, ends, strict=True)]
        self._norm_column = np.repeat([share.norm_column for share in shares], counts)
        self._segments = Segments(
            intervention=np.concatenate([share.segments.intervention for share in shares]),
            first=np.concatenate([share.segments.first for share in shares]),
            weight=np.concatenate([share.segments.weight for share in shares]),
            gram=np.concatenate([share.segments.gram for share in shares]),
        )

    def add(self, activation: FloatArray, edit: FloatArray, x_norm: FloatArray, tallies: Sequence[Tally]) -> None:
        """Add ``n`` positions to the tally of each row.

        Args:
            activation, edit: ``[n, nnz]``; NaN and 0 where the kernel did not run.
            x_norm: ``[n, columns]``; negative where the kernel did not run.
        """
        covered = ~(x_norm < 0)
        # Per position and stage, not per entry: many entries share a norm.
        inverse = np.where(x_norm >= 0, 1.0 / np.maximum(x_norm.astype(np.float64), SMALLEST_NORM), 0.0)
        edits = edit[:, self._segments.entries]
        sums = np.empty((5, len(self._norm_column)))
        sums[0] = len(x_norm)
        sums[1] = covered.sum(axis=0)[self._norm_column]
        sums[2] = (edits != 0).any(axis=1).sum(axis=0)
        sums[3] = np.einsum("ns,ns->s", _lengths(self._segments.gram, edits), inverse[:, self._norm_column])
        scored = scores(self._segments, activation)
        max_score = np.fmax.reduce(scored, axis=0)
        sums[4] = np.where(np.isfinite(scored), scored, 0.0).sum(axis=0, dtype=np.float64)
        for share, of_share in self._shares:
            tallies[share.row].record(share.segments.intervention, sums[:, of_share], max_score[of_share])
