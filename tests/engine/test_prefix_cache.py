"""A cached prefix changes when a response comes, and not a bit of it: neither its tokens nor what is proven of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from engine_runs import (
    EARLY,
    LATE,
    Outcome,
    assert_same,
    direction,
    drive,
    feature,
    gate,
    guard,
    line,
    monitor,
    request,
    rewind,
    scores_of,
    spec,
)

from steerserve.engine.blocks import PrefixKeys
from steerserve.engine.engine import Engine
from steerserve.models.loading import LoadedModel
from steerserve.steering.packs import ConceptPack
from steerserve.types import (
    ConceptTarget,
    FinishReason,
    GenerateRequest,
    GuardAction,
    Intervention,
    Op,
    Phase,
)

PROMPT = "Once upon a time, there was a queen"
"""Two blocks and three tokens."""

NUM_CACHED = 32
"""Positions of its full blocks."""

MOOD = Intervention(ConceptTarget("mood"), Op.BLOCK)

PLANS = {
    "unsteered": {},
    "steered": {"steering": spec(feature(3, Op.CLAMP, 7.0), direction(), direction(Op.BLOCK, None, LATE))},
    "prompt only": {"steering": spec(feature(3, value=2.0, phase=Phase.PROMPT))},
    "generated only": {"steering": spec(feature(3, value=2.0, phase=Phase.GENERATED))},
    "monitored": {"steering": spec(monitor(4), direction(Op.MONITOR, None)), "return_activations": True},
    "concept": {"steering": spec(MOOD, feature(6, value=2.0)), "return_activations": True},
    "policy": {"steering": spec(direction(value=2.0)), "policies": ("mood",), "return_activations": True},
    "gated": {"steering": spec(feature(5, value=3.0, gate=gate(line(), 0.2)), direction(gate=gate(line(), -0.2)))},
    "flagged": {"steering": spec(direction(), guards=[guard(3, threshold=1.5), guard(line(LATE), threshold=0.0)])},
    "guarded in the response": {
        "steering": spec(guards=[guard(3, threshold=1.0, phase=Phase.GENERATED)]), "return_activations": True
    },
}  # fmt: skip
SAME_IN_BOTH_PHASES = PLANS.keys() - {"prompt only", "generated only", "guarded in the response"}


@pytest.fixture
def model(load_tiny) -> LoadedModel:
    return load_tiny()


@pytest.fixture
def packs(model, make_pack) -> list[ConceptPack]:
    mood = make_pack(model, features=(1, 3, 4, 7, 9), op=Op.BLOCK)
    return [mood, make_pack(model, features=(1, 3, 4, 7, 9), op=Op.BLOCK, name="twin")]


@pytest.fixture
def caching(model, make_engine, packs) -> Engine:
    return make_engine(model, packs)


@pytest.fixture
def plain(load_tiny, make_engine, packs) -> Engine:
    """The same without a prefix cache, and with prompts cut differently."""
    return make_engine(load_tiny(), packs, enable_prefix_caching=False, max_num_batched_tokens=11)


def only(engine: Engine, asked: GenerateRequest) -> Outcome:
    return drive(engine, [asked])[asked.request_id, 0]


def next_turn(engine: Engine, asked: GenerateRequest, result: Outcome) -> GenerateRequest:
    """The prompt, its response and one more token as a prompt."""
    return replace(asked, prompt=(*engine.model.tokenizer(asked.prompt)["input_ids"], *result.token_ids, 5))


@pytest.mark.parametrize("plan", PLANS)
def test_hits_change_nothing_but_the_work(plan, caching, plain) -> None:
    """The same prompt twice, then prompt and response as a prompt, as in the next turn of a chat."""
    first = request("first", PROMPT, max_tokens=20, **PLANS[plan])
    cold, warm = only(caching, first), only(caching, first)
    second = next_turn(caching, first, cold)
    turn = only(caching, second)
    assert cold.receipt.num_cached_tokens == 0
    assert warm.receipt.num_cached_tokens == NUM_CACHED
    assert turn.receipt.num_cached_tokens == (NUM_CACHED + 16 if plan in SAME_IN_BOTH_PHASES else NUM_CACHED)
    expected = only(plain, first)
    assert_same(cold, expected)
    assert_same(warm, expected)
    assert_same(turn, only(plain, second))
    if "flagged" in plan:
        assert len(expected.guard_events) > 3
    if plan not in ("unsteered", "guarded in the response"):
        assert any(each.tokens_covered > 0 for each in expected.receipt.interventions)


STEERED = spec(feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6)])
"""What the variants differ from in one thing each."""

VARIANTS = {
    "no steering": spec(),
    "op": spec(feature(3, Op.CLIP, 7.0, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6)]),
    "always": spec(feature(3, Op.CLAMP, 7.0, always=True, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6)]),
    "value": spec(feature(3, Op.CLAMP, 7.5, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6)]),
    "feature": spec(feature(5, Op.CLAMP, 7.0, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6)]),
    "without the gate": spec(feature(3, Op.CLAMP, 7.0), guards=[guard(3, threshold=1e6)]),
    "feature of the gate": spec(feature(3, Op.CLAMP, 7.0, gate=gate(5, 0.5)), guards=[guard(3, threshold=1e6)]),
    "threshold of the gate": spec(feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.7)), guards=[guard(3, threshold=1e6)]),
    "site of the gate": spec(feature(3, Op.CLAMP, 7.0, gate=gate(line(), 0.5)), guards=[guard(3, threshold=1e6)]),
    "without the guard": spec(feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5))),
    "feature of the guard": spec(feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5)), guards=[guard(4, threshold=1e6)]),
    "threshold of the guard": spec(feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5)), guards=[guard(3, threshold=1.0)]),
    "action of the guard": spec(
        feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6, action=GuardAction.BLOCK)]
    ),
    "failure of the guard": spec(
        feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6, fail_open=True)]
    ),
    "phase of the guard": spec(
        feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5)), guards=[guard(3, threshold=1e6, phase=Phase.GENERATED)]
    ),
    "phase": spec(
        feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5), phase=Phase.GENERATED), guards=[guard(3, threshold=1e6)]
    ),
    "one more reading": spec(
        feature(3, Op.CLAMP, 7.0, gate=gate(4, 0.5)), monitor(6), guards=[guard(3, threshold=1e6)]
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_plans_that_differ_in_one_thing_share_nothing(variant, caching, plain) -> None:
    base, other = request("base", PROMPT, STEERED), request("other", PROMPT, VARIANTS[variant])
    only(caching, base)
    seen = only(caching, other)
    assert seen.receipt.num_cached_tokens == 0
    assert only(caching, base).receipt.num_cached_tokens == NUM_CACHED
    assert only(caching, other).receipt.num_cached_tokens == NUM_CACHED
    assert_same(seen, only(plain, other))


PAIRS = {
    "tokens": ({"prompt": PROMPT}, {"prompt": "P" + PROMPT[1:]}),
    "salt": ({"cache_salt": "a"}, {"cache_salt": "b"}),
    "some salt": ({}, {"cache_salt": "b"}),
    "vector": ({"steering": spec(direction())}, {"steering": spec(direction(seed=1))}),
    "sign": ({"steering": spec(direction(value=2.0))}, {"steering": spec(direction(value=-2.0))}),
    "site": ({"steering": spec(direction(site=EARLY))}, {"steering": spec(direction(site=LATE))}),
    "policy": ({}, {"policies": ("mood",)}),
    "pack": ({"policies": ("mood",)}, {"policies": ("twin",)}),
    "stage": ({"steering": spec(MOOD)}, {"policies": ("mood",)}),
    "pack and SAE": (
        {"steering": spec(feature(1, Op.BLOCK, None))}, {"steering": spec(MOOD)}
    ),
    "which gate": (
        {"steering": spec(feature(3, gate=gate(4)), feature(5, gate=gate(4)), feature(6, gate=gate(7)))},
        {"steering": spec(feature(3, gate=gate(4)), feature(5, gate=gate(7)), feature(6, gate=gate(7)))},
    ),
    "order": ({"steering": spec(monitor(3), monitor(4))}, {"steering": spec(monitor(4), monitor(3))}),
}  # fmt: skip


@pytest.mark.parametrize("part", PAIRS)
def test_requests_that_differ_in_one_thing_share_nothing(part, caching, plain) -> None:
    one, other = (request("r", **{"prompt": PROMPT} | rest) for rest in PAIRS[part])
    expected = [only(plain, asked) for asked in (one, other)]
    for num_cached in (0, NUM_CACHED):
        for asked, alone in zip((one, other), expected, strict=True):
            seen = only(caching, asked)
            assert seen.receipt.num_cached_tokens == num_cached
            assert_same(seen, alone)


def test_models_share_nothing(caching) -> None:
    asked = request("r", PROMPT)
    only(caching, asked)
    model = caching.model
    caching.model = replace(model, fingerprint="f" * 64)
    assert only(caching, asked).receipt.num_cached_tokens == 0
    caching.model = model
    assert only(caching, asked).receipt.num_cached_tokens == NUM_CACHED


def test_prompts_share_what_they_begin_with(caching, plain) -> None:
    only(caching, request("r", PROMPT, STEERED))
    other = request("r", PROMPT[:20] + "!" + PROMPT[21:], STEERED)
    seen = only(caching, other)
    assert seen.receipt.num_cached_tokens == 16
    assert_same(seen, only(plain, other))
    exactly = request("r", PROMPT[:32], STEERED)  # the last token is computed: its logits are needed
    assert only(caching, exactly).receipt.num_cached_tokens == 16


def test_what_is_the_same_in_effect_is_shared(caching, plain) -> None:
    """An edit of the response alone leaves the prompt as it is; rewinds do nothing before they happen."""
    only(caching, request("r", PROMPT, spec(feature(3, phase=Phase.GENERATED))))
    assert only(caching, request("r", PROMPT)).receipt.num_cached_tokens == NUM_CACHED
    names = ("sampling", "timeout_s", "priority", "return_activations")
    rest = dict(zip(names, (replace(request("r").sampling, max_tokens=2), 1e6, 3, True), strict=True))
    only(caching, request("r", PROMPT, spec(monitor(3))))
    asked = request("r", PROMPT, spec(monitor(3)), **rest)
    seen = only(caching, asked)
    assert seen.receipt.num_cached_tokens == NUM_CACHED
    assert len(seen.scores) == len(PROMPT) + 2
    assert_same(seen, only(plain, asked))


@pytest.mark.parametrize("at", [2, 20])
def test_a_guard_fires_in_a_cached_block_as_it_did_when_that_was_computed(at, caching, plain) -> None:
    probe = only(plain, request("r", PROMPT, spec(monitor(3)), return_activations=True))
    scores = scores_of(probe)[:, 0]
    threshold = float(np.sort(scores[at:NUM_CACHED])[-2])  # one position behind exceeds it, and maybe some before
    fires_at = int(np.argmax(scores > threshold))
    for action in (GuardAction.FLAG, GuardAction.BLOCK):
        asked = request("r", PROMPT, spec(direction(site=LATE), guards=[guard(3, threshold, action=action)]))
        first, again = only(caching, asked), only(caching, asked)
        assert again.receipt.num_cached_tokens >= 16
        assert first.guard_events[0].position == fires_at
        assert first.guard_events[0].action is action
        blocked = action is GuardAction.BLOCK
        assert first.finish_reason is (FinishReason.BLOCKED if blocked else FinishReason.LENGTH)
        assert_same(again, first)
        assert_same(first, only(plain, asked))


def test_what_was_generated_after_a_rewind_is_not_taken_for_what_was_before(caching, plain) -> None:
    probe = only(plain, request("r", PROMPT, spec(monitor(3)), return_activations=True, max_tokens=40))
    scores = scores_of(probe)[:, 0]
    threshold = float(scores[: len(PROMPT)].max())
    assert any(score > threshold for score in scores[len(PROMPT) + 4 :])
    edits = rewind(direction(value=6.0), num_tokens=3, otherwise=GuardAction.FLAG)
    asked = request("r", PROMPT, spec(guards=[guard(3, threshold, edits)]), max_tokens=40)
    first = only(caching, asked)
    assert first.receipt.num_rewinds == 1
    rewound_from = first.guard_events[0].position + 1 - 3
    assert rewound_from > len(PROMPT)
    second = next_turn(caching, asked, first)
    turn = only(caching, second)
    assert turn.receipt.num_cached_tokens == (rewound_from - 1) // 16 * 16
    assert_same(first, only(plain, asked))
    assert_same(turn, only(plain, second))


def test_keys_and_records_follow_a_response_that_rewinds(load_tiny, make_engine) -> None:
    """A second retry that does what the first did leaves no trace in the keys, so it must leave none in the records."""
    engine = make_engine(load_tiny(), block_size=2)
    edits = rewind(feature(5, Op.BLOCK, None), num_tokens=2, max_retries=3, otherwise=GuardAction.FLAG)
    asked = request("r", PROMPT, spec(guards=[guard(3, -1.0, edits, phase=Phase.GENERATED)]), max_tokens=20)
    engine.add_request(asked)
    engine.step()
    (sequence,) = engine._scheduler.running
    drive(engine)
    assert sequence.num_rewinds == 3
    digests = [entries.digest for entries, _, _ in sequence.pieces(0, sequence.num_tokens)]
    assert len(digests) >= 2
    assert all(one != following for one, following in pairwise(digests))
    afresh = PrefixKeys(sequence._keys._chain[0], sequence.token_ids, sequence._digests, block_size=2)
    num_blocks = sequence.num_tokens // 2
    assert sequence.block_keys(num_blocks) == afresh.first(num_blocks)
