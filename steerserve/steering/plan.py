"""A steering spec compiled for one loaded model: plain arrays, no names.

A plan has two stages. ``REQUEST`` holds the caller's interventions and reads the unedited
activation; ``POLICY`` holds the guards' and reads what the request left. Within a stage all
interventions at a site read the same activation and their edits add up.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from steerserve.types import FloatArray, GuardAction, Phase, Rewind, Site

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
        score_index: ``[n]`` index into ``Plan.scores``: the score that a monitor feeds with value · f, or that
            gates any other entry; −1 for none.
        segments: one item a width.
    """

    site: Site
    stage: Stage
    rows: FeatureRows
    row: IntArray
    op: ByteArray
    value: FloatArray
    intervention: IntArray
    score_index: IntArray
    segments: tuple[Segments, ...]


@dataclass(frozen=True, eq=False)
class PlannedIntervention:
    """One intervention of the plan, as the receipt names it; what a gate or a guard reads is one too.

    Attributes:
        edits: it is no reading.
        fail_open: the response goes on where it could not run.
        overridden_by: sources of the policies that edit the same behind it.
    """

    source: str
    label: str
    site: Site
    stage: Stage
    phase: Phase
    edits: bool = True
    fail_open: bool = False
    overridden_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedScore:
    """A score the kernel adds up for every position that ``phase`` covers, and where it opens a gate or fires.

    Attributes:
        intervention: the monitor that feeds it, as an index into ``Plan.interventions``.
    """

    intervention: int
    threshold: float
    phase: Phase


@dataclass(frozen=True)
class PlannedGuard:
    """A guard of the request, or a rule of a policy that acts on a score.

    Attributes:
        score: an index into ``Plan.scores``.
        place: its index among the request's guards, or the policy's rules.
    """

    score: int
    source: str
    place: int
    label: str
    action: GuardAction
    rewind: Rewind | None
    fail_open: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything the engine needs to run and to account for one request's steering.

    Attributes:
        interventions: the server's monitors, then the request's in their order, then what its gates and guards read
            and the edits of its rewinds, then the policies' edits, what these read, and the edits of their rewinds.
        num_monitors: how many of them are the server's monitors. These come first, so that they have the same indices
            in every plan and requests share cached prefixes as if there were none.
        levels: what to do at each site; ``levels[r]`` is in force from the position of the r-th rewind on.
            All levels have the same gates and guards.
        hash: SHA-256 of everything above the wire's names; empty for the empty plan.
    """

    interventions: tuple[PlannedIntervention, ...]
    levels: tuple[tuple[SitePlan, ...], ...]
    scores: tuple[PlannedScore, ...]
    guards: tuple[PlannedGuard, ...]
    policies: tuple[str, ...]
    packs: dict[str, str]
    hash: str
    num_monitors: int = 0
    _effective_digests: dict[tuple[int, Phase, bool], bytes] = field(default_factory=dict, init=False, repr=False)

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        """What is done before any rewind."""
        return self.levels[0]

    @property
    def num_layers(self) -> int:
        """How many of the model's layers must run for all of it to happen."""
        return max((part.site.layer + 1 for level in self.levels for part in level), default=0)

    @property
    def thresholds(self) -> dict[tuple[str, int], float]:
        """Of each guard, by ``GuardEvent.source`` and ``GuardEvent.guard``."""
        return {(guard.source, guard.place): self.scores[guard.score].threshold for guard in self.guards}

    @property
    def hold_back(self) -> int:
        """Positions that must have been read, its own included, before a token may be released; 0 without guards."""
        return max((guard.rewind.num_tokens if guard.rewind else 1 for guard in self.guards), default=0)

    @property
    def redacts(self) -> bool:
        """Some word of the response may be kept from the client."""
        return any(
            guard.action is GuardAction.REDACT
            or (guard.rewind is not None and guard.rewind.otherwise is GuardAction.REDACT)
            for guard in self.guards
        )

    def request_edits(self, level: int) -> bool:
        """The request edits what policies and guards read, or has done so before the ``level``-th rewind."""
        of_request = {i for i, planned in enumerate(self.interventions) if planned.edits and not planned.stage}
        return any(
            not of_request.isdisjoint(part.intervention.tolist()) for each in self.levels[: level + 1] for part in each
        )

    def covers(self, phase: Phase, at_start: bool = False) -> npt.NDArray[np.bool_]:
        """``[interventions]`` those in force at positions of ``phase`` (``PROMPT`` or ``GENERATED``).

        Args:
            at_start: at the first position of all. There attention sinks lie beyond the norm that features are defined
                on, by nature; so that no request can make the same of any other model, its edits leave it alone where
                policies or guards end at a norm.
        """
        return np.array(
            [
                planned.phase in (Phase.ALL, phase)
                and not (at_start and self.spares_start and planned.edits and planned.stage is Stage.REQUEST)
                for planned in self.interventions
            ],
            dtype=bool,
        )

    @cached_property
    def spares_start(self) -> bool:
        """The request's edits leave the first position alone: a policy or guard that must not fail ends at a norm."""
        if not any(planned.edits and planned.stage is Stage.REQUEST for planned in self.interventions):
            return False
        must_run = np.array([not planned.fail_open for planned in self.interventions])
        return any(
            part.stage is Stage.POLICY
            and bool((must_run[part.intervention] & np.isfinite(part.rows.max_norm[part.row])).any())
            for level in self.levels
            for part in level
        )

    def effective_digest(self, level: int, phase: Phase, at_start: bool = False) -> bytes:
        """SHA-256 of all that runs at a position of ``phase`` while ``level`` is in force; empty if nothing does.

        Where two plans have equal digests the kernel does the same work, the guards decide alike, and what was
        counted belongs to the same indices of ``interventions``: what one request stored there serves the other.

        Args:
            phase: ``PROMPT`` or ``GENERATED``.
            at_start: at the first position of all, see ``covers``.
        """
        key = (level, phase, at_start)
        if key not in self._effective_digests:
            pieces = list(self._effective_pieces(level, self.covers(phase, at_start)))
            self._effective_digests[key] = _sha256(pieces) if pieces else b""
        return self._effective_digests[key]

    def _effective_pieces(self, level: int, covers: npt.NDArray[np.bool_]) -> Iterator[bytes]:
        for part in self.levels[level]:
            chosen = covers[part.intervention]
            if chosen.any():
                # Keys stand for the rows, and for the features' weights in a concept's score.
                keys = [part.rows.keys[row] for row in part.row[chosen]]
                yield repr((str(part.site), part.stage.name, keys)).encode()
                for array in (part.op, part.value, part.intervention, part.score_index):
                    yield array[chosen].tobytes()
        effective = {i: score.threshold for i, score in enumerate(self.scores) if covers[score.intervention]}
        guards = [(i, g.score, str(g.action), g.fail_open) for i, g in enumerate(self.guards) if g.score in effective]
        if effective:
            yield repr((len(self.scores), effective, guards)).encode()


