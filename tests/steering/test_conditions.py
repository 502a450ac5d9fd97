"""Gates, guards and rewinds: what they become in the plan, and what is refused at which field."""

from __future__ import annotations

import numpy as np
import pytest
from steering_specs import ONES, SITE, concept, direction, feature, gate, guard, rewind, spec

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.kernels.steer_delta import OpCode
from steerserve.steering.compiler import compile_plan
from steerserve.steering.plan import Stage
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    GuardAction,
    Op,
    Phase,
    Site,
    Stream,
    Unit,
)

EARLY, LATE = Site(0, Stream.MLP_OUT), Site(3, Stream.RESID_PRE)
MOOD = ConceptTarget("mood")


def test_a_gate_becomes_a_monitor_that_feeds_the_score_of_its_edit(catalog) -> None:
    asked = [feature(4), feature(2, Op.ADD, 1.0, gate=gate(MOOD, 0.1), phase=Phase.PROMPT)]
    plan = compile_plan(spec(*asked), (), catalog)
    (part,) = plan.sites
    assert part.op.tolist() == [OpCode.SCALE, OpCode.ADD, OpCode.MONITOR, OpCode.MONITOR]
    assert part.score_index.tolist() == [-1, 0, 0, 0]
    assert part.value.tolist() == [0, 1, 10, 20]
    assert part.segments[1].weight.tolist() == [[10, 20]]
    (score,) = plan.scores
    assert (score.intervention, score.threshold, score.phase) == (2, np.float32(0.1), Phase.PROMPT)
    monitor = plan.interventions[2]
    assert monitor.label == "gate of interventions[1]: concept mood > 0.1"
    assert (monitor.source, monitor.stage, monitor.phase) == ("request", Stage.REQUEST, Phase.PROMPT)
    assert plan.packs == {"mood@2": catalog.packs["mood"].sha256}


def test_equal_gates_share_a_score_and_different_ones_do_not(catalog) -> None:
    along = DirectionTarget(EARLY, ONES)
    gates = [
        gate(1), gate(2), gate(1), gate(1, 0.6), gate(1), gate(along), gate(DirectionTarget(SITE, ONES)),
        Gate(DirectionTarget(EARLY, 2 * ONES), 0.5),
    ]  # fmt: skip
    phases = [Phase.ALL] * 4 + [Phase.PROMPT] + [Phase.ALL] * 3
    vectors = np.eye(8, dtype=np.float32)
    asked = [direction(vector=v, gate=g, phase=p) for v, g, p in zip(vectors, gates, phases, strict=True)]
    plan = compile_plan(spec(*asked), (), catalog)
    part = plan.sites[-1]
    assert part.score_index[:8].tolist() == [0, 1, 0, 2, 3, 4, 5, 4]
    assert [plan.interventions[score.intervention].label for score in plan.scores] == [
        "gate of interventions[0] and 1 more: feature toy-sae/1 > 0.5",
        "gate of interventions[1]: feature toy-sae/2 > 0.5",
        "gate of interventions[3]: feature toy-sae/1 > 0.6",
        "gate of interventions[4]: feature toy-sae/1 > 0.5",
        f"gate of interventions[5] and 1 more: direction at {EARLY} > 0.5",
        f"gate of interventions[6]: direction at {SITE} > 0.5",
    ]
    assert [score.phase for score in plan.scores].index(Phase.PROMPT) == 3


