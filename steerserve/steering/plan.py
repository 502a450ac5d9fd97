"""A steering spec compiled for one loaded model: plain arrays, no names.

A plan has two stages. ``REQUEST`` holds the caller's interventions and reads the unedited
activation; ``POLICY`` holds the guards' and reads what the request left. Within a stage all
interventions at a site read the same activation and their edits add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from steerserve.types import FloatArray, Phase, Site

IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]
DoubleArray = npt.NDArray[np.float64]

FeatureKey = tuple[str, int]
"""Identity of a feature's rows, e.g. ``("sae:<name>:<hash>", 123)``; equal keys mean equal rows."""


class Stage(IntEnum):
    """Order in which edits apply at a site."""

    REQUEST = 0
    POLICY = 1


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """``k`` features of one site in the kernel's terms: f = pre if pre > threshold and |x| <= max_norm else 0.

    ReLU has threshold 0, JumpReLU and BatchTopK their own; a direction is a feature with
    threshold −inf (f is the projection) and W_enc = W_dec = the unit vector.

    Attributes:
        keys: ``[k]``.
        W_enc: ``[k, d]``, one row per feature; ``b_enc`` ``[k]`` has −b_dec·W_enc folded in.
        max_norm: ``[k]`` largest |x| the feature is defined on; +inf for a direction.
        W_dec: ``[k, d]``, already in the units of the residual stream.
    """

    keys: tuple[FeatureKey, ...]
    W_enc: FloatArray
    b_enc: FloatArray
    threshold: FloatArray
    max_norm: FloatArray
    W_dec: FloatArray

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, eq=False)
class Segments:
    """``s`` interventions of ``w`` entries each, as accounting sees them: all of one width at once.

    Attributes:
        intervention: ``[s]`` index into ``Plan.interventions``.
        first: ``[s]`` where its entries start; the others follow.
        weight: ``[s, w]`` its score is ``weight · f``.
        gram: ``[s, w, w]`` W_dec W_decᵀ of its entries: |x' − x|² = eᵀ gram e for edits e.
    """

    intervention: IntArray
    first: IntArray
    weight: FloatArray
    gram: DoubleArray

    @property
    def width(self) -> int:
        """Entries of each."""
        return int(self.weight.shape[1])

    @property
    def entries(self) -> IntArray:
        """``[w, s]`` where each entry is."""
        return self.first + np.arange(self.width, dtype=np.int32)[:, None]


@dataclass(frozen=True, eq=False)
class SitePlan:
    """One stage's work at one site, an entry per (intervention, feature).

    Attributes:
        row: ``[n]`` index into ``rows``.
        op: ``[n]`` codes of ``steerserve.kernels.steer_delta.OpCode``.
        value: ``[n]`` the operand, in activation units.
        intervention: ``[n]`` index into ``Plan.interventions``; entries of one are contiguous.
        segments: one item a width.
    """

    site: Site
    stage: Stage
    rows: FeatureRows
    row: IntArray
    op: ByteArray
    value: FloatArray
    intervention: IntArray
    segments: tuple[Segments, ...]


@dataclass(frozen=True, eq=False)
class PlannedIntervention:
    """One intervention of the plan, as the receipt names it."""

    source: str
    label: str
    site: Site
    stage: Stage
    phase: Phase


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything the engine needs to run and to account for one request's steering."""

    interventions: tuple[PlannedIntervention, ...]
    sites: tuple[SitePlan, ...]
    policies: tuple[str, ...]
    packs: dict[str, str]
    hash: str
