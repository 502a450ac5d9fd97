"""A rewind goes on as if the tokens it took back had never been: KV cache, draws, penalties, text and counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from engine_runs import LATE, Outcome, assert_same, direction, drive, guard, line, request, rewind, spec
from guard_oracle import (
    ASLEEP,
    BASE,
    GREEDY,
    PENALISED,
    PROMPT,
    SAMPLED,
    STRONGER,
    Expected,
    Oracle,
    activations_behind,
    assert_expected,
    assert_held_back,
    fires_at,
    guarded,
    watch,
)

from steerserve.types import (
    FinishReason,
    GenerateRequest,
    Guard,
    GuardAction,
    Op,
    Phase,
    Rewind,
    SamplingParams,
    SteeringSpec,
)


@pytest.fixture
def oracle(load_tiny, sae) -> Oracle:
    return Oracle(load_tiny(), sae)


@dataclass(frozen=True)
class Case:
    """A guard that fires first at the ``index``-th generated token; how often it has to rewind."""

    index: int
    num_tokens: int
    max_retries: int = 1
    sampling: SamplingParams = GREEDY
    share: float = 0.9
    prompt: tuple[int, ...] = PROMPT
    otherwise: GuardAction = GuardAction.FLAG
    num_rewinds: int = 1
    engine: dict[str, object] = field(default_factory=dict)

    def request(self, oracle: Oracle) -> GenerateRequest:
        plain = guarded(ASLEEP, self.sampling, self.prompt)
        rewind = Rewind(self.num_tokens, STRONGER, self.max_retries, self.otherwise)
        x, position = activations_behind(oracle, plain), len(self.prompt) + self.index
        guard = fires_at(x, position, GuardAction.REWIND, self.share, rewind=rewind, phase=Phase.GENERATED)
        return guarded(guard, self.sampling, self.prompt)


TWO_BYTES = {token_id: -100.0 for token_id in range(260) if token_id not in (64, 127, 102, 120)}
"""Leaves "a" and the bytes of "é" and "ü", of which the first is the same."""
CASES = {
    "greedy": Case(9, 3),
    "one token": Case(6, 1),
    "first token": Case(0, 4),
    "last token": Case(15, 5),
    "sampled": Case(11, 6, sampling=SAMPLED),
    "penalties": Case(12, 8, sampling=PENALISED),
    "inside a character": Case(8, 3, sampling=replace(SAMPLED, seed=0, temperature=8.0, logit_bias=TWO_BYTES)),
    "often, then flagged": Case(3, 2, max_retries=4, share=0.3, num_rewinds=4, sampling=SAMPLED),
    "before what is held, then flagged": Case(8, 3, max_retries=4, share=0.5, num_rewinds=4, sampling=PENALISED),
    "often, then blocked": Case(
        8, 4, max_retries=2, share=0.5, num_rewinds=2, sampling=PENALISED, otherwise=GuardAction.BLOCK
    ),
    "out of a cached block": Case(12, 9, prompt=PROMPT[:7]),
    "out of a cached block, in chunks": Case(12, 9, prompt=PROMPT[:7], engine={"max_num_batched_tokens": 4}),
    "out of two cached blocks": Case(11, 10, engine={"block_size": 4}),
    "nothing cached": Case(12, 9, prompt=PROMPT[:7], engine={"enable_prefix_caching": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_rewind_goes_on_as_if_the_tokens_had_never_been(name, oracle, load_tiny, make_engine) -> None:
    case = CASES[name]
    request = case.request(oracle)
    expected = oracle.generate(request)
    assert expected.num_rewinds == case.num_rewinds
    assert expected.events[0].position == len(case.prompt) + case.index
    assert (len(expected.events) > case.num_rewinds) is ("then" in name)
    assert ("üé" in expected.text) is (name == "inside a character")
    watched = watch(make_engine(load_tiny(), **case.engine), request)
    assert_expected(watched.outcome, expected)
    assert_held_back(watched, len(case.prompt), case.num_tokens)
    assert_reads_counted(watched.outcome, expected, len(case.prompt))


def assert_reads_counted(result: Outcome, expected: Expected, num_prompt: int) -> None:
    """Each position once for each level at which it was computed."""
    positions, levels = np.array(expected.reads).T
    in_scope = [levels == 0, positions >= num_prompt, positions >= num_prompt, levels > 0, levels > 0]
    lines = result.receipt.interventions
    assert [line.tokens_in_scope for line in lines] == [scope.sum() for scope in in_scope]
    assert [line.tokens_covered for line in lines] == [scope.sum() for scope in in_scope]
    assert lines[0].tokens_edited == in_scope[0].sum()
    assert lines[4].tokens_edited == in_scope[4].sum()


@pytest.mark.parametrize("stop", ["complete where it fires", "begun in what is taken back"])
@pytest.mark.parametrize("include", [False, True])
def test_a_rewind_takes_back_what_stop_strings_have_seen(include, stop, oracle, load_tiny, make_engine) -> None:
    case = Case(8, 3, sampling=replace(PENALISED, include_stop_str_in_output=include))
    request = case.request(oracle)
    free = oracle.generate(replace(request, steering=SteeringSpec(BASE, (ASLEEP,)))).text
    then = oracle.generate(request)
    string = free[7:9] if stop == "complete where it fires" else free[7:9] + then.text[6]
    assert free.find(free[7:9]) == 7
    request = replace(request, sampling=replace(request.sampling, stop=(string,)))
    expected = oracle.generate(request)
    assert (expected.finish_reason, expected.token_ids) == (FinishReason.LENGTH, then.token_ids)
    assert_expected(drive(make_engine(load_tiny()), [request])["r", 0], expected)


def test_a_rewind_does_not_reach_what_another_request_reads(oracle, load_tiny, make_engine) -> None:
    """Two requests share the block in which the first is rewound; and what both leave there may be found later."""
    case = Case(2, 6, prompt=(PROMPT * 2)[:32])
    request, expected = case.request(oracle), oracle.generate(case.request(oracle))
    asleep = replace(request.steering.guards[0], threshold=1e6)
    other = replace(guarded(asleep, GREEDY, case.prompt, "other"), return_activations=True)
    alone = drive(make_engine(load_tiny()), [other])["other", 0]
    engine = make_engine(load_tiny())
    results = drive(engine, [other, request, replace(other, request_id="later")], [0, 2, 10])
    again = drive(engine, [replace(request, request_id="again")])["again", 0]
    assert_same(results["other", 0], alone)
    assert_same(results["later", 0], alone)
    for result in (results["r", 0], again):
        assert_expected(result, expected)
        assert_reads_counted(result, expected, 32)
    assert again.receipt.num_cached_tokens == 16  # the block of its last token is computed


def test_a_rewind_leaves_the_block_it_goes_back_into_to_those_who_find_it(oracle, load_tiny, make_engine) -> None:
    """The first block has become full, and can be found, when the response goes back to before its end."""
    model, prompt = load_tiny(), PROMPT[:7]

    def request(name: str, guard: Guard, given: tuple[int, ...] = prompt) -> GenerateRequest:
        return GenerateRequest(name, given, GREEDY, SteeringSpec(BASE[:1], (guard,)))

    tokens = (*prompt, *drive(make_engine(model), [request("free", ASLEEP)])["free", 0].token_ids)
    _, x = oracle.read(tokens, [0] * len(tokens), num_prompt=len(tokens))
    guard = fires_at(x, 19, GuardAction.REWIND, rewind=Rewind(9, STRONGER))
    finding = request("finding", guard, tokens[:18])
    alone = drive(make_engine(model), [finding])["finding", 0]
    engine = make_engine(model)
    rewound = drive(engine, [request("rewound", guard)])["rewound", 0]
    assert [event.position for event in rewound.guard_events][:1] == [19]
    assert rewound.receipt.num_rewound_tokens == 9
    assert rewound.token_ids[:4] == tokens[7:11]
    found = drive(engine, [finding])["finding", 0]
    assert found.receipt.num_cached_tokens == 16
    assert_same(found, alone)


def test_each_of_several_responses_is_rewound_by_itself(oracle, load_tiny, make_engine) -> None:
    case = CASES["often, then flagged"]
    request = case.request(oracle)
    request = replace(request, sampling=replace(request.sampling, n=3))
    expected = [oracle.generate(request, index) for index in range(3)]
    assert len({(one.num_rewinds, tuple(one.token_ids)) for one in expected}) == 3
    results = drive(make_engine(load_tiny()), [request])
    for index in range(3):
        assert_expected(results["r", index], expected[index])


def test_a_rewind_is_not_for_the_prompt(oracle, load_tiny, make_engine) -> None:
    x = activations_behind(oracle, guarded(ASLEEP))
    for otherwise, reason in ((GuardAction.FLAG, FinishReason.LENGTH), (GuardAction.BLOCK, FinishReason.BLOCKED)):
        request = guarded(fires_at(x, 7, GuardAction.REWIND, rewind=Rewind(3, STRONGER, 1, otherwise)))
        expected = oracle.generate(request)
        assert (expected.finish_reason, expected.events[0].action) == (reason, otherwise)
        assert_expected(drive(make_engine(load_tiny()), [request])["r", 0], expected)


def test_a_rewind_whose_edits_make_the_guard_fire_before_what_it_took_back(load_tiny, make_engine) -> None:
    """The position in front is read again under the new edits; nothing is held there that could be taken back."""
    engine = make_engine(load_tiny())
    reading = direction(Op.MONITOR, None, site=LATE, seed=3, phase=Phase.GENERATED)
    asked = request("r", "once", spec(reading), max_tokens=12, return_activations=True)
    scores = [np.frombuffer(line, np.float32)[0] for _, line in drive(engine, [asked])["r", 0].scores][4:]
    first = next(i for i in range(2, len(scores)) if scores[i] > max(scores[:i]))
    threshold = float(scores[first] + max(scores[:first])) / 2
    edits = direction(value=1000.0, site=LATE, seed=3)
    again = rewind(edits, num_tokens=1, max_retries=3, otherwise=GuardAction.FLAG)
    watcher = guard(line(LATE, 3), threshold, again, phase=Phase.GENERATED)
    result = drive(engine, [request("g", "once", spec(guards=[watcher]), max_tokens=12), request("other", "twice")])
    assert result["other", 0].error == result["g", 0].error == ""
    events = result["g", 0].guard_events
    assert [(event.action, event.position) for event in events[:2]] == [
        (GuardAction.REWIND, 4 + first),
        (GuardAction.FLAG, 3 + first),
    ]
    assert len(result["g", 0].token_ids) == 12
    assert result["g", 0].receipt.num_rewinds >= 1