def test_a_guard_becomes_a_monitor_behind_the_requests_edits(catalog) -> None:
    guards = (
        guard(MOOD, 0.1, phase=Phase.GENERATED, fail_open=True),
        guard(4, -1.0, action=GuardAction.BLOCK),
        guard(4, -1.0),
    )
    plan = compile_plan(spec(feature(4, gate=gate(1)), guards=guards), ("mood",), catalog)
    assert [(p.source, p.label) for p in plan.interventions] == [
        ("request", "feature toy-sae/4: block"),
        ("request", "gate of interventions[0]: feature toy-sae/1 > 0.5"),
        ("request", "guard: concept mood > 0.1"),
        ("request", "guard: feature toy-sae/4 > -1"),
        ("request", "guard: feature toy-sae/4 > -1"),
        ("policy:mood@2", "concept mood: clamp always"),
    ]
    request, policy = plan.sites
    assert (request.stage, request.intervention.tolist(), request.score_index.tolist()) == (0, [0, 1], [0, 0])
    assert policy.stage is Stage.POLICY
    assert policy.intervention.tolist() == [2, 2, 3, 4, 5, 5]
    assert policy.op.tolist() == [OpCode.MONITOR] * 4 + [OpCode.CLAMP_ALWAYS] * 2
    assert policy.score_index.tolist() == [1, 1, 2, 3, -1, -1]
    assert policy.value.tolist() == [10, 20, 1, 1, -1, -2]
    assert [(s.intervention, s.threshold, s.phase) for s in plan.scores] == [
        (1, 0.5, Phase.ALL), (2, np.float32(0.1), Phase.GENERATED), (3, -1, Phase.ALL), (4, -1, Phase.ALL)
    ]  # fmt: skip
    assert [(g.score, g.label, g.action, g.fail_open) for g in plan.guards] == [
        (1, "guard: concept mood > 0.1", GuardAction.FLAG, True),
        (2, "guard: feature toy-sae/4 > -1", GuardAction.BLOCK, False),
        (3, "guard: feature toy-sae/4 > -1", GuardAction.FLAG, False),
    ]
    assert plan.hold_back == 1
    assert len(plan.levels) == 1


def test_the_edits_of_a_rewind_grow_with_the_retry(catalog, sae) -> None:
    again = rewind(
        feature(1, Op.CLAMP, -0.1, always=True), feature(3, Op.ADD, 1.5, unit=Unit.MAX_ACTIVATION), feature(4),
        max_retries=3,
    )  # fmt: skip
    plan = compile_plan(spec(feature(0, Op.ADD, 1.0), guards=(guard(rewind=again),)), (), catalog)
    assert [planned.label for planned in plan.interventions] == [
        "feature toy-sae/0: add 1",
        "guard: feature toy-sae/0 > 0.5",
        "rewind: feature toy-sae/1: clamp always -0.1",
        "rewind: feature toy-sae/3: add 6",
        "rewind: feature toy-sae/4: block",
    ]
    assert [level[0].intervention.tolist() for level in plan.levels] == [[0]] + [[0, 2, 3, 4]] * 3
    for retry, (part, reading) in enumerate(plan.levels[1:], 1):
        np.testing.assert_array_equal(part.value, np.float32([1.0, retry * np.float32(-0.1), retry * 6.0, 0.0]))
        np.testing.assert_array_equal(part.rows.W_dec[part.row], sae.W_dec[[0, 1, 3, 4]])
        assert reading is plan.levels[0][1], "all levels have the same guards"
        assert (part.stage, reading.stage) == (Stage.REQUEST, Stage.POLICY)
    assert plan.guards[0].rewind is again
    assert plan.hold_back == 4


def test_levels_that_do_the_same_share_their_site_plans(catalog) -> None:
    again = rewind(feature(4), max_retries=4)
    plan = compile_plan(spec(direction(site=EARLY), guards=(guard(rewind=again),)), (), catalog)
    assert len({id(level[0]) for level in plan.levels}) == 1, "nothing changes at the early site"
    assert len({id(level[1]) for level in plan.levels}) == 2, "a block is not stronger the second time"


def test_a_rewinds_edit_takes_the_place_of_the_requests_own(catalog) -> None:
    asked = [
        concept(Op.ADD, 2.0), feature(0, Op.ADD, 1.0), feature(3, Op.MONITOR), direction(Op.ADD, 3.0),
        direction(Op.ADD, 3.0, site=LATE),
    ]  # fmt: skip
    again = rewind(feature(3, Op.ADD, -5.0), feature(0), direction(vector=-ONES), max_retries=1)
    plan = compile_plan(spec(*asked, guards=(guard(concept().target, rewind=again),)), (), catalog)
    before, after = (level[0] for level in plan.levels)
    assert before.intervention.tolist() == [0, 0, 1, 2, 3]
    assert after.intervention.tolist() == [0, 2, 6, 7, 8], "feature 3 leaves the concept, the two others go wholly"
    assert after.value.tolist() == [2, 0, -5, 0, 0]
    assert after.rows.keys[after.row[0]] == before.rows.keys[before.row[0]]
    assert after.segments[0].weight.tolist() == [[0.5], [1], [1], [1], [1]]
    (_, reading, late), (_, *same) = plan.levels
    assert (reading, late) == tuple(same), "what guards read stays, and so does the same direction at another site"
    assert (reading.stage, late.site) == (Stage.POLICY, LATE)


