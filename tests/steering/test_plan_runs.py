"""Compiled plans, run by the kernel's reference, do what the spec says in plain float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from steering_specs import ONES, SITE, direction, gate, guard, rewind, spec

from steerserve.kernels.steer_delta import steer_delta_, steer_delta_ref_
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.plan import Plan, SitePlan, Stage
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    Intervention,
    Op,
    Phase,
    Site,
    SteeringSpec,
    Stream,
    Target,
)

EARLY, LATE = Site(0, Stream.MLP_OUT), Site(3, Stream.RESID_PRE)
SITES = [EARLY, SITE, LATE]
NUM_TOKENS = 3
TOLERANCE = 1e-4

Activations = Mapping[Site, np.ndarray]
"""``[tokens, d]`` at each site. No model lies between them: what is done at one does not reach the next."""


@dataclass
class Run:
    """What is left behind a plan: activations, and the scores ``[tokens, G]``."""

    x: Activations
    score: np.ndarray


def run_plan(plan: Plan, level: int, phase: Phase, x: Activations, steer=steer_delta_ref_) -> Run:
    """One position a token, site after site, all sites with the same scores."""
    covered = np.array([p.phase in (Phase.ALL, phase) for p in plan.interventions], dtype=bool)
    score = torch.zeros(NUM_TOKENS, len(plan.scores))
    after = {site: torch.tensor(rows, dtype=torch.float32) for site, rows in x.items()}
    for site in sorted({part.site for part in plan.levels[level]}):
        parts = [part for part in plan.levels[level] if part.site == site]
        run_site(after[site], parts, covered, plan, score, steer)
    return Run({site: rows.double().numpy() for site, rows in after.items()}, score.numpy())


def run_site(
    x: torch.Tensor, parts: list[SitePlan], covered: np.ndarray, plan: Plan, score: torch.Tensor, steer
) -> None:
    """All tokens have the same entries and each its own scores."""

    def rows(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(part.rows, name) for part in parts]))

    def entries(name: str) -> np.ndarray:
        return np.tile(
            np.concatenate([getattr(part, name)[mine] for part, mine in zip(parts, chosen, strict=True)]), NUM_TOKENS
        )

    chosen = [covered[part.intervention] for part in parts]
    size = {part.stage: int(mine.sum()) for part, mine in zip(parts, chosen, strict=True)}
    num_entries, num_scores = sum(size.values()), len(plan.scores)
    first_row = np.repeat([0, len(parts[0].rows)][: len(parts)], list(size.values()))
    first_score = np.repeat(np.arange(NUM_TOKENS), num_entries) * num_scores
    wired = entries("score_index")
    steer(
        x,
        torch.from_numpy(np.cumsum([0, *[size.get(stage, 0) for stage in Stage] * NUM_TOKENS]).astype(np.int32)),
        torch.from_numpy((entries("row") + np.tile(first_row, NUM_TOKENS)).astype(np.int32)),
        torch.from_numpy(entries("op")),
        torch.from_numpy(entries("value")),
        torch.from_numpy(np.where(wired < 0, -1, wired + first_score).astype(np.int32)),
        *(rows(name) for name in ("W_enc", "b_enc", "threshold", "max_norm")),
        torch.zeros(sum(len(part.rows) for part in parts), dtype=torch.uint8),
        rows("W_dec"),
        torch.arange(NUM_TOKENS + 1, dtype=torch.int32) * num_scores,
        torch.tensor([planned.threshold for planned in plan.scores] * NUM_TOKENS, dtype=torch.float32),
        score.view(-1),
        torch.empty(num_entries * NUM_TOKENS),
        torch.empty(num_entries * NUM_TOKENS),
        torch.empty(NUM_TOKENS * len(Stage)),
    )


class Oracle:
    """The spec's meaning, straight from it: no plan, no rows, no indices; float64."""

    def __init__(self, sae: SAE, catalog: Catalog) -> None:
        self.mood = catalog.packs["mood"].tensors
        self.W_enc, self.W_dec = sae.W_enc.double().numpy(), sae.W_dec.double().numpy()
        self.b_enc = sae.b_enc.double().numpy() - sae.b_dec.double().numpy() @ self.W_enc
        self.threshold = sae.threshold.double().numpy()

    def site(self, target: Target) -> Site:
        return target.site if isinstance(target, DirectionTarget) else SITE

    def parts(self, target: Target) -> list[tuple[object, float]]:
        """(feature or unit vector, its weight in the score)."""
        match target:
            case FeatureTarget(_, index):
                return [(index, 1.0)]
            case ConceptTarget():
                return list(zip(self.mood.feature_ids.tolist(), self.mood.weight.astype(float).tolist(), strict=True))
            case DirectionTarget(_, vector):
                return [(tuple(vector / np.linalg.norm(vector.astype(float))), 1.0)]

    def activation(self, part: object, x: np.ndarray) -> float:
        if isinstance(part, tuple):
            return float(x @ np.array(part))
        pre = float(x @ self.W_enc[:, part] + self.b_enc[part])
        assume(abs(pre - self.threshold[part]) > TOLERANCE)
        return pre if pre > self.threshold[part] else 0.0

    def decoder(self, part: object) -> np.ndarray:
        return np.array(part) if isinstance(part, tuple) else self.W_dec[part]

    def score(self, target: Target, x: np.ndarray) -> float:
        return sum(weight * self.activation(part, x) for part, weight in self.parts(target))

    def opens(self, condition: Gate, unedited: Mapping[Site, np.ndarray]) -> bool:
        score = self.score(condition.target, unedited[self.site(condition.target)])
        assume(abs(score - condition.threshold) > TOLERANCE)
        return score > condition.threshold

    def shift(self, intervention: Intervention, factor: float, left_out: set, unedited: Mapping) -> np.ndarray:
        """What an intervention adds to x at its site."""
        shift = np.zeros(len(ONES))
        if intervention.gate is not None and not self.opens(intervention.gate, unedited):
            return shift
        for part, _ in self.parts(intervention.target):
            if part in left_out:
                continue
            f = self.activation(part, unedited[self.site(intervention.target)])
            v = factor * float(np.float32(intervention.value or 0.0))
            edited = {
                Op.MONITOR: f,
                Op.BLOCK: 0.0,
                Op.SCALE: v * f,
                Op.ADD: f + v,
                Op.CLIP: min(f, v),
                Op.CLAMP: v if f > 0 or intervention.always else f,
            }[intervention.op]
            shift += (edited - f) * self.decoder(part)
        return shift

    def run(self, asked: SteeringSpec, with_policy: bool, retry: int, phase: Phase, x: Mapping) -> tuple[Mapping, list]:
        """One token: what is left at each site, and the score of each guard that covers the phase."""
        again = [edit for g in asked.guards if g.rewind and retry for edit in g.rewind.edits]
        replaced = {(self.site(e.target), part) for e in again for part, _ in self.parts(e.target)}
        edited = {site: row.copy() for site, row in x.items()}
        for intervention in asked.interventions:
            if intervention.phase in (Phase.ALL, phase):
                site = self.site(intervention.target)
                gone = {part for where, part in replaced if where == site}
                edited[site] += self.shift(intervention, 1.0, gone, x)
        for edit in again:
            edited[self.site(edit.target)] += self.shift(edit, retry, set(), x)
        scores = [
            self.score(g.target, edited[self.site(g.target)]) if g.phase in (Phase.ALL, phase) else None
            for g in asked.guards
        ]
        if with_policy:
            values = zip(self.mood.feature_ids.tolist(), self.mood.value.astype(float).tolist(), strict=True)
            at_site = edited[SITE].copy()
            for part, value in values:
                edited[SITE] += (value - self.activation(part, at_site)) * self.decoder(part)
        return edited, scores


