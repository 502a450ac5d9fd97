"""What a receipt adds up, against a loop over positions and interventions in float64.

The kernel is played by the test, which writes into the buffers of a step what a kernel could, non-finite
activations and passes that never reached a site included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from steerserve.engine.entries import PlanEntries
from steerserve.engine.feature_bank import FeatureBank
from steerserve.engine.flat_batch import FlatBatch
from steerserve.engine.readings import Readings
from steerserve.engine.sampler import DrawnToken
from steerserve.engine.scheduler import Chunk
from steerserve.engine.sequence import Sequence
from steerserve.engine.steering_log import LOG_STEPS
from steerserve.engine.step_tables import StepTables
from steerserve.kernels.steer_delta import OpCode
from steerserve.models.families import HookPoint
from steerserve.models.splice import ScoreBuffers, SiteBuffers
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.packs import ConceptPack, DetectorCard, ModelRef, PackCard, PackTensors, PolicyAction
from steerserve.steering.plan import Plan, SitePlan, Stage
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    GenerateRequest,
    Guard,
    GuardAction,
    Intervention,
    Op,
    Phase,
    Rewind,
    SamplingParams,
    Site,
    SteeringSpec,
    Stream,
)

D_MODEL, D_SAE, FINGERPRINT = 6, 10, "f" * 64
EARLY, LATE = Site(0, Stream.MLP_OUT), Site(1, Stream.RESID_POST)
PACK_WIDTHS = (1, 2, 3, 3, 5)
BLOCK_SIZE, MAX_TOKENS, NUM_RUNS = 4, 200, 10


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
        sites=[str(LATE)],
        policy=PolicyAction(op=Op.SCALE),
        detector=DetectorCard(kind="features", site=str(LATE), threshold=0.0),
    )
    tensors = PackTensors(
        site=np.zeros(width, dtype=np.int64),
        W_enc=rows[0],
        b_enc=0 * ones,
        threshold=0 * ones,
        max_norm=np.inf * ones,
        W_dec=rows[1],
        edited=np.ones(width, dtype=bool),
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


class Silent:
    """A detokenizer that has nothing to say."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""

    def snapshot(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass


class Request:
    """A random plan under way, and what the loop makes of the same positions."""

    def __init__(self, rng: np.random.Generator, catalog: Catalog, bank: FeatureBank, row: int = 0, **spec) -> None:
        spec = spec or random_spec(rng, catalog)
        policies = spec.pop("policies")
        asked = GenerateRequest("r", (0,), SamplingParams(max_tokens=1000), SteeringSpec(**spec))
        self.plan: Plan = compile_plan(asked.steering, policies, catalog)
        prompt = [0] * int(rng.integers(1, 20))
        entries = PlanEntries(self.plan, bank.acquire(self.plan))
        self.sequence = Sequence(
            asked,
            0,
            prompt,
            entries,
            Silent(),
            num_layers=1,
            root_key=bytes(32),
            block_size=BLOCK_SIZE,
            arrival=row,
            deadline=None,
            is_cacheable=True,
        )
        self.sequence.row = row
        self.level = [0] * len(prompt)
        self.num_read = 0
        self.events: list[tuple[int, int]] = []
        self.has_failed = self.is_limited = False
        weight = {name: pack.tensors.weight.astype(float) for name, pack in catalog.packs.items()}
        self.lines = [self._line(index, weight) for index in range(len(self.plan.interventions))]

    def _line(self, index: int, weight: dict[str, np.ndarray]) -> Line:
        part = next(part for level in self.plan.levels for part in level if index in part.intervention)
        decoder = part.rows.W_dec[part.row[part.intervention == index]].astype(float)
        words = self.plan.interventions[index].label.replace(":", " ").split()
        (of_concept,) = [weight[name] for name in weight if name in words] or [np.ones(1)]
        is_reading = words[0] == "guard"  # an edit's score is in units of the largest activations, all 1 here
        return Line(decoder, of_concept if is_reading else np.ones(len(decoder)))

    def parts(self, site: Site, stage: Stage, position: int) -> Iterator[tuple[SitePlan, np.ndarray]]:
        """What is in force at a position: site plans, and which of their entries."""
        phase = Phase.PROMPT if position < self.sequence.num_prompt_tokens else Phase.GENERATED
        covered = [
            planned.phase in (Phase.ALL, phase)
            and not (position == 0 and self.is_limited and planned.source == "request")
            for planned in self.plan.interventions
        ]
        for part in self.plan.levels[self.level[position]]:
            chosen = np.array(covered)[part.intervention]
            if (part.site, part.stage) == (site, stage) and chosen.any():
                yield part, chosen

    def append_token(self) -> None:
        self.sequence.append(DrawnToken(0), frozenset())
        self.level.append(self.sequence.num_rewinds)

    def rewind(self, kept: int) -> None:
        self.sequence.rewind(kept)
        self.sequence.num_computed = kept - 1
        self.level = [*self.level[: kept - 1], self.sequence.num_rewinds]
        self.num_read = kept - 1


def random_spec(rng: np.random.Generator, catalog: Catalog) -> dict[str, object]:
    """Interventions, a gate, guards and policies, or none of them."""
    interventions = [i for i in candidates(rng, catalog) if rng.random() < 0.6]
    rng.shuffle(interventions)  # type: ignore[arg-type]
    gate = Gate(DirectionTarget(EARLY, random_rows(rng, D_MODEL)), 0.5)
    gated = Intervention(DirectionTarget(LATE, random_rows(rng, D_MODEL)), Op.ADD, 1.0, gate=gate)
    rewind = Rewind(1, (Intervention(FeatureTarget("toy-sae", 1), Op.ADD, 1.0),), max_retries=4)
    flag = Guard(ConceptTarget("pack-4"), 0.5, GuardAction.FLAG, fail_open=True, phase=list(Phase)[rng.integers(3)])
    again = Guard(FeatureTarget("toy-sae", 2), 1e6, GuardAction.REWIND, rewind, fail_open=True)
    return {
        "interventions": tuple([*interventions, gated] if rng.random() < 0.5 else interventions),
        "guards": (flag, again) if rng.random() < 0.5 else (),
        "policies": [name for name in ("pack-1", "pack-4") if rng.random() < 0.15],
    }


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


class Kernel:
    """The buffers of a step, what a kernel could leave in them, and the loop that counts it."""

    def __init__(self, rng: np.random.Generator, bank: FeatureBank, is_sound: bool = False) -> None:
        self.rng, self.bank, self.is_sound = rng, bank, is_sound
        self.scores = ScoreBuffers(MAX_TOKENS, 16 * MAX_TOKENS)
        self.sites = {
            site: SiteBuffers(HookPoint(torch.nn.Identity(), "output"), self.scores, MAX_TOKENS, 100 * MAX_TOKENS)
            for site in (EARLY, LATE)
        }
        self.readings = Readings(StepTables(self.sites, self.scores, bank), lambda sequence: None)

    def step(self, chunks: dict[Request, int]) -> set[Request]:
        """Compute so many positions of each request; those that must not go on."""
        batch = FlatBatch.of(Chunk(r.sequence, r.sequence.num_computed, count) for r, count in chunks.items())
        self.readings.prepare(batch.pieces)
        of = {request.sequence: request for request in chunks}
        tokens = [(of[piece.sequence], p) for piece in batch.pieces for p in range(piece.start, piece.end)]
        assert self.scores.ptr[0] == 0
        # The kernel's results first; they count in the order of each request's positions, and once.
        left = [self._play(t, request, position) for t, (request, position) in enumerate(tokens)]
        for request, position, results in sorted(
            ((*token, results) for token, results in zip(tokens, left, strict=True)), key=lambda item: item[1]
        ):
            if position >= request.num_read and not request.has_failed:
                self._count(request, position, *results)
        for request, count in chunks.items():
            request.sequence.num_computed += count
        judged = self.readings.read(batch.pieces)
        assert {of[sequence] for sequence in judged} == {request for request in chunks if request.has_failed}
        return {of[sequence] for sequence in judged}

    def _play(self, t: int, request: Request, position: int) -> tuple:
        """Write what the kernel leaves for one token, and check what it is asked for."""
        begin, end = self.scores.ptr[t : t + 2].tolist()
        assert self.scores.threshold[begin:end].tolist() == [score.threshold for score in request.plan.scores]
        assert not self.scores.score[begin:end].any()
        score = random_rows(self.rng, end - begin)
        if not self.is_sound:
            score[self.rng.random(end - begin) < 0.05] = self.rng.choice([np.nan, np.inf, -np.inf])
        self.scores.score[begin:end] = torch.from_numpy(score)
        left = []
        for site, buffers in self.sites.items():
            for stage in Stage:
                entries = slice(*buffers.ptr[2 * t + stage : 2 * t + stage + 2].tolist()) if buffers.active else None
                asked = list(request.parts(site, stage, position))
                assert len(asked) == (entries is not None and entries.start < entries.stop)
                for part, chosen in asked:
                    self._check_entries(buffers, entries, part, chosen, begin)
                    left.append((part, chosen, *self._leave(buffers, entries, 2 * t + stage)))
        return score, left

    def _check_entries(self, buffers: SiteBuffers, entries: slice, part: SitePlan, chosen, first_score: int) -> None:
        slots = buffers.slot[entries].long()
        np.testing.assert_array_equal(buffers.bank.W_dec[slots], part.rows.W_dec[part.row[chosen]])
        np.testing.assert_array_equal(buffers.op[entries], part.op[chosen])
        np.testing.assert_array_equal(buffers.value[entries], part.value[chosen])
        index = part.score_index[chosen]
        np.testing.assert_array_equal(buffers.score_index[entries], np.where(index >= 0, index + first_score, -1))

    def _leave(self, buffers: SiteBuffers, entries: slice, segment: int) -> tuple[np.ndarray, np.ndarray, float]:
        rng, size = self.rng, entries.stop - entries.start
        assert buffers.activation[entries].isnan().all()
        assert not buffers.edit[entries].any()
        assert buffers.x_norm[segment] == -1
        likely = [0.0, 0.0, 0.0, 1.0] if self.is_sound else [0.1, 0.02, 0.05, 0.83]
        norm = rng.choice([-1.0, np.inf, np.nan, float(rng.uniform(0.1, 9.0))], p=likely)
        activation = np.where(rng.random(size) < 0.5, 0, random_rows(rng, size))
        if not self.is_sound:
            activation[rng.random(size) < 0.03] = np.inf
            activation[(rng.random(size) < 0.03) | np.isnan(norm)] = np.nan
        edit = np.where((rng.random(size) < 0.4) & np.isfinite(activation), random_rows(rng, size), 0)
        if norm < 0:
            return np.full(size, np.nan), np.zeros(size), norm
        buffers.activation[entries] = torch.from_numpy(activation)
        buffers.edit[entries] = torch.from_numpy(edit)
        buffers.x_norm[segment] = norm
        return activation, edit, norm

    def _count(self, request: Request, position: int, score: np.ndarray, left: list) -> None:
        """One position, in the loop's way."""
        request.num_read = position + 1
        edits = any(
            part.stage is Stage.REQUEST and (part.op != OpCode.MONITOR).any()
            for part in request.plan.levels[request.level[position]]
        )
        for part, chosen, activation, edit, norm in left:
            owners = part.intervention[chosen]
            for intervention in set(owners.tolist()):
                mine = owners == intervention
                request.lines[intervention].add(activation[mine], edit[mine], float(norm))
            read = part.score_index[chosen] < 0
            if part.stage is Stage.POLICY and read.any():
                beyond = edits and position > 0 and norm > part.rows.max_norm[part.row[chosen]][read].min()
                request.has_failed |= bool(beyond or not np.isfinite(activation[read]).all())
        phase = Phase.PROMPT if position < request.sequence.num_prompt_tokens else Phase.GENERATED
        if not request.has_failed:
            for index, guard in enumerate(request.plan.guards):
                planned, value = request.plan.scores[guard.score], float(score[guard.score])
                fires = value > planned.threshold or not math.isfinite(value)
                if fires and planned.phase in (Phase.ALL, phase):
                    request.events.append((index, position))


def serve(rng: np.random.Generator, catalog: Catalog, num_steps: int) -> list[Request]:
    """Requests that join in the midst of a decode log, in chunks, lose their place, go back, fail and leave."""
    bank = FeatureBank(200, lambda site: D_MODEL)
    kernel = Kernel(rng, bank)
    running: list[Request] = []
    served: list[Request] = []
    for _ in range(num_steps):
        if len(running) < 4 and rng.random() < 0.2:
            free = next(row for row in range(4) if row not in {request.sequence.row for request in running})
            running.append(Request(rng, catalog, bank, free))
            served.append(running[-1])
        if running and rng.random() < 0.05:
            gone = running.pop(0)
            if kernel.readings.logs(gone.sequence):
                kernel.readings.close_log()
        for request in running:
            sequence = request.sequence
            if rng.random() < 0.05:
                sequence.num_computed = 0  # preempted
            elif rng.random() < 0.1 and 0 < sequence.num_rewinds + 1 < len(request.plan.levels) and sequence.held:
                kernel.readings.close_log()
                request.rewind(sequence.num_tokens - int(rng.integers(1, len(sequence.held) + 1)))
        chunks = {}
        for request in running:
            num_uncomputed = request.sequence.num_tokens - request.sequence.num_computed
            chunks[request] = int(rng.integers(1, num_uncomputed + 1))
        failed = kernel.step(chunks)
        for request in failed:
            if kernel.readings.logs(request.sequence):
                kernel.readings.close_log()
            running.remove(request)
        for request in running:
            if request.sequence.num_computed == request.sequence.num_tokens:
                request.append_token()
    kernel.readings.close_log()
    return served


def assert_counted(request: Request) -> None:
    """The receipt says what the loop counted."""
    receipt = request.sequence.receipt(FINGERPRINT)
    expected = [
        line
        for line, planned in zip(request.lines, request.plan.interventions, strict=True)
        if request.sequence.num_rewinds or not planned.label.startswith("rewind: ")
    ]
    covered = all(0 < line.in_scope == line.covered for line in expected)
    assert receipt.steered == (bool(request.lines) and covered)
    for seen, line in zip(receipt.interventions, request.lines, strict=True):
        counts = (seen.tokens_in_scope, seen.tokens_covered, seen.tokens_edited)
        assert counts == (line.in_scope, line.covered, line.edited)
        mean = sum(line.relative) / len(line.relative) if line.relative else 0.0
        assert seen.mean_relative_edit == pytest.approx(mean, rel=1e-6)
        assert seen.max_activation == pytest.approx(line.max_score(), rel=1e-5, abs=1e-5, nan_ok=True)


@pytest.fixture(scope="module")
def served(catalog) -> list[list[Request]]:
    return [serve(np.random.default_rng(seed), catalog, num_steps=80) for seed in range(NUM_RUNS)]


@pytest.mark.parametrize("run", range(NUM_RUNS))
def test_a_receipt_is_what_a_loop_over_positions_counts(run, served) -> None:
    for request in served[run]:
        assert_counted(request)
        events = [(event.guard, event.position) for event in request.sequence.guard_events]
        assert events == request.events


def test_the_loop_saw_all_there_is_to_see(served) -> None:
    requests = [request for run in served for request in run]
    lines = [line for request in requests for line in request.lines]
    assert {len(line.weight) for line in lines} >= {1, 2, 3, 5}
    assert sum(0 < line.edited < line.covered < line.in_scope for line in lines) > 20
    assert any(math.isnan(score) for line in lines for score in line.scores)
    assert sum(request.sequence.num_rewinds for request in requests) > 10
    assert sum(request.has_failed for request in requests) > 3
    assert 0 < sum(request.sequence.receipt(FINGERPRINT).steered for request in requests) < len(requests) / 2
    assert sum(len(request.events) for request in requests) > 100


def test_a_log_longer_than_its_lines_loses_and_repeats_none(catalog) -> None:
    rng = np.random.default_rng(0)
    bank = FeatureBank(64, lambda site: D_MODEL)
    monitor = Intervention(FeatureTarget("toy-sae", 0), Op.MONITOR)
    block = Intervention(FeatureTarget("toy-sae", 1), Op.BLOCK)
    request = Request(rng, catalog, bank, interventions=(monitor, block), guards=(), policies=())
    kernel = Kernel(rng, bank)
    kernel.step({request: request.sequence.num_tokens})
    for _ in range(2 * LOG_STEPS + 3):
        request.append_token()
        kernel.step({request: 1})
    kernel.readings.close_log()
    assert request.lines[0].in_scope == request.sequence.num_prompt_tokens + 2 * LOG_STEPS + 3
    assert_counted(request)


@pytest.mark.parametrize("num_steps", [1, LOG_STEPS])
def test_a_policy_that_did_not_run_counts_as_failed_although_it_once_ran(num_steps, catalog, monkeypatch) -> None:
    """What a full log held must not pass for a reading of the next step, nor a neighbour's."""
    rng = np.random.default_rng(0)
    bank = FeatureBank(64, lambda site: D_MODEL)
    guarded = Request(rng, catalog, bank, 0, interventions=(), guards=(), policies=("pack-1",))
    plain = Request(rng, catalog, bank, 1, interventions=(), guards=(), policies=())
    kernel = Kernel(rng, bank, is_sound=True)
    assert not kernel.step({request: request.sequence.num_tokens for request in (plain, guarded)})
    for _ in range(num_steps):
        for request in (plain, guarded):
            request.append_token()
        assert not kernel.step({plain: 1, guarded: 1})
    for request in (plain, guarded):
        request.append_token()
    monkeypatch.setattr(kernel, "_leave", lambda buffers, entries, segment: (np.full(2, np.nan), np.zeros(2), -1.0))
    assert kernel.step({plain: 1, guarded: 1}) == {guarded}


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_norm_beyond_the_domain_of_a_policy_is_a_failure_behind_edits(chunked, edits, catalog, monkeypatch) -> None:
    """But for the first position, the attention sink, which the request's edits leave as it is."""
    rng = np.random.default_rng(0)
    bank = FeatureBank(64, lambda site: D_MODEL)
    pack = replace(
        catalog.packs["pack-1"], tensors=replace(catalog.packs["pack-1"].tensors, max_norm=np.full(2, 5.0, np.float32))
    )
    limited = Catalog(Facts(), catalog.saes, catalog.packs | {"pack-1": pack})
    interventions = (Intervention(DirectionTarget(EARLY, np.ones(D_MODEL, np.float32)), Op.ADD, 1.0),) if edits else ()
    request = Request(rng, limited, bank, interventions=interventions, guards=(), policies=("pack-1",))
    request.is_limited = True
    kernel = Kernel(rng, bank, is_sound=True)
    norms = [9.0, *[4.0] * (request.sequence.num_tokens - 1)]
    leave = kernel._leave

    def left(buffers: SiteBuffers, entries: slice, segment: int) -> tuple:
        activation, edit, _ = leave(buffers, entries, segment)
        position = request.sequence.num_computed + segment // len(Stage)
        buffers.x_norm[segment] = norms[position]
        return activation, edit, norms[position]

    monkeypatch.setattr(kernel, "_leave", left)
    for count in (1, len(norms) - 1) if chunked else (len(norms),):
        assert not kernel.step({request: count})
    request.append_token()
    norms.append(5.5)
    assert kernel.step({request: 1}) == ({request} if edits else set())