def plan_hash(plan: Plan) -> str:
    """SHA-256 over every name and array of the plan but its own hash."""
    planned = [(p.source, p.label, str(p.site), p.stage.name, str(p.phase), p.fail_open) for p in plan.interventions]
    scores = [(score.intervention, score.threshold, str(score.phase)) for score in plan.scores]
    guards = [
        (g.score, g.source, g.place, g.label, str(g.action), g.fail_open, _rewind_terms(g.rewind)) for g in plan.guards
    ]
    sizes = [len(level) for level in plan.levels]
    names = repr((planned, scores, guards, plan.policies, list(plan.packs.items()), sizes))
    return _sha256([names.encode(), *_site_digests(plan.levels)]).hex()


def _rewind_terms(rewind: Rewind | None) -> tuple[int, str] | None:
    """All but its edits and the number of retries, which are in the levels."""
    return None if rewind is None else (rewind.num_tokens, str(rewind.otherwise))


def _site_digests(levels: Iterable[Iterable[SitePlan]]) -> Iterator[bytes]:
    """One for each site plan; rows that several share are read once."""
    rows_digests: dict[int, bytes] = {}
    for part in (part for level in levels for part in level):
        rows = part.rows
        if id(rows) not in rows_digests:
            columns = [rows.W_enc, rows.b_enc, rows.threshold, rows.max_norm, rows.W_dec]
            rows_digests[id(rows)] = _sha256([repr(rows.keys).encode(), *(_bytes(column) for column in columns)])
        arrays: list[npt.NDArray[Any]] = [part.row, part.op, part.value, part.intervention, part.score_index]
        arrays += [segments.weight for segments in part.segments]
        place = repr((str(part.site), part.stage.name)).encode()
        yield _sha256([place, rows_digests[id(rows)], *(_bytes(array) for array in arrays)])


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.ravel().view(np.uint8).data


def _sha256(pieces: Iterable[bytes | memoryview]) -> bytes:
    """Over the pieces, each preceded by its length."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(struct.pack("<q", len(piece)))
        digest.update(piece)
    return digest.digest()