def test_a_rewinds_edit_leaves_the_policies_alone(catalog) -> None:
    plan = compile_plan(spec(guards=(guard(rewind=rewind(feature(3, Op.ADD, 5.0))),)), ("mood",), catalog)
    assert [part.stage for part in plan.levels[1]] == [Stage.REQUEST, Stage.POLICY]
    assert plan.levels[1][1] is plan.levels[0][0]
    assert plan.levels[0][0].value.tolist() == [1, -1, -2]


def test_an_edit_of_a_rewind_may_have_a_gate(catalog) -> None:
    again = rewind(feature(3, Op.ADD, -5.0, gate=gate(1)), max_retries=1)
    plan = compile_plan(spec(feature(2, gate=gate(5)), guards=(guard(rewind=again),)), (), catalog)
    assert [p.label for p in plan.interventions[1:3]] == [
        "gate of interventions[0]: feature toy-sae/5 > 0.5",
        "gate of guards[0].rewind.edits[0]: feature toy-sae/1 > 0.5",
    ]
    before, after = (level[0] for level in plan.levels)
    assert (before.intervention.tolist(), before.score_index.tolist()) == ([0, 1, 2], [0, 0, 1])
    assert (after.intervention.tolist(), after.score_index.tolist()) == ([0, 1, 2, 4], [0, 0, 1, 1])


IN_GATE, IN_GUARD, IN_REWIND = (
    "steering.interventions[1].gate", "steering.guards[1]", "steering.guards[0].rewind.edits[1]"
)  # fmt: skip


def gated(condition: Gate, op: Op = Op.BLOCK, **rest):
    return spec(feature(2), feature(1, op, gate=condition, **rest))


def guarded(*args, **rest):
    return spec(guards=(guard(), guard(*args, **rest)))


def rewound(*edits):
    return spec(guards=(guard(rewind=rewind(feature(5), *edits)),))


