"""Attention heads through the engine: scaled, silenced and read, in every family, alone and in company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import assert_same, drive
from test_steering import assert_close, recording, recording_all, request, steer

from steerserve.circuits.forward import heads_transformed
from steerserve.engine.engine import Engine
from steerserve.errors import IncompatibleError
from steerserve.models.families import FAMILIES
from steerserve.models.loading import LoadedModel
from steerserve.steering.policies import Policy
from steerserve.steering.policy_set import PolicySet
from steerserve.types import (
    DirectionTarget,
    Gate,
    GenerateRequest,
    Guard,
    GuardAction,
    HeadTarget,
    Intervention,
    Op,
    Phase,
    Rewind,
    Site,
    SteeringSpec,
    Stream,
)

LAYER, HEAD = 1, 2
Z = Site(LAYER, Stream.ATTN_Z)
LOUDER = Intervention(HeadTarget(LAYER, HEAD), Op.SCALE, 2.5)


def by_head(model: LoadedModel, z: np.ndarray) -> np.ndarray:
    """``[positions, heads, d_head]``."""
    return z.reshape(len(z), model.n_heads, model.d_head)


def direction(model: LoadedModel, width: int, head: int = HEAD, seed: int = 0) -> DirectionTarget:
    return DirectionTarget(Z, np.random.default_rng(seed).standard_normal(width).astype(np.float32), head)


def projection(model: LoadedModel, target: DirectionTarget) -> np.ndarray:
    """``[d_head]``: the score of a direction of a head is its product with the head's output, in float64."""
    assert target.head is not None
    unit = target.vector.astype(np.float64) / np.linalg.norm(target.vector)
    if len(unit) == model.d_head:
        return unit
    weight = model.adapter.out_projections(model.model)[target.site.layer].weight.detach().double().numpy()
    writes = weight if model.model.config.model_type == "gpt2" else weight.T  # GPT-2 keeps it the other way round
    return writes[model.d_head * target.head : model.d_head * (target.head + 1)] @ unit


# Edits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_head_is_scaled_and_no_other(family, dtype, load_tiny, make_engine, run) -> None:
    model = load_tiny(family, dtype)
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        response = run(engine, [request("r", steer(LOUDER))])["r"]
    z, changed = recorder.row()
    expected = by_head(model, z).copy()
    expected[:, HEAD] *= 2.5
    assert_close(changed, expected.reshape(z.shape), z, dtype)
    others = np.arange(model.n_heads) != HEAD
    assert np.array_equal(by_head(model, changed)[:, others], by_head(model, z)[:, others])
    (line,) = response.receipt.interventions
    assert (line.label, line.site) == ("head L1H2: scale 2.5", Z)
    assert line.tokens_in_scope == line.tokens_covered == line.tokens_edited == len(z)
    share = 1.5 * np.linalg.norm(by_head(model, z)[:, HEAD], axis=1) / np.linalg.norm(z, axis=1)
    assert line.mean_relative_edit == pytest.approx(share.mean(), rel=1e-3)
    assert line.max_activation == 0.0
    assert response.receipt.steered


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_model_goes_on_with_the_scaled_head(family, load_tiny, make_engine) -> None:
    """Against an unmodified model in which a hook of the circuits multiplies the head."""
    model = load_tiny(family)
    steering = steer(Intervention(HeadTarget(0, 1), Op.SCALE, -1.0), LOUDER)
    (result,) = drive(make_engine(model), [logprobs(request("r", steering))]).values()

    def scaled(head: int, factor: float):
        return lambda z: torch.cat([z[..., :head, :], factor * z[..., head : head + 1, :], z[..., head + 1 :, :]], -2)

    fresh = load_tiny(family)
    prompt = fresh.tokenizer("The quick brown fox")["input_ids"]
    tokens = torch.tensor([[*prompt, *result.token_ids]])
    with torch.no_grad(), heads_transformed(fresh, {0: scaled(1, -1.0), LAYER: scaled(HEAD, 2.5)}):
        expected = fresh.model(tokens).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, tokens.shape[1] - 1)
    found = torch.tensor([entry.logprob for entry in result.logprobs])
    torch.testing.assert_close(found, expected[rows, tokens[0, rows + 1]], rtol=0, atol=1e-4)


