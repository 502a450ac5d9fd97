"""A monitor plan through the engine: every response is read at exactly its sites, and not a bit of one changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import Outcome, assert_same, drive
from test_steering import activations, feature, feature_rows, recording_all, request, steer

from steerserve.engine.engine import Engine
from steerserve.models.families import FAMILIES
from steerserve.models.loading import LoadedModel
from steerserve.steering.monitor_plan import (
    ConceptReading,
    DirectionReading,
    FeatureReading,
    HeadReading,
    MonitorEntry,
    MonitorPlan,
    MonitorPlanFile,
    Reading,
)
from steerserve.steering.packs import ModelRef
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    GenerateRequest,
    Guard,
    GuardAction,
    HeadTarget,
    Intervention,
    Op,
    Receipt,
    Site,
    SteeringSpec,
    Stream,
    VerdictKind,
    overall_verdict,
)

EARLY, Z, SITE = Site(0, Stream.RESID_POST), Site(1, Stream.ATTN_Z), Site(1, Stream.RESID_POST)
FEATURES, WEIGHTS = (3, 4, 5), (1.0, -0.5, 2.0)


def vector(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def plan_of(model: LoadedModel, **readings: Reading) -> MonitorPlanFile:
    chosen: dict[str, Reading] = readings or {
        "stream": DirectionReading(site=str(EARLY), vector="stream"),
        "head": HeadReading(head="L1H2", vector="head"),
        "features": FeatureReading(sae="tiny-sae", sha256="a" * 64, features=FEATURES, weights=WEIGHTS),
    }
    vectors = {"stream": vector(model.d_model, 0), "head": vector(model.d_model, 1)}
    named = {getattr(reading, "vector", None) for reading in chosen.values()}
    entries = tuple(MonitorEntry(name=name, reading=reading) for name, reading in chosen.items())
    made_on = ModelRef(name=model.name, fingerprint=model.fingerprint)
    plan = MonitorPlan(name="watch", behaviour="a test", model=made_on, entries=entries)
    return MonitorPlanFile(plan, {name: each for name, each in vectors.items() if name in named})


def logprobs(asked: GenerateRequest) -> GenerateRequest:
    return replace(asked, sampling=replace(asked.sampling, logprobs=2))


def unmonitored(receipt: Receipt) -> Receipt:
    """What a server without a plan would say."""
    return replace(receipt, monitors=(), plan_hash="")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_those_of_the_formula(family, load_tiny, make_engine, run) -> None:
    """Each score at each position, and their summary, against float64; read by hooks of the test."""
    model = load_tiny(family)
    make = lambda: make_engine(model, monitor_plan=plan_of(model))  # noqa: E731
    with recording_all(model, [EARLY, Z, SITE], make) as (recorders, engine):
        response = run(engine, [request("r", return_activations=True)])["r"]
    early, z, site = (recorder.row()[0] for recorder in recorders)
    for recorder in recorders:
        assert np.array_equal(*recorder.row())
    unit = {name: each / np.linalg.norm(each.astype(np.float64)) for name, each in engine_vectors(model).items()}
    written = z.reshape(len(z), model.n_heads, model.d_head)[:, 2] @ model.head_writes(1, 2)
    f = activations(site, feature_rows(engine.catalog, list(FEATURES)))
    expected = np.stack([early @ unit["stream"], written @ unit["head"], f @ WEIGHTS], axis=1)
    lines = [line for output in response.outputs for line in output.scores]
    assert [line.position for line in lines] == list(range(len(z)))
    assert all(line.scores.shape == (0,) for line in lines)
    scores = np.stack([line.monitors for line in lines])
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    for index, entry in enumerate(response.receipt.monitors):
        assert entry.tokens_in_scope == entry.tokens_covered == len(z)
        assert entry.max_score == pytest.approx(scores[:, index].max(), rel=1e-6)
        assert entry.mean_score == pytest.approx(scores[:, index].mean(), rel=1e-5, abs=1e-6)
    assert [(each.source, each.label, each.site) for each in response.receipt.monitors] == [
        ("monitor:watch", "stream", EARLY),
        ("monitor:watch", "head", Z),
        ("monitor:watch", "features", SITE),
    ]


def engine_vectors(model: LoadedModel) -> dict[str, np.ndarray]:
    return dict(plan_of(model).vectors)


GUARDED = Guard(FeatureTarget("tiny-sae", 3), 0.5, GuardAction.FLAG)
REQUESTS = {
    "plain": request("plain"),
    "steered": request("steered", steer(feature(3, Op.ADD, 4.0), Intervention(HeadTarget(1, 2), Op.SCALE, 0.0))),
    "behind the monitors": request(
        "behind the monitors", steer(Intervention(DirectionTarget(Site(2, Stream.MLP_OUT), vector(32, 5)), Op.BLOCK))
    ),
    "guarded": request("guarded", SteeringSpec(guards=(GUARDED,))),
    "policy": request("policy", steer(feature(5, Op.ADD, 1.0)), policies=("mood",)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REQUESTS)
def test_responses_are_the_same_to_the_bit(name, dtype, load_tiny, make_engine, make_pack) -> None:
    """Tokens, log-probabilities, events and receipts, all but what the monitors add."""
    model = load_tiny(dtype=dtype)
    packs = [make_pack(model)]
    asked = logprobs(REQUESTS[name])
    without = drive(make_engine(model, packs), [asked])[name, 0]
    monitored = drive(make_engine(model, packs, monitor_plan=plan_of(model)), [asked])[name, 0]
    assert without.receipt.monitors == ()
    assert len(monitored.receipt.monitors) == 3
    comparable = [replace(each, receipt=unmonitored(each.receipt)) for each in (monitored, without)]
    assert_same(*comparable)
    num_prompt = len(model.tokenizer(asked.prompt)["input_ids"])
    num_read = num_prompt + (8 if name == "guarded" else 7)  # the last token is fed for the guard's sake
    assert {entry.tokens_covered for entry in monitored.receipt.monitors} == {num_read}
    assert monitored.receipt.steered is (name != "plain")


def test_a_plain_request_is_read_and_not_judged(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    response = run(make_engine(model, monitor_plan=plan_of(model)), [request("r")])["r"]
    last = response.outputs[-1]
    assert (last.receipt.interventions, last.receipt.steered, last.verdicts) == ((), False, ())
    assert overall_verdict(last.verdicts) is VerdictKind.ALLOW
    assert len(last.receipt.plan_hash) == 64, "what ran is hashed, monitors too"
    assert not any(output.scores for output in response.outputs), "nobody asked for each token's"


def monitors_of(result: Outcome) -> list[tuple[object, ...]]:
    """All but the means, which are sums in another order."""
    return [tuple(vars(replace(each, mean_score=0.0)).values()) for each in result.receipt.monitors]


def test_monitors_read_what_the_request_left(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    engine = make_engine(model, monitor_plan=plan_of(model))
    silent = steer(Intervention(HeadTarget(1, 2), Op.BLOCK))
    response = run(engine, [request("r", silent, return_activations=True)])["r"]
    scores = np.stack([line.monitors for output in response.outputs for line in output.scores])
    assert not scores[:, 1].any(), "a head that the request silenced"
    assert scores[:, 0].any()


@pytest.mark.parametrize("max_num_batched_tokens", [5, 128])
def test_monitors_of_a_row_depend_on_no_other(max_num_batched_tokens, load_tiny, make_engine, make_pack) -> None:
    model = load_tiny()
    packs, plan = [make_pack(model)], plan_of(model)
    asked = [replace(each, return_activations=True) for each in REQUESTS.values()]
    engine = make_engine(model, packs, monitor_plan=plan, max_num_seqs=1, enable_prefix_caching=False)
    alone = drive(engine, asked)
    engine = make_engine(model, packs, monitor_plan=plan, max_num_seqs=5, max_num_batched_tokens=max_num_batched_tokens)
    together = drive(engine, asked, [0, 2, 0, 1, 3])
    for key, result in alone.items():
        assert monitors_of(together[key]) == monitors_of(result)
        means = [[each.mean_score for each in both.receipt.monitors] for both in (together[key], result)]
        assert means[0] == pytest.approx(means[1], rel=1e-9, abs=1e-12)
        assert_same(*(replace(each, receipt=unmonitored(each.receipt)) for each in (together[key], result)))


def test_cached_positions_are_read_once_and_told_every_time(load_tiny, make_engine) -> None:
    """Requests whose prompts do the same share blocks as if there were no monitors."""
    model = load_tiny()
    engine: Engine = make_engine(model, monitor_plan=plan_of(model))
    prompt = "Once upon a time, there was a queen"
    cold, warm, other = (
        drive(engine, [replace(request("r", spec), prompt=prompt)])["r", 0]
        for spec in (SteeringSpec(), SteeringSpec(), steer(feature(3, Op.ADD, 4.0, phase="generated")))
    )
    cached = [each.receipt.num_cached_tokens for each in (cold, warm, other)]
    assert cached == [0, 32, 32]
    assert monitors_of(warm) == monitors_of(cold)
    assert [each.tokens_covered for each in other.receipt.monitors] == [
        each.tokens_covered for each in cold.receipt.monitors
    ]


def test_a_site_may_be_read_that_requests_may_not_steer(load_tiny, make_engine) -> None:
    model = load_tiny()
    engine: Engine = make_engine(model, monitor_plan=plan_of(model), sites=(str(SITE),))
    assert engine.sites == {SITE}
    assert set(engine._runner.splicer.buffers) == {EARLY, Z, SITE}
    (result,) = drive(engine, [request("r")]).values()
    assert all(each.tokens_covered > 0 for each in result.receipt.monitors)


def test_room_for_monitors_is_kept_whatever_requests_take(load_tiny, make_engine) -> None:
    model = load_tiny()
    engine: Engine = make_engine(model, monitor_plan=plan_of(model), bank_capacity=len(FEATURES) + 1)
    engine.add_request(request("takes the last slot", steer(feature(7, Op.ADD, 1.0))))
    engine.add_request(request("plain"))
    (plain,) = (result for (name, _), result in drive(engine).items() if name == "plain")
    assert all(each.tokens_covered > 0 for each in plain.receipt.monitors)


def test_a_detector_of_a_concept_reads_as_its_guard(load_tiny, make_engine, make_pack, run) -> None:
    model = load_tiny()
    plan = plan_of(model, concept=ConceptReading(concept="mood"))
    engine = make_engine(model, [make_pack(model)], monitor_plan=plan)
    spec = SteeringSpec(guards=(Guard(ConceptTarget("mood"), 1e6, GuardAction.FLAG),))
    response = run(engine, [request("r", spec, return_activations=True)])["r"]
    lines = [line for output in response.outputs for line in output.scores]
    assert [line.monitors.tolist() for line in lines] == [line.scores.tolist() for line in lines]
    (entry,) = response.receipt.monitors
    assert entry.max_score == response.receipt.interventions[0].max_activation > 0
