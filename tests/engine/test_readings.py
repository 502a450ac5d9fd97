"""A text that is only read: the scores of a generation's guard, from the layers up to it and no others."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import LATE, assert_same, drive, feature, guard, line, monitor, request, spec
from test_monitors import plan_of
from test_steering import activations, feature_rows

from steerserve.errors import DetectorError, InvalidRequestError
from steerserve.models.families import FAMILIES
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import FinishReason, FloatArray, GenerateRequest, GuardEvent, Op, SamplingParams, Site, Stream

SITE = Site(1, Stream.RESID_POST)  # of the tiny SAE
EVERY_SCORE = -1e38
TEXT = "A text of some length that nobody here wrote, and that nobody goes on with."
NOTHING = SamplingParams(max_tokens=0)


def reading(name: str, text: str | tuple[int, ...] = TEXT, *targets: object, **rest: object) -> GenerateRequest:
    """Reports the score of every target at every token."""
    guards = [guard(target, EVERY_SCORE) for target in targets or (3,)]
    return request(name, text, spec(guards=guards), sampling=NOTHING, **rest)


def scores(events: tuple[GuardEvent, ...], num_tokens: int = len(TEXT)) -> FloatArray:
    """``[targets, tokens]``; asserts that none is missing."""
    by_place = {(event.guard, event.position): event.score for event in events if event.position < num_tokens}
    num_targets = 1 + max(place for place, _ in by_place)
    return np.array([[by_place[target, at] for at in range(num_tokens)] for target in range(num_targets)], np.float32)


@contextmanager
def counting_calls(model: LoadedModel) -> Iterator[Counter[str]]:
    """How often each layer, the norm behind them and the unembedding were called."""
    calls: Counter[str] = Counter()
    adapter = model.adapter
    modules = {str(index): layer for index, layer in enumerate(adapter.layers(model.model))}
    modules |= {"norm": model.model.get_submodule(adapter.final_norm), "logits": model.model.get_output_embeddings()}
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_those_of_a_generation_and_of_transformers(family, load_tiny, make_engine) -> None:
    model = load_tiny(family)
    tokens = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    seen: list[torch.Tensor] = []
    exact = replace(model, model=copy.deepcopy(model.model).double())
    with transformed(exact, {SITE: lambda x: seen.append(x) or x}), torch.inference_mode():
        exact.model(tokens, use_cache=False)
    engine = make_engine(model, enable_prefix_caching=False)
    read = drive(engine, [reading("r")])["r", 0]
    asked = reading("g")
    generated = drive(engine, [replace(asked, sampling=replace(NOTHING, max_tokens=2))])["g", 0]
    assert (read.token_ids, read.text, read.finish_reason, read.error) == ((), "", FinishReason.LENGTH, "")
    assert np.array_equal(scores(read.guard_events), scores(generated.guard_events))
    expected = activations(seen[0][0].numpy(), feature_rows(engine.catalog, [3]))[:, 0]
    np.testing.assert_allclose(scores(read.guard_events)[0], expected, rtol=1e-4, atol=1e-4)
    (line_of_receipt,) = read.receipt.interventions
    assert line_of_receipt.tokens_in_scope == line_of_receipt.tokens_covered == len(TEXT)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_behind_the_last_that_is_read_do_not_run(family, load_tiny, make_engine) -> None:
    model = load_tiny(family)
    engine = make_engine(model)
    with counting_calls(model) as calls:
        drive(engine, [reading("a", "one"), reading("b", "two")])
        assert calls == {"0": 1, "1": 1}  # together
        drive(engine, [reading("early", TEXT, line(Site(0, Stream.RESID_POST)))])
        assert calls == {"0": 2, "1": 1}


def test_readings_of_several_depths_beside_generations(load_tiny, make_engine) -> None:
    """Each comes to what it comes to alone, and no generation takes a step more."""
    engine = make_engine(load_tiny(), enable_prefix_caching=False, max_num_batched_tokens=48)
    readings = [reading("shallow"), reading("deep", TEXT[::-1], 4, line(LATE)), reading("short", "x", line())]
    generations = [request("g", TEXT, spec(feature(3, Op.ADD, 2.0)), max_tokens=8), request("h", "yes", max_tokens=9)]
    everything = [*readings, *generations]
    alone = {key: each for one in everything for key, each in drive(engine, [one]).items()}
    mixed = (drive(engine, everything, arrivals=[3, 0, 4, 0, 1]), drive(engine, readings))
    beside_a_prompt = drive(engine, [readings[2], generations[0]])  # whose first chunk draws nothing
    for results in (*mixed, beside_a_prompt):
        for key, result in results.items():
            assert_same(result, alone[key])
    engine.add_request(request("only", "yes", max_tokens=9))
    engine.step()
    engine.add_request(reading("beside"))
    steps = 0
    while "only" in engine._unfinished:
        engine.step()
        steps += 1
    assert steps == 8
    drive(engine)


def test_what_a_reading_left_in_the_cache_serves_readings_of_its_depth_alone(load_tiny, make_engine) -> None:
    model = load_tiny()
    engine = make_engine(model)
    first = drive(engine, [reading("first")])["first", 0]
    again = drive(engine, [reading("again")])["again", 0]
    assert first.receipt.num_cached_tokens == 0
    assert again.receipt.num_cached_tokens >= len(TEXT) // 2
    assert_same(again, first)
    watching = spec(guards=[guard(3, EVERY_SCORE)])
    after = drive(engine, [request("g", TEXT, watching)])["g", 0]
    assert after.receipt.num_cached_tokens == 0
    deeper = drive(engine, [reading("deeper", TEXT, 3, line(LATE))])["deeper", 0]
    fresh = make_engine(model)
    assert_same(after, drive(fresh, [request("g", TEXT, watching)])["g", 0])
    assert_same(deeper, drive(fresh, [reading("deeper", TEXT, 3, line(LATE))])["deeper", 0])


def test_a_text_is_read_to_its_end_in_as_many_steps_as_it_takes(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_num_batched_tokens=16, enable_prefix_caching=False)
    engine.add_request(reading("r"))
    outputs = [engine.step() for _ in range(-(-len(TEXT) // 16))]
    assert outputs[:-1] == [[]] * (len(outputs) - 1)
    assert len(scores(outputs[-1][0].guard_events)[0]) == len(TEXT)
    edited = drive(engine, [request("e", TEXT, spec(feature(4), monitor(3)), sampling=NOTHING)])["e", 0]
    assert [each.tokens_covered for each in edited.receipt.interventions] == [len(TEXT)] * 2


def test_a_text_may_fill_the_context(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny(), max_model_len=32)
    whole = drive(engine, [reading("r", tuple(range(32)))])["r", 0]
    assert scores(whole.guard_events, 32).shape == (1, 32)
    with pytest.raises(InvalidRequestError, match=r"33 tokens', expected at most 32 tokens \(max_model_len 32\)"):
        engine.add_request(reading("r", tuple(range(33))))


def test_the_servers_monitors_do_not_read_it(load_tiny, make_engine) -> None:
    model = load_tiny()
    engine = make_engine(model, monitor_plan=plan_of(model))
    assert drive(engine, [request("g")])["g", 0].receipt.monitors != ()
    read = drive(engine, [reading("r", TEXT, line(Site(0, Stream.RESID_POST)))])["r", 0]
    assert read.receipt.monitors == ()
    assert drive(engine, [request("nothing", sampling=NOTHING)])["nothing", 0].receipt.monitors == ()


def test_a_detector_that_did_not_run_is_not_silence(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    engine._runner.splicer.install()
    engine._runner.splicer.remove()
    engine.add_request(reading("r"))
    (last,) = engine.step()
    assert isinstance(last.error, DetectorError)
    assert last.receipt.interventions[0].tokens_covered == 0