def logprobs(asked: GenerateRequest) -> GenerateRequest:
    return replace(asked, sampling=replace(asked.sampling, logprobs=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_factor_of_one_keeps_every_bit(dtype, load_tiny, make_engine) -> None:
    model = load_tiny(dtype=dtype)
    once = steer(*(Intervention(HeadTarget(LAYER, head), Op.SCALE, 1.0) for head in range(model.n_heads)))
    engine = make_engine(model, enable_prefix_caching=False)
    plain, scaled = drive(engine, [logprobs(request("plain")), logprobs(request("scaled", once))]).values()
    assert (scaled.token_ids, scaled.logprobs) == (plain.token_ids, plain.logprobs)
    for line in scaled.receipt.interventions:
        assert 0 == line.tokens_edited < line.tokens_covered == line.tokens_in_scope
    assert scaled.receipt.steered


@pytest.mark.parametrize(("op", "value"), [(Op.SCALE, 0.0), (Op.BLOCK, None)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_without_heads_attention_is_the_bias_alone(family, op, value, load_tiny, make_engine, run) -> None:
    model = load_tiny(family)
    spec = steer(*(Intervention(HeadTarget(LAYER, head), op, value) for head in range(model.n_heads)))
    sites = [Z, Site(LAYER, Stream.ATTN_OUT)]
    with recording_all(model, sites, lambda: make_engine(model, bank_capacity=128)) as ((heads, out), engine):
        run(engine, [request("r", spec)])
    assert heads.row()[0].any()
    assert not heads.row()[1].any()
    layer = model.adapter.layers(model.model)[LAYER]
    bias = model.adapter.out_projections(model.model)[LAYER].bias
    expected = torch.zeros(model.d_model) if bias is None else bias.detach()
    if "gemma" in family:
        expected = layer.post_attention_layernorm(expected).detach()
    attn_out = out.row()[1]
    np.testing.assert_allclose(attn_out, expected.double().numpy()[None].repeat(len(attn_out), 0), atol=1e-6)


@pytest.mark.parametrize("phase", list(Phase))
def test_scope(phase, load_tiny, make_engine, run) -> None:
    model = load_tiny()
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        response = run(engine, [request("r", steer(replace(LOUDER, phase=phase)), return_activations=True)])["r"]
    z, changed = recorder.row()
    is_prompt = np.arange(len(z)) < response.outputs[0].num_prompt_tokens
    in_scope = {Phase.ALL: np.full(len(z), True), Phase.PROMPT: is_prompt, Phase.GENERATED: ~is_prompt}[phase]
    assert ((z != changed).any(axis=1) == in_scope).all()
    assert (np.isnan(response.scores[:, 0]) == ~in_scope).all()
    assert not response.scores[in_scope].any(), "a head has no score"


def test_a_direction_of_a_head_gates_the_edit_of_another(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    read = direction(model, model.d_model, head=0)
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        run(engine, [request("all")])
        threshold = float(np.median(by_head(model, recorder.row()[0])[:, 0] @ projection(model, read)))
    spec = steer(replace(LOUDER, gate=Gate(read, threshold)))
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        response = run(engine, [request("r", spec)])["r"]
    z, changed = recorder.row()
    is_open = by_head(model, z)[:, 0] @ projection(model, read) > threshold
    assert 0 < is_open.sum() < len(z)
    assert ((z != changed).any(axis=1) == is_open).all()
    assert response.receipt.interventions[0].tokens_edited == is_open.sum()


def test_a_guard_on_a_head_rewinds_under_a_scaled_head(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    read = direction(model, model.d_model, seed=1)
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        num_prompt = run(engine, [request("plain", return_activations=True)])["plain"].outputs[0].num_prompt_tokens
    scores = by_head(model, recorder.row()[0])[:, HEAD] @ projection(model, read)
    fires_at = num_prompt + int(scores[num_prompt:].argmax())
    threshold = float(np.sort(scores[num_prompt:])[-2:].mean())
    assert threshold > 0, "a silent head does not fire"
    rewind = Rewind(1, (Intervention(HeadTarget(LAYER, HEAD), Op.BLOCK),))
    guard = Guard(read, threshold, GuardAction.REWIND, rewind, Phase.GENERATED)
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        response = run(engine, [request("r", SteeringSpec(guards=(guard,)))])["r"]
    assert [(event.action, event.position) for event in response.guard_events] == [(GuardAction.REWIND, fires_at)]
    assert response.guard_events[0].score == pytest.approx(scores[fires_at], rel=1e-4)
    assert not by_head(model, recorder.row()[1])[fires_at + 1 :, HEAD].any(), "silent from the rewind on"
    monitor, silenced = response.receipt.interventions
    assert monitor.label.startswith("guard: direction that head L1H2 writes to > ")
    assert silenced.label == "rewind: head L1H2: block"
    assert 0 < silenced.tokens_edited == silenced.tokens_covered
    assert response.receipt.num_rewinds == 1


# Readings.


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_head_is_read_along_directions(family, load_tiny, make_engine, run) -> None:
    """Its own output, what it writes to the residual stream, and the whole site, beside an edit of the same head."""
    model = load_tiny(family)
    own, written = direction(model, model.d_head), direction(model, model.d_model, head=0)
    whole = replace(direction(model, model.n_heads * model.d_head), head=None)
    monitors = [Intervention(target, Op.MONITOR) for target in (own, written, whole)]
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        response = run(engine, [request("r", steer(*monitors, LOUDER), return_activations=True)])["r"]
    z, _ = recorder.row()
    heads = by_head(model, z)
    expected = [heads[:, HEAD] @ projection(model, own), heads[:, 0] @ projection(model, written)]
    expected.append(z @ whole.vector / np.linalg.norm(whole.vector.astype(np.float64)))
    np.testing.assert_allclose(response.scores[:, :3], np.stack(expected, axis=1), rtol=1e-4, atol=1e-5)
    labels = [line.label.removesuffix(": monitor") for line in response.receipt.interventions]
    assert labels[:2] == ["direction of head L1H2", "direction that head L1H0 writes to"]


@pytest.mark.parametrize(
    ("op", "value", "after"),
    [(Op.BLOCK, None, np.zeros_like), (Op.CLIP, -0.1, lambda p: np.minimum(p, -0.1)), (Op.ADD, 3.0, lambda p: p + 3.0)],
)
def test_what_a_head_writes_along_a_direction_is_edited(op, value, after, load_tiny, make_engine, run) -> None:
    """By as short a change of its output as does it, and of no other head's."""
    model = load_tiny()
    target = direction(model, model.d_model)
    with recording(model, Z, lambda: make_engine(model)) as (recorder, engine):
        run(engine, [request("r", steer(Intervention(target, op, value)))])
    z, changed = recorder.row()
    along = projection(model, target)
    written = by_head(model, z)[:, HEAD] @ along
    np.testing.assert_allclose(by_head(model, changed)[:, HEAD] @ along, after(written), atol=1e-5)
    moved = np.zeros((len(z), model.n_heads, model.d_head))
    moved[:, HEAD] = np.outer(after(written) - written, along / (along @ along))
    assert_close(changed, z + moved.reshape(z.shape), z, torch.float32)


# Company.


def requests_of(model: LoadedModel) -> list[GenerateRequest]:
    """A different head in every row, one row without, and one that reads what another scales."""
    specs = [steer(Intervention(HeadTarget(layer, layer + 1), Op.SCALE, 0.5 - layer)) for layer in range(3)]
    specs += [SteeringSpec(), steer(LOUDER, Intervention(direction(model, model.d_model), Op.MONITOR))]
    return [logprobs(request(str(i), each, return_activations=True)) for i, each in enumerate(specs)]


@pytest.mark.parametrize("max_num_batched_tokens", [5, 128])
def test_rows_of_a_batch_have_heads_of_their_own(max_num_batched_tokens, load_tiny, make_engine) -> None:
    model = load_tiny()
    requests = requests_of(model)
    alone = drive(make_engine(model, max_num_seqs=1, enable_prefix_caching=False), requests)
    engine = make_engine(model, max_num_seqs=5, max_num_batched_tokens=max_num_batched_tokens)
    together = drive(engine, requests, [0, 2, 0, 1, 3])
    assert len({result.token_ids for result in alone.values()}) > 2
    for key, result in alone.items():
        assert_same(together[key], result)


def test_edited_heads_share_no_cached_block_with_others(load_tiny, make_engine) -> None:
    model = load_tiny()
    engine: Engine = make_engine(model)
    prompt = "Once upon a time, there was a queen"
    specs = {
        "plain": SteeringSpec(),
        "head": steer(LOUDER),
        "another head": steer(replace(LOUDER, target=HeadTarget(LAYER, 0))),
        "another layer": steer(replace(LOUDER, target=HeadTarget(0, HEAD))),
        "another factor": steer(replace(LOUDER, value=2.0)),
    }
    asked = [replace(request(name, each), prompt=prompt) for name, each in specs.items()]
    cold = {each.request_id: drive(engine, [each])[each.request_id, 0] for each in asked}
    assert {name: result.receipt.num_cached_tokens for name, result in cold.items()} == dict.fromkeys(specs, 0)
    for each in asked:
        warm = drive(engine, [each])[each.request_id, 0]
        assert warm.receipt.num_cached_tokens == 32
        assert_same(warm, cold[each.request_id])


# Policies.


def quiet(**rest: object) -> Policy:
    edit = {"op": "scale", "value": 0.5, "heads": ["L1H2", "L2H3"]}
    rule = {"action": "clamp", "name": "circuit", "edit": edit} | rest
    content = {"format": "steerserve.policy/1", "name": "quiet", "version": "1", "rules": [rule]}
    return Policy.model_validate(content)


def test_a_policy_scales_heads_behind_the_request(load_tiny, make_engine, run) -> None:
    model = load_tiny()

    def make() -> Engine:
        engine = make_engine(model)
        engine.replace_policies(PolicySet({"quiet": quiet()}))
        return engine

    with recording(model, Z, make) as (recorder, engine):
        asked = request("r", steer(replace(LOUDER, value=4.0)), policies=("quiet",))
        response = run(engine, [asked])["r"]
    z, changed = recorder.row()
    np.testing.assert_allclose(by_head(model, changed)[:, HEAD], 2.0 * by_head(model, z)[:, HEAD], rtol=1e-5)
    lines = response.receipt.interventions
    assert [(line.source, line.label) for line in lines] == [
        ("request", "head L1H2: scale 4"),
        ("policy:quiet@1", "head L1H2: scale 0.5"),
        ("policy:quiet@1", "head L2H3: scale 0.5"),
    ]
    assert lines[0].overridden_by == ("policy:quiet@1",)
    assert all(line.tokens_edited == len(z) for line in lines)
    assert [str(verdict.kind) for verdict in response.outputs[-1].verdicts] == ["modified", "modified"]


def test_a_policy_rewinds_under_scaled_heads(load_tiny, make_engine, make_pack, run) -> None:
    """The concept is read by its pack's detector; what is edited to get rid of it are heads."""
    model = load_tiny()
    rule = quiet().rules[0].model_dump() | {
        "concept": "mood",
        "action": "rewind",
        "edit": None,
        "threshold": -1.0,
        "phase": Phase.GENERATED,
        "rewind": {"tokens": 1, "edit": {"op": "block", "heads": ["L1H2"]}, "otherwise": "flag"},
    }
    with recording(model, Z, lambda: make_engine(model, [make_pack(model)])) as (recorder, engine):
        engine.replace_policies(PolicySet({"quiet": quiet(**rule)}))
        response = run(engine, [request("r", policies=("quiet",))])["r"]
    assert response.receipt.num_rewinds == 1
    first = next(event.position for event in response.guard_events)
    assert not by_head(model, recorder.row()[1])[first + 1 :, HEAD].any()


def test_heads_that_the_server_does_not_steer_are_refused(load_tiny, make_engine) -> None:
    model = load_tiny()
    engine = make_engine(model, sites=("blocks.1.hook_resid_post",))
    with pytest.raises(IncompatibleError, match=r"interventions\[0\].target: got 'blocks.1.attn.hook_z', expected"):
        engine.add_request(request("r", steer(LOUDER)))
