"""Accounting: what the kernel reported, added up for each intervention of one request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steerserve.steering.plan import Plan, PlannedIntervention
from steerserve.types import FloatArray, InterventionReceipt, Receipt


@dataclass
class _Count:
    """Running sums of one intervention."""

    in_scope: int = 0
    covered: int = 0
    edited: int = 0
    relative_edit: float = 0.0
    max_score: float = float("nan")


class Tally:
    """The sums of one request's plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._counts = [_Count() for _ in plan.interventions]

    def record(self, intervention: int, activation: FloatArray, edit: FloatArray, x_norm: FloatArray) -> None:
        """Add ``n`` positions in the intervention's scope.

        Args:
            activation, edit: ``[n, m]`` of the intervention's own entries.
            x_norm: ``[n, stages]``; negative where the kernel did not run.
        """
        planned, count = self._plan.interventions[intervention], self._counts[intervention]
        norm = x_norm[:, planned.stage]
        covered = ~(norm < 0)
        edited = covered & (edit != 0).any(axis=1)
        count.in_scope += len(norm)
        count.covered += int(covered.sum())
        count.edited += int(edited.sum())
        count.relative_edit += _relative_edits(edit[edited], norm[edited], planned.gram)
        if covered.any():
            count.max_score = float(np.fmax(count.max_score, np.fmax.reduce(activation[covered] @ planned.weight)))

    def receipt(self, model_fingerprint: str) -> Receipt:
        """The proof so far."""
        plan = self._plan
        return Receipt(
            plan_hash=plan.hash,
            model_fingerprint=model_fingerprint,
            policies=plan.policies,
            packs=dict(plan.packs),
            interventions=tuple(map(_line, plan.interventions, self._counts)),
            steered=bool(self._counts) and all(0 < count.in_scope == count.covered for count in self._counts),
        )


def _relative_edits(edit: FloatArray, norm: FloatArray, gram: FloatArray) -> float:
    """Σ |x' − x| / |x| over positions ``[n]``, with |x' − x|² = eᵀ gram e; x is not 0 where it was edited to be."""
    exact = edit.astype(np.float64)
    squared = np.einsum("ni,ni->n", exact @ gram.astype(np.float64), exact)
    smallest = np.finfo(np.float32).tiny
    return float((np.sqrt(np.maximum(squared, 0.0)) / np.maximum(norm, smallest)).sum())


def _line(planned: PlannedIntervention, count: _Count) -> InterventionReceipt:
    return InterventionReceipt(
        source=planned.source,
        label=planned.label,
        site=planned.site,
        tokens_in_scope=count.in_scope,
        tokens_covered=count.covered,
        tokens_edited=count.edited,
        mean_relative_edit=count.relative_edit / count.edited if count.edited else 0.0,
        max_activation=count.max_score if count.covered else 0.0,
    )