RNG = np.random.default_rng(0)
VECTORS = {site: RNG.standard_normal(8).astype(np.float32) for site in SITES}
TARGETS: list[Target] = [
    *(FeatureTarget("toy-sae", i) for i in range(6)),
    ConceptTarget("mood"),
    *(DirectionTarget(site, VECTORS[site]) for site in SITES),
]
DISJOINT: list[list[Target]] = [
    [t for t in TARGETS if not isinstance(t, ConceptTarget)],
    [t for t in TARGETS if t not in (FeatureTarget("toy-sae", 1), FeatureTarget("toy-sae", 3))],
]
"""Targets that may be edited side by side: the concept, or its features."""


def site_of(target: Target) -> Site:
    return target.site if isinstance(target, DirectionTarget) else SITE


small = st.floats(-3, 3, width=32)


@st.composite
def edits(draw, last: Site, phases: st.SearchStrategy[Phase], readings: bool = True) -> list[Intervention]:
    """Edits of different features, none behind ``last``, some of them gated."""
    allowed = [t for t in draw(st.sampled_from(DISJOINT)) if not last < site_of(t)]
    drawn = []
    for target in draw(st.lists(st.sampled_from(allowed), unique_by=id, min_size=0 if readings else 1, max_size=5)):
        ops = [
            op
            for op in Op
            if (op is not Op.CLAMP or not isinstance(target, DirectionTarget)) and (readings or op is not Op.MONITOR)
        ]
        op = draw(st.sampled_from(ops))
        readable = [t for t in TARGETS if not site_of(target) < site_of(t)]
        condition = None if op is Op.MONITOR else draw(st.none() | st.builds(Gate, st.sampled_from(readable), small))
        value = None if op in (Op.BLOCK, Op.MONITOR) else draw(small)
        always = op is Op.CLAMP and draw(st.booleans())
        drawn.append(Intervention(target, op, value, always=always, phase=draw(phases), gate=condition))
    return drawn