@pytest.mark.parametrize(
    ("asked", "error", "field", "expected"),
    [
        (gated(gate(6)), InvalidRequestError, f"{IN_GATE}.target.feature", "from 0 to 5"),
        (gated(gate(FeatureTarget("toy", 1))), InvalidRequestError, f"{IN_GATE}.target.sae", "toy-sae"),
        (gated(gate(ConceptTarget("modo"))), InvalidRequestError, f"{IN_GATE}.target.concept", "mood"),
        (gated(gate(DirectionTarget(SITE, 0 * ONES))), InvalidRequestError, f"{IN_GATE}.target.vector", "direction"),
        (gated(gate(DirectionTarget(SITE, ONES[:7]))), IncompatibleError, f"{IN_GATE}.target.vector", "[8]"),
        (gated(gate(1, np.nan)), InvalidRequestError, f"{IN_GATE}.threshold", "finite"),
        (gated(gate(1, -np.inf)), InvalidRequestError, f"{IN_GATE}.threshold", "finite"),
        (gated(gate(1, 1e39)), InvalidRequestError, f"{IN_GATE}.threshold", "float32"),
        (gated(gate(DirectionTarget(LATE, ONES))), InvalidRequestError, f"{IN_GATE}.target", f"at or before {SITE}"),
        (gated(gate(1), Op.MONITOR), InvalidRequestError, IN_GATE, "none"),
        (guarded(6), InvalidRequestError, f"{IN_GUARD}.target.feature", "from 0 to 5"),
        (guarded(ConceptTarget("modo")), InvalidRequestError, f"{IN_GUARD}.target.concept", "mood"),
        (guarded(DirectionTarget(Site(4, Stream.RESID_PRE), ONES)), IncompatibleError, f"{IN_GUARD}.target.site",
         "from 0 to 3"),
        (guarded(1, np.inf), InvalidRequestError, f"{IN_GUARD}.threshold", "finite"),
        (guarded(1, -1e39), InvalidRequestError, f"{IN_GUARD}.threshold", "float32"),
        (rewound(feature(6)), InvalidRequestError, f"{IN_REWIND}.target.feature", "from 0 to 5"),
        (rewound(feature(1, Op.ADD)), InvalidRequestError, f"{IN_REWIND}.value", "add needs one"),
        (rewound(feature(1, Op.BLOCK, 1.0)), InvalidRequestError, f"{IN_REWIND}.value", "block takes none"),
        (rewound(feature(1, Op.ADD, np.nan)), InvalidRequestError, f"{IN_REWIND}.value", "finite"),
        (rewound(feature(1, Op.ADD, 2e38)), InvalidRequestError, f"{IN_REWIND}.value", "2 times"),
        (rewound(feature(1, Op.MONITOR)), InvalidRequestError, f"{IN_REWIND}.op", "a rewind edits"),
        (rewound(feature(1, phase=Phase.GENERATED)), InvalidRequestError, f"{IN_REWIND}.phase", "all"),
        (rewound(feature(1, phase=Phase.PROMPT)), InvalidRequestError, f"{IN_REWIND}.phase", "all"),
        (rewound(feature(5)), InvalidRequestError, f"{IN_REWIND}.target", "steering.guards[0].rewind.edits[0]"),
        (rewound(feature(1, gate=gate(DirectionTarget(LATE, ONES)))), InvalidRequestError, f"{IN_REWIND}.gate.target",
         f"at or before {SITE}"),
        (rewound(feature(1, gate=gate(1, np.nan))), InvalidRequestError, f"{IN_REWIND}.gate.threshold", "finite"),
        (spec(guards=(guard(rewind=rewind()),)), InvalidRequestError, "steering.guards[0].rewind.edits",
         "at least one"),
        (spec(guards=(guard(rewind=rewind(feature(1))), guard(), guard(rewind=rewind(feature(2))))),
         InvalidRequestError, "steering.guards[2].rewind", "steering.guards[0].rewind"),
    ],
)  # fmt: skip
def test_wrong_conditions_are_refused_by_field(asked, error, field, expected, catalog) -> None:
    with pytest.raises(error) as caught:
        compile_plan(asked, (), catalog)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert expected in caught.value.expected


@pytest.mark.parametrize("site", [EARLY, Site(2, Stream.MLP_OUT), SITE], ids=str)
def test_a_gate_may_be_read_at_or_before_its_edit(site, catalog) -> None:
    assert compile_plan(gated(gate(DirectionTarget(site, ONES))), (), catalog).scores


def test_an_edit_of_a_rewind_behind_a_policy_is_refused_and_behind_its_guard_is_not(catalog) -> None:
    late = spec(guards=(guard(rewind=rewind(direction(Op.ADD, 1.0, site=LATE))),))
    with pytest.raises(InvalidRequestError) as caught:
        compile_plan(late, ("mood",), catalog)
    assert caught.value.field == "steering.guards[0].rewind.edits[0].target"
    assert "policy:mood@2" in caught.value.expected
    assert [part.site for part in compile_plan(late, (), catalog).levels[1]] == [SITE, LATE]


def test_guards_and_gates_may_read_behind_a_policy(catalog) -> None:
    reading = spec(guards=(guard(DirectionTarget(LATE, ONES)),))
    assert compile_plan(reading, ("mood",), catalog).guards


@pytest.mark.parametrize("sign", [1, -1])
def test_values_and_thresholds_reach_to_the_last_number_that_float32_holds(sign, catalog) -> None:
    largest = float(np.finfo(np.float32).max)
    past = largest + 2.0**103  # rounds to infinity
    below = sign * float(np.nextafter(past, 0))
    again = rewind(feature(1, Op.ADD, sign * largest / 4), max_retries=4)
    plan = compile_plan(spec(guards=(guard(0, below, rewind=again),)), (), catalog)
    assert plan.scores[0].threshold == sign * largest
    assert plan.levels[4][0].value.tolist() == [sign * largest]
    with pytest.raises(InvalidRequestError, match="4 times"):
        compile_plan(
            spec(guards=(guard(rewind=rewind(feature(1, Op.ADD, sign * past / 4), max_retries=4)),)), (), catalog
        )
