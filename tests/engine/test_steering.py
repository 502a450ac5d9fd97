"""What steering does to the activations, seen by hooks that the tests install themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from engine_runs import Outcome, assert_same, drive, scores_of

from steerserve.engine.scheduler import Scheduler
from steerserve.errors import DetectorError, InvalidRequestError
from steerserve.models.families import FAMILIES, STEERABLE
from steerserve.models.loading import LoadedModel
from steerserve.steering.catalog import Catalog
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import width_of
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
    Unit,
)

SITE = Site(1, Stream.RESID_POST)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Relative to |x|: one rounding of the result."""


@dataclass
class Recorder:
    """The activation at one site as the model made it and as the splice left it, position by position."""

    before: list[torch.Tensor] = field(default_factory=list)
    after: list[torch.Tensor] = field(default_factory=list)

    def row(self) -> tuple[np.ndarray, np.ndarray]:
        """``x`` and ``x'`` of a request that ran alone as ``[positions, d]`` float64."""
        joined = [torch.cat([x[0] for x in xs]).double().numpy() for xs in (self.before, self.after)]
        return joined[0], joined[1]


@contextmanager
def recording(model: LoadedModel, site: Site, make: Callable) -> Iterator[tuple[Recorder, object]]:
    """Hooks on either side of the splice: one installed before ``make()`` builds the engine, one after."""
    with recording_all(model, [site], make) as ((recorder,), engine):
        yield recorder, engine


@contextmanager
def recording_all(model: LoadedModel, sites: list[Site], make: Callable) -> Iterator[tuple[list[Recorder], object]]:
    """``recording`` at several sites."""
    recorders = [Recorder() for _ in sites]
    points = [model.adapter.hook_point(model.model, site) for site in sites]

    def register(point, seen: list[torch.Tensor]):
        def hook(_module, args, output=None) -> None:
            x = args[0] if point.side == "input" else output
            seen.append((x[0] if isinstance(x, tuple) else x).clone())

        module = point.module
        return module.register_forward_pre_hook(hook) if point.side == "input" else module.register_forward_hook(hook)

    handles = [register(point, recorder.before) for point, recorder in zip(points, recorders, strict=True)]
    engine = make()
    engine._runner.splicer.install()  # or it would come behind the hooks of the test
    handles += [register(point, recorder.after) for point, recorder in zip(points, recorders, strict=True)]
    try:
        yield recorders, engine
    finally:
        for handle in handles:
            handle.remove()


def feature_rows(catalog: Catalog, features: list[int]) -> list[np.ndarray]:
    """W_enc, b_enc, threshold, max_norm, W_dec of some features in float64."""
    return [rows.double().numpy() for rows in catalog.saes["tiny-sae"].rows(features)]


def activations(x: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """``[positions, k]`` f = pre where pre > threshold and |x| <= max_norm, else 0."""
    W_enc, b_enc, threshold, max_norm, _ = rows
    pre = x @ W_enc.T + b_enc
    inside = np.linalg.norm(x, axis=1, keepdims=True) <= max_norm
    return np.where((pre > threshold) & inside, pre, 0.0)


def assert_close(seen: np.ndarray, expected: np.ndarray, x: np.ndarray, dtype: torch.dtype) -> None:
    scale = np.abs(x).max(axis=1, keepdims=True) + np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(seen - expected) <= TOLERANCE[dtype] * scale).all()


def steer(*interventions: Intervention) -> SteeringSpec:
    return SteeringSpec(interventions)


def feature(index: int, op: Op, value: float | None = None, **rest: object) -> Intervention:
    return Intervention(FeatureTarget("tiny-sae", index), op, value, **rest)