@st.composite
def requests(draw) -> tuple[SteeringSpec, tuple[str, ...]]:
    """A spec and, sometimes, the policy ``mood``."""
    policies = ("mood",) if draw(st.booleans()) else ()
    last = SITE if policies else LATE
    phases = st.sampled_from(Phase)
    again = rewind(*draw(edits(last, st.just(Phase.ALL), readings=False)), max_retries=draw(st.integers(1, 3)))
    guards = [guard(t, draw(small), phase=draw(phases)) for t in draw(st.lists(st.sampled_from(TARGETS), max_size=3))]
    if draw(st.booleans()):
        guards.append(guard(draw(st.sampled_from(TARGETS)), draw(small), again))
    return spec(*draw(edits(last, phases)), guards=tuple(guards)), policies


@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip
@given(request=requests(), seed=st.integers(0, 2**32 - 1), phase=st.sampled_from([Phase.PROMPT, Phase.GENERATED]))
def test_a_plan_does_what_its_spec_says(request, seed, phase, catalog, sae) -> None:
    asked, policies = request
    plan = compile_plan(asked, policies, catalog)
    rng = np.random.default_rng(seed)
    x = {site: rng.standard_normal((NUM_TOKENS, 8)).astype(np.float32).astype(np.float64) for site in SITES}
    oracle = Oracle(sae, catalog)
    for level in range(len(plan.levels)):
        run = run_plan(plan, level, phase, x)
        for token in range(NUM_TOKENS):
            alone = {site: rows[token] for site, rows in x.items()}
            edited, scores = oracle.run(asked, bool(policies), level, phase, alone)
            for site in SITES:
                np.testing.assert_allclose(run.x[site][token], edited[site], rtol=1e-3, atol=1e-3, err_msg=str(site))
            for planned, score in zip(plan.guards, scores, strict=True):
                if score is not None:
                    np.testing.assert_allclose(run.score[token, planned.score], score, rtol=1e-3, atol=1e-3)


def scores_around(threshold: float) -> Iterator[float]:
    yield from (threshold - 0.25, threshold, threshold + 0.25)


@pytest.mark.parametrize("steer", [steer_delta_, steer_delta_ref_])
@pytest.mark.parametrize("read_at", [EARLY, SITE], ids=str)
def test_a_gate_opens_above_its_threshold(read_at, steer, catalog) -> None:
    """Read at its own site or an earlier one, with scores that float32 holds exactly."""
    e0, e1 = np.eye(8, dtype=np.float32)[:2]
    asked = direction(Op.ADD, 2.0, vector=e1, gate=gate(DirectionTarget(read_at, e0), 0.5))
    plan = compile_plan(spec(asked, direction(Op.ADD, 8.0, vector=e0)), (), catalog)
    rows = np.stack([score * e0 for score in scores_around(0.5)])
    run = run_plan(plan, 0, Phase.PROMPT, {EARLY: rows, SITE: rows}, steer)
    assert run.score.tolist() == [[0.25], [0.5], [0.75]], "the request's own edits at the site do not count"
    assert run.x[SITE][:, 1].tolist() == [0, 0, 2]
    np.testing.assert_array_equal(run.x[EARLY], rows)
