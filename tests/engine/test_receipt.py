"""What a receipt adds up, against a loop over positions and interventions in float64.

The kernel is played by the test, which writes into the log what a kernel could, non-finite activations and
passes that never reached a site included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from steerserve.engine.feature_bank import FeatureBank
from steerserve.engine.receipt import Tally
from steerserve.engine.steering_log import LOG_STEPS, SteeringLog, entries_in_phase
from steerserve.models.splice import SiteWork
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.packs import ConceptPack, ModelRef, PackCard, PackTensors, PolicyAction
from steerserve.steering.plan import Plan, Stage
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Intervention,
    Op,
    Phase,
    Site,
    SteeringSpec,
    Stream,
)

D_MODEL, D_SAE, FINGERPRINT = 6, 10, "f" * 64
EARLY, LATE = Site(0, Stream.MLP_OUT), Site(1, Stream.RESID_POST)
PACK_WIDTHS = (1, 2, 3, 3, 5)


@dataclass(frozen=True)
class Facts:
    """What steering knows of a model."""

    name: str = "toy"
    fingerprint: str = FINGERPRINT
    d_model: int = D_MODEL
    n_layers: int = 2


def random_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def make_pack(rng: np.random.Generator, name: str, width: int) -> ConceptPack:
    rows, ones = random_rows(rng, 2, width, D_MODEL), np.ones(width, dtype=np.float32)
    card = PackCard(
        name=name,
        version="1",
        description="test",
        model=ModelRef(name="toy", fingerprint=FINGERPRINT),
        sae=None,
        site=str(LATE),
        policy=PolicyAction(op=Op.SCALE),
        score_threshold=0.0,
    )
    tensors = PackTensors(
        W_enc=rows[0],
        b_enc=0 * ones,
        threshold=0 * ones,
        max_norm=np.inf * ones,
        W_dec=rows[1],
        value=ones,
        weight=random_rows(rng, width),
        max_activation=ones,
        feature_ids=np.full(width, -1),
    )
    return ConceptPack(card, tensors, sha256=name)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    rng = np.random.default_rng(0)
    W_enc, W_dec = torch.from_numpy(random_rows(rng, 2, D_SAE, D_MODEL))
    zero = torch.zeros(D_SAE)
    sae = SAE("toy-sae", LATE, W_enc.T, zero, W_dec, torch.zeros(D_MODEL), zero)
    packs = [make_pack(rng, f"pack-{i}", width) for i, width in enumerate(PACK_WIDTHS)]
    return Catalog(Facts(), {"toy-sae": sae}, {pack.name: pack for pack in packs})


@dataclass
class Line:
    """What the loop counts of one intervention."""

    decoder: np.ndarray
    weight: np.ndarray
    in_scope: int = 0
    covered: int = 0
    edited: int = 0
    relative: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, activation: np.ndarray, edit: np.ndarray, norm: float) -> None:
        """One position."""
        self.in_scope += 1
        if norm < 0:
            return
        self.covered += 1
        if (edit != 0).any():
            self.edited += 1
            self.relative.append(float(np.linalg.norm(edit.astype(float) @ self.decoder)) / norm)
        with np.errstate(invalid="ignore"):
            self.scores.append(float(activation.astype(float) @ self.weight))

    def max_score(self) -> float:
        """The largest score that is a number."""
        numbers = [score for score in self.scores if not math.isnan(score)]
        return max(numbers, default=math.nan if self.covered else 0.0)


class Request:
    """A random plan, its tally and what the loop makes of the same positions."""

    def __init__(self, rng: np.random.Generator, catalog: Catalog, bank: FeatureBank) -> None:
        interventions = [i for i in candidates(rng, catalog) if rng.random() < 0.6]
        rng.shuffle(interventions)  # type: ignore[arg-type]
        policies = [name for name in ("pack-1", "pack-4") if rng.random() < 0.3]
        self.plan: Plan = compile_plan(SteeringSpec(tuple(interventions)), policies, catalog)
        self.entries = {
            phase: entries_in_phase(self.plan, bank.acquire(self.plan), phase)
            for phase in (Phase.PROMPT, Phase.GENERATED)
        }
        self.tally = Tally(self.plan)
        targets = [i.target for i in interventions] + [ConceptTarget(name) for name in policies]
        self.lines = [self._line(index, target, catalog) for index, target in enumerate(targets)]

    def _line(self, index: int, target: object, catalog: Catalog) -> Line:
        (part,) = (part for part in self.plan.sites if index in part.intervention)
        decoder = part.rows.W_dec[part.row[part.intervention == index]].astype(float)
        weighs = isinstance(target, ConceptTarget)
        return Line(decoder, catalog.packs[target.concept].tensors.weight.astype(float) if weighs else np.ones(1))

    def owners(self, site: Site, stage: Stage, phase: Phase) -> np.ndarray:
        """The intervention of each entry that a position of ``phase`` has at a stage of a site."""
        return np.array(
            [
                intervention
                for part in self.plan.sites
                if (part.site, part.stage) == (site, stage)
                for intervention in part.intervention
                if self.plan.interventions[intervention].phase in (Phase.ALL, phase)
            ]
        )


def candidates(rng: np.random.Generator, catalog: Catalog) -> list[Intervention]:
    """Interventions of every kind and phase that may stand beside one another."""

    def phase() -> Phase:
        return list(Phase)[rng.integers(3)]

    features = [Intervention(FeatureTarget("toy-sae", i), Op.BLOCK, phase=phase()) for i in range(D_SAE)]
    monitors = [Intervention(FeatureTarget("toy-sae", i), Op.MONITOR, phase=phase()) for i in (0, 3)]
    concepts = [Intervention(ConceptTarget(name), Op.SCALE, 2.0, phase=phase()) for name in catalog.packs]
    directions = [
        Intervention(DirectionTarget(site, random_rows(rng, D_MODEL)), Op.ADD, 1.0, phase=phase())
        for site in (EARLY, LATE)
    ]
    return features + monitors + concepts + directions


def play_kernel(
    rng: np.random.Generator, site: Site, work: SiteWork, requests: Sequence[Request], phase: Phase
) -> None:
    """Write one run's results into the log and count them in the loop's way."""
    ptr = work.ptr.tolist()
    for segment in range(len(ptr) - 1):
        request = requests[segment // len(Stage) % len(requests)]
        entries = slice(ptr[segment], ptr[segment + 1])
        owners = request.owners(site, Stage(segment % len(Stage)), phase)
        assert len(owners) == entries.stop - entries.start
        if len(owners) == 0:
            continue
        norm = rng.choice([-1.0, np.inf, np.nan, float(rng.uniform(0.1, 9.0))], p=[0.1, 0.02, 0.05, 0.83])
        size = len(owners)
        activation = np.where(rng.random(size) < 0.5, 0, random_rows(rng, size))
        activation[rng.random(size) < 0.03] = np.inf
        activation[(rng.random(size) < 0.03) | np.isnan(norm)] = np.nan
        edit = np.where((rng.random(size) < 0.4) & np.isfinite(activation), random_rows(rng, size), 0)
        if not norm < 0:
            work.activation[entries] = torch.from_numpy(activation)
            work.edit[entries] = torch.from_numpy(edit)
            work.x_norm[segment] = norm
        for intervention in set(owners.tolist()):
            mine = owners == intervention
            request.lines[intervention].add(activation[mine], edit[mine], float(norm))


def serve(rng: np.random.Generator, catalog: Catalog, num_steps: int) -> list[Request]:
    """Requests that join with a prefill and leave in the midst of a decode log."""
    bank = FeatureBank(64, D_MODEL)
    running: list[Request] = []
    served: list[Request] = []
    log: SteeringLog | None = None
    for _ in range(num_steps):
        if len(running) < 4 and rng.random() < 0.2:
            new = Request(rng, catalog, bank)
            prefill = SteeringLog.for_prefill(new.entries[Phase.PROMPT], new.tally, bank, int(rng.integers(1, 6)))
            for site, work in prefill.next_run().items():
                play_kernel(rng, site, work, [new], Phase.PROMPT)
            prefill.flush()
            running, served = [*running, new], [*served, new]
        elif running and rng.random() < 0.05:
            running = [request for request in running if request is not running[0]]
        else:
            log = log or SteeringLog.for_decode(
                [request.entries[Phase.GENERATED] for request in running], [r.tally for r in running], bank
            )
            for site, work in log.next_run().items():
                play_kernel(rng, site, work, running, Phase.GENERATED)
            continue
        if log is not None:
            log.flush()
            log = None
    if log is not None:
        log.flush()
    return served


def assert_counted(request: Request) -> None:
    """The receipt says what the loop counted."""
    receipt = request.tally.receipt(FINGERPRINT)
    covered = all(0 < line.in_scope == line.covered for line in request.lines)
    assert receipt.steered == (bool(request.lines) and covered)
    for seen, line in zip(receipt.interventions, request.lines, strict=True):
        counts = (seen.tokens_in_scope, seen.tokens_covered, seen.tokens_edited)
        assert counts == (line.in_scope, line.covered, line.edited)
        mean = sum(line.relative) / len(line.relative) if line.relative else 0.0
        assert seen.mean_relative_edit == pytest.approx(mean, rel=1e-6)
        assert seen.max_activation == pytest.approx(line.max_score(), rel=1e-5, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("seed", range(12))
def test_a_receipt_is_what_a_loop_over_positions_counts(seed, catalog) -> None:
    served = serve(np.random.default_rng(seed), catalog, num_steps=60)
    lines = [line for request in served for line in request.lines]
    assert {len(line.weight) for line in lines} >= {1, 2, 3, 5}
    assert any(0 < line.edited < line.covered < line.in_scope for line in lines)
    assert any(math.isnan(score) for line in lines for score in line.scores)
    for request in served:
        assert_counted(request)


def test_a_log_longer_than_its_lines_loses_and_repeats_none(catalog) -> None:
    rng = np.random.default_rng(0)
    bank = FeatureBank(64, D_MODEL)
    request = Request(rng, catalog, bank)
    log = SteeringLog.for_decode([request.entries[Phase.GENERATED]], [request.tally], bank)
    for _ in range(2 * LOG_STEPS + 3):
        for site, work in log.next_run().items():
            play_kernel(rng, site, work, [request], Phase.GENERATED)
    log.flush()
    assert max(line.in_scope for line in request.lines) == 2 * LOG_STEPS + 3
    assert_counted(request)


def test_a_guard_that_did_not_run_counts_as_failed_although_it_once_ran(catalog) -> None:
    """What a full log held must not pass for a reading of the next step."""
    plan = compile_plan(SteeringSpec(), ("pack-1",), catalog)
    bank = FeatureBank(64, D_MODEL)
    entries = entries_in_phase(plan, bank.acquire(plan), Phase.GENERATED)
    log = SteeringLog.for_decode([{}, entries], [Tally(compile_plan(SteeringSpec(), (), catalog)), Tally(plan)], bank)
    for _ in range(LOG_STEPS):
        (work,) = log.next_run().values()
        assert log.rows_with_failed_guard() == {1}
        work.activation.zero_()
        work.x_norm.fill_(1.0)
        assert log.rows_with_failed_guard() == set()
    log.next_run()
    assert log.rows_with_failed_guard() == {1}