def request(name: str, spec: SteeringSpec = SteeringSpec(), max_tokens: int = 8, **rest: object) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return GenerateRequest(name, "The quick brown fox", sampling, spec, **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("interventions", "edited"),
    [
        ([feature(3, Op.CLAMP, 7.0)], lambda f: np.where(f > 0, 7.0, f)),
        ([feature(3, Op.CLAMP, -2.0, always=True)], lambda f: np.full_like(f, -2.0)),
        ([feature(3, Op.CLAMP, 0.5, unit=Unit.MAX_ACTIVATION)], lambda f: np.where(f > 0, 2.0, f)),
        ([feature(3, Op.CLIP, 0.25)], lambda f: np.minimum(f, 0.25)),
        ([feature(3, Op.BLOCK)], np.zeros_like),
        ([feature(3, Op.SCALE, 1.5)], lambda f: 1.5 * f),
        ([feature(3, Op.ADD, 4.0)], lambda f: f + 4.0),
        ([feature(3, Op.MONITOR)], lambda f: f),
        (
            [feature(3, Op.BLOCK), feature(4, Op.ADD, 4.0), feature(5, Op.CLAMP, 1.0)],
            lambda f: np.stack([0 * f[:, 0], f[:, 1] + 4, np.where(f[:, 2] > 0, 1.0, f[:, 2])], axis=1),
        ),
    ],
    ids=["clamp", "clamp-always", "clamp-max", "clip", "block", "scale", "add", "monitor", "three-at-once"],
)
def test_edits_follow_the_formula_at_every_token(interventions, edited, dtype, load_tiny, make_engine, run) -> None:
    model = load_tiny(dtype=dtype)
    with recording(model, SITE, lambda: make_engine(model)) as (recorder, engine):
        response = run(engine, [request("r", steer(*interventions), return_activations=True)])["r"]
    x, changed = recorder.row()
    rows = feature_rows(engine.catalog, [i.target.feature for i in interventions])
    f = activations(x, rows)
    assert len(x) == response.outputs[0].num_prompt_tokens + 8  # the last token is read too
    assert (f > 0).any()
    assert (f == 0).any()
    assert_close(changed, x + (edited(f) - f) @ rows[4], x, dtype)
    np.testing.assert_allclose(response.scores, f, rtol=1e-4, atol=1e-4)


def test_features_are_silent_outside_the_domain_of_their_sae(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    spec = steer(feature(3, Op.CLAMP, 7.0))
    with recording(model, SITE, lambda: make_engine(model)) as (recorder, engine):
        run(engine, [request("r", spec, max_tokens=1)])
    bound = float(np.median(np.linalg.norm(recorder.row()[0], axis=1)))
    with recording(model, SITE, lambda: make_engine(model, max_norm=bound)) as (recorder, engine):
        run(engine, [request("r", spec, max_tokens=1)])
    x, changed = recorder.row()
    moved = (changed != x).any(axis=1)
    assert moved.any()
    assert not moved[np.linalg.norm(x, axis=1) > bound * 1.001].any()


@pytest.mark.parametrize("stream", STEERABLE)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_direction_is_added_at_every_site_of_every_family(family, stream, load_tiny, make_engine, run) -> None:
    model = load_tiny(family)
    site = Site(1, stream)
    vector = np.random.default_rng(0).standard_normal(width_of(model, site)).astype(np.float32)
    spec = steer(Intervention(DirectionTarget(site, vector), Op.ADD, 3.0))
    with recording(model, site, lambda: make_engine(model)) as (recorder, engine):
        run(engine, [request("r", spec, max_tokens=3)])
    x, changed = recorder.row()
    assert_close(changed, x + 3.0 * vector / np.linalg.norm(vector), x, torch.float32)


@pytest.mark.parametrize(
    ("op", "value", "projected"),
    [
        (Op.BLOCK, None, np.zeros_like),
        (Op.CLIP, -0.5, lambda p: np.minimum(p, -0.5)),
        (Op.SCALE, -1.0, np.negative),
    ],
)
def test_ops_on_directions(op, value, projected, load_tiny, make_engine, run) -> None:
    model = load_tiny()
    vector = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    with recording(model, SITE, lambda: make_engine(model)) as (recorder, engine):
        run(engine, [request("r", steer(Intervention(DirectionTarget(SITE, vector), op, value)))])
    x, changed = recorder.row()
    unit = vector.astype(np.float64) / np.linalg.norm(vector)
    p = x @ unit
    assert_close(changed, x + np.outer(projected(p) - p, unit), x, torch.float32)


@pytest.mark.parametrize("phase", list(Phase))
def test_scope(phase, load_tiny, make_engine, run) -> None:
    model = load_tiny()
    with recording(model, SITE, lambda: make_engine(model)) as (recorder, engine):
        response = run(engine, [request("r", steer(feature(3, Op.ADD, 4.0, phase=phase)), return_activations=True)])[
            "r"
        ]
    x, changed = recorder.row()
    num_prompt = response.outputs[0].num_prompt_tokens
    is_prompt = np.arange(len(x)) < num_prompt
    in_scope = {Phase.ALL: np.full(len(x), True), Phase.PROMPT: is_prompt, Phase.GENERATED: ~is_prompt}[phase]
    assert ((x != changed).any(axis=1) == in_scope).all()
    assert (np.isfinite(response.scores[:, 0]) == in_scope).all()
    (line,) = response.receipt.interventions
    assert line.tokens_in_scope == line.tokens_covered == line.tokens_edited == in_scope.sum()
    assert response.receipt.steered


def test_a_request_cannot_cancel_a_guard(load_tiny, make_engine, make_pack, run) -> None:
    """The policy reads what the request left and has the last word."""
    model = load_tiny()
    guard = make_pack(model, features=(3,), op=Op.CLIP, value=0.5)
    asked = steer(feature(3, Op.ADD, 50.0))
    with recording(model, SITE, lambda: make_engine(model, [guard])) as (recorder, engine):
        response = run(engine, [request("r", asked, policies=("mood",), return_activations=True)])["r"]
    x, changed = recorder.row()
    rows = feature_rows(engine.catalog, [3])
    requested = x + 50.0 * rows[4]
    f = activations(requested, rows)
    assert (f > 10).all()
    assert_close(changed, requested + (0.5 - f) @ rows[4], requested, torch.float32)
    np.testing.assert_allclose(response.scores[:, 1:], f / 4, rtol=1e-4)  # a share of the largest activation
    assert [line.source for line in response.receipt.interventions] == ["request", "policy:mood@1"]
    assert response.receipt.policies == ("mood@1",)
    assert response.receipt.packs == {"mood@1": guard.sha256}


BEFORE = Site(0, Stream.RESID_POST)


@pytest.mark.parametrize("max_num_batched_tokens", [5, 128])
@pytest.mark.parametrize("phase", [Phase.ALL, Phase.GENERATED])
@pytest.mark.parametrize("gated_by", ["feature", "concept", "direction", "direction at an earlier site"])
def test_a_gated_edit_applies_exactly_where_its_score_exceeds_the_threshold(
    gated_by, phase, max_num_batched_tokens, load_tiny, make_engine, make_pack
) -> None:
    """Beside an edit without a gate at the same site, and one of an earlier site that the gate sees."""
    model = load_tiny()
    vector = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    pack = make_pack(model, features=(3, 4, 5), weight=(1.0, -0.5, 2.0))
    target, threshold = {
        "feature": (FeatureTarget("tiny-sae", 5), 1.0),
        "concept": (ConceptTarget("mood"), 1.5),
        "direction": (DirectionTarget(SITE, vector), -0.4),
        "direction at an earlier site": (DirectionTarget(BEFORE, vector), 0.3),
    }[gated_by]
    spec = steer(
        feature(5, Op.ADD, -2.0),
        feature(6, Op.CLAMP, 9.0, always=True, phase=phase, gate=Gate(target, threshold)),
        Intervention(DirectionTarget(BEFORE, vector[::-1].copy()), Op.SCALE, 2.0),
    )
    config = {"max_num_batched_tokens": max_num_batched_tokens}
    with recording_all(model, [BEFORE, SITE], lambda: make_engine(model, [pack], **config)) as ((before, at), engine):
        response = drive(engine, [request("r", spec, max_tokens=24, return_activations=True)])["r", 0]
    (x_before, _), (x, changed) = before.row(), at.row()
    rows = feature_rows(engine.catalog, [5, 6, 3, 4])
    f = activations(x, rows)
    score = {
        "feature": f[:, 0],
        "concept": f[:, 2] - 0.5 * f[:, 3] + 2 * f[:, 0],
        "direction": x @ vector / np.linalg.norm(vector),
        "direction at an earlier site": x_before @ vector / np.linalg.norm(vector),
    }[gated_by]
    assert np.abs(score - threshold).min() > 1e-5
    opens = (score > threshold) & ((np.arange(len(x)) >= len("The quick brown fox")) | (phase is Phase.ALL))
    assert 4 < opens.sum() < len(x) - 4
    edits = np.stack([np.full(len(x), -2.0), np.where(opens, 9.0 - f[:, 1], 0.0)], axis=1)
    assert_close(changed, x + edits @ rows[4][:2], x, torch.float32)
    assert response.receipt.interventions[1].tokens_edited == opens.sum()
    in_phase = slice(0 if phase is Phase.ALL else len("The quick brown fox"), None)
    np.testing.assert_allclose(scores_of(response)[in_phase, 3], score[in_phase], rtol=1e-4, atol=1e-4)
    assert response.receipt.steered


def test_receipt_counts_what_happened(load_tiny, make_engine, make_pack, run) -> None:
    model = load_tiny()
    pack = make_pack(model, features=(3, 4))
    spec = steer(feature(5, Op.BLOCK), Intervention(ConceptTarget("mood"), Op.SCALE, 3.0), feature(0, Op.SCALE, 9.0))
    with recording(model, SITE, lambda: make_engine(model, [pack])) as (recorder, engine):
        receipt = run(engine, [request("r", spec)])["r"].receipt
    x, _ = recorder.row()
    rows = feature_rows(engine.catalog, [5, 3, 4, 0])
    f = activations(x, rows)
    edits = [-f[:, :1] @ rows[4][:1], 2 * f[:, 1:3] @ rows[4][1:3], 0 * x]
    scores = [f[:, 0], (f[:, 1] + f[:, 2]) / 4, f[:, 3]]  # of a pack: shares of the largest activations
    assert receipt.plan_hash
    assert receipt.model_fingerprint == model.fingerprint
    for line, edit, score in zip(receipt.interventions, edits, scores, strict=True):
        moved = np.linalg.norm(edit, axis=1) > 0
        relative = np.linalg.norm(edit, axis=1)[moved] / np.linalg.norm(x, axis=1)[moved]
        assert line.tokens_in_scope == line.tokens_covered == len(x)
        assert line.tokens_edited == moved.sum()
        assert line.mean_relative_edit == pytest.approx(relative.mean() if moved.any() else 0, rel=1e-4)
        assert line.max_activation == pytest.approx(score.max(), rel=1e-4)
    assert 0 < receipt.interventions[0].tokens_edited < len(x)
    assert receipt.interventions[2].tokens_edited == 0


def test_long_responses_are_counted_in_full(load_tiny, make_engine, run) -> None:
    receipt = run(make_engine(load_tiny()), [request("r", steer(feature(3, Op.ADD, 1.0)), max_tokens=100)])["r"].receipt
    (line,) = receipt.interventions
    assert line.tokens_edited == len("The quick brown fox") + 99


def test_joins_and_leaves_lose_no_count(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    spec = steer(feature(3, Op.CLAMP, 7.0), feature(4, Op.ADD, 1.0, phase=Phase.GENERATED))
    alone = run(make_engine(model), [request("r", spec, max_tokens=20)])["r"].receipt
    others = [request(f"o{i}", steer(feature(5, Op.BLOCK)), max_tokens=2 + i) for i in range(5)]
    crowded = run(make_engine(model), [request("r", spec, max_tokens=20), *others], [0, 1, 3, 3, 6, 12])["r"].receipt
    assert crowded.plan_hash == alone.plan_hash
    for line, expected in zip(crowded.interventions, alone.interventions, strict=True):
        counts = (line.tokens_in_scope, line.tokens_covered, line.tokens_edited)
        assert counts == (expected.tokens_in_scope, expected.tokens_covered, expected.tokens_edited)
        assert line.mean_relative_edit == pytest.approx(expected.mean_relative_edit, rel=1e-4)
        assert line.max_activation == pytest.approx(expected.max_activation, rel=1e-4)


def test_receipt_shows_that_nothing_ran(load_tiny, make_engine, run) -> None:
    """Coverage is what the kernel left, not what was asked: without the hooks there is none."""
    engine = make_engine(load_tiny())
    engine._runner.splicer.install()
    engine._runner.splicer.remove()
    receipt = run(engine, [request("r", steer(feature(3, Op.ADD, 4.0)))])["r"].receipt
    (line,) = receipt.interventions
    assert line.tokens_in_scope > 0
    assert line.tokens_covered == line.tokens_edited == 0
    assert not receipt.steered


def test_unsteered_receipt_claims_nothing(load_tiny, make_engine, run) -> None:
    receipt = run(make_engine(load_tiny()), [request("r")])["r"].receipt
    assert (receipt.plan_hash, receipt.interventions, receipt.steered) == ("", (), False)


@contextmanager
def logits_of(model: LoadedModel) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    handle = model.model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    try:
        yield seen
    finally:
        handle.remove()


def overflow(phase: Phase = Phase.ALL) -> SteeringSpec:
    """Two edits of one coordinate, each finite, whose sum no float32 holds."""
    vectors = (
        np.eye(32, dtype=np.float32)[0] + np.array([[0.0], [1e-3]], dtype=np.float32) * np.eye(32, dtype=np.float32)[1]
    )
    targets = [DirectionTarget(Site(0, Stream.RESID_POST), vector) for vector in vectors]
    return steer(*(Intervention(target, Op.ADD, 3e38, phase=phase) for target in targets))


PROMPT = "Once upon a time there was a quick brown fox who read every book"


@contextmanager
def counting_preemptions() -> Iterator[list[str]]:
    """The ids of the requests that are preempted meanwhile."""
    preempted: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        preempt = Scheduler._preempt

        def counted(self, sequence, step) -> None:
            preempted.append(sequence.request_id)
            preempt(self, sequence, step)

        patch.setattr(Scheduler, "_preempt", counted)
        yield preempted


def everything_read(name: str, *rest: Intervention, guards: tuple[Guard, ...] = ()) -> GenerateRequest:
    """Sampled, with all that a client can see of the logits, and readings of the first and the last layer."""
    readings = [
        Intervention(DirectionTarget(site, np.random.default_rng(seed).standard_normal(32)), Op.MONITOR)
        for site in (Site(0, Stream.ATTN_OUT), Site(2, Stream.RESID_POST))
        for seed in range(3)
    ]
    sampling = SamplingParams(max_tokens=20, seed=5, presence_penalty=0.5, logprobs=20, ignore_eos=True)
    return GenerateRequest(name, PROMPT, sampling, SteeringSpec((*readings, *rest), guards), return_activations=True)


GATED = feature(3, Op.ADD, 4.0, gate=Gate(FeatureTarget("tiny-sae", 5), 0.5))
REWOUND = Guard(
    DirectionTarget(Site(2, Stream.MLP_OUT), np.ones(32, dtype=np.float32)),
    threshold=1.0,
    action=GuardAction.REWIND,
    rewind=Rewind(5, (feature(6, Op.ADD, 20.0),), max_retries=3, otherwise=GuardAction.FLAG),
    phase=Phase.GENERATED,
)
OWN = [
    everything_read("read"),
    everything_read("steered", GATED, feature(4, Op.CLAMP, 3.0, phase=Phase.GENERATED)),
    everything_read("rewound", feature(4, Op.CLAMP, 3.0), guards=(REWOUND,)),
]
NEIGHBOURS = [
    request("n0"),
    request("n1", steer(feature(4, Op.CLAMP, 9.0, always=True)), max_tokens=3),
    request("n2", steer(feature(3, Op.BLOCK), feature(6, Op.ADD, -30.0))),
    request("n3", overflow(Phase.GENERATED)),  # fills its row with NaN and ends
    replace(everything_read("n4", GATED, guards=(REWOUND,)), prompt="Once upon a time there was a slow one"),
]
ARRIVALS = [0, 3, 5, 0, 1, 9, 12, 21]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_that_runs_beside_a_request_changes_a_bit_of_it(dtype, family, load_tiny, make_engine) -> None:
    """Neither neighbours nor the size of a step, what the cache holds, or being preempted."""
    model = load_tiny(family, dtype)

    def served(requests: list[GenerateRequest], arrivals: list[int] | None = None, **config: object) -> list[Outcome]:
        engine = make_engine(model, **config)
        outcomes = drive(engine, requests, arrivals)
        return [outcomes[own.request_id, 0] for own in OWN if (own.request_id, 0) in outcomes]

    alone = [outcome for own in OWN for outcome in served([own], max_num_seqs=1)]
    assert {len(outcome.scores) for outcome in alone} == {len(PROMPT) + 20}
    assert [outcome.receipt.num_rewinds > 0 for outcome in alone] == [False, False, True]
    early = [replace(own, request_id=f"early {own.request_id}") for own in OWN]
    with counting_preemptions() as preempted:
        in_company = [
            served(OWN, max_num_seqs=1, max_num_batched_tokens=1),
            served([*OWN, *NEIGHBOURS], max_num_seqs=8, max_num_batched_tokens=9),
            served([*OWN, *NEIGHBOURS], ARRIVALS[::-1], enable_prefix_caching=False, block_size=5),
            served([*early, *OWN], [0, 0, 0, 30, 31, 32], max_num_seqs=3),
        ]
        assert all(outcome.receipt.num_cached_tokens >= 48 for outcome in in_company[-1])
        assert not preempted
        urgent = [replace(neighbour, priority=-1) for neighbour in NEIGHBOURS]
        in_company.append(served([*OWN, *urgent], [0, 0, 0, 5, 9, 35, 60, 75], max_num_seqs=1, kv_cache_tokens=128))
        assert {own.request_id for own in OWN} <= set(preempted)
    for outcomes in in_company:
        for outcome, expected in zip(outcomes, alone, strict=True):
            assert_same(outcome, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_bit_identical_when_nothing_fires(dtype, load_tiny, make_engine, make_pack, run) -> None:
    model = load_tiny(dtype=dtype)
    asleep = steer(feature(0, Op.CLAMP, 50.0), feature(3, Op.MONITOR), feature(0, Op.MONITOR))
    guard = make_pack(model, features=(0,), value=-5.0)
    results = []
    for spec, policies in ((steer(), ()), (asleep, ("mood",))):
        engine = make_engine(model, [guard])
        with logits_of(model) as logits:
            run(engine, [request(f"r{i}", spec, policies=policies) for i in range(3)])
        results.append(logits)
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_guard_that_reads_nonsense_ends_its_request_alone(load_tiny, make_engine, make_pack, run) -> None:
    model = load_tiny()
    engine = make_engine(model, [make_pack(model)], max_num_seqs=3)
    expected = run(engine, [request("b"), request("r")])["r"].token_ids
    responses = run(engine, [request("bad", overflow(), policies=("mood",)), request("r"), request("later")], [0, 0, 2])
    assert isinstance(responses["bad"].error, DetectorError)
    assert responses["bad"].finish_reason is None
    assert responses["bad"].token_ids == []
    assert responses["r"].token_ids == responses["later"].token_ids == expected


def test_a_request_that_pushes_a_guard_out_of_its_domain_fails_closed(
    load_tiny, make_engine, make_pack, run, tmp_path
) -> None:
    """Beyond its SAE's largest norm every feature reads 0: the guard must not take that for silence."""
    model = load_tiny()
    pack = make_pack(model)
    limited = replace(pack.tensors, max_norm=np.full(len(pack.tensors), 1e3, dtype=np.float32))
    engine = make_engine(model, [save_pack(pack.card, limited, tmp_path / "limited" / "mood")])
    away = Intervention(DirectionTarget(SITE, np.ones(model.d_model, dtype=np.float32)), Op.ADD, 1e4)
    for phase in (Phase.ALL, Phase.GENERATED):
        pushed = steer(replace(away, phase=phase))
        assert isinstance(run(engine, [request("r", pushed, policies=("mood",))])["r"].error, DetectorError)
    mild = steer(replace(away, value=1.0))
    assert run(engine, [request("r", mild, policies=("mood",))])["r"].receipt.steered
    assert run(engine, [request("r", steer(away))])["r"].error is None, "no guard, nothing to protect"


def test_an_intervention_without_a_position_is_not_called_steered(load_tiny, make_engine, run) -> None:
    late = steer(feature(3, Op.ADD, 4.0, phase=Phase.GENERATED))
    receipt = run(make_engine(load_tiny()), [request("r", late, max_tokens=1)])["r"].receipt
    assert receipt.interventions[0].tokens_in_scope == 0
    assert not receipt.steered


@pytest.mark.parametrize("phase", [Phase.PROMPT, Phase.GENERATED])
def test_edits_that_break_the_model_end_their_request_alone(phase, load_tiny, make_engine, run) -> None:
    model = load_tiny()
    engine = make_engine(model, max_num_seqs=2)
    expected = run(engine, [request("r")])["r"].token_ids
    # Rows are reused: what a broken request left in the KV cache must not reach the next one.
    responses = run(engine, [request("bad", overflow(phase)), request("r"), request("later")])
    error = responses["bad"].error
    assert isinstance(error, InvalidRequestError)
    assert error.field == "steering.interventions"
    assert responses["r"].token_ids == responses["later"].token_ids == expected
