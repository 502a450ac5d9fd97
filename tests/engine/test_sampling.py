"""Sampling options of a running engine: penalties as Hugging Face applies them, stops, log-probabilities, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.errors import InvalidRequestError
from steerserve.models.loading import LoadedModel
from steerserve.types import FinishReason, GenerateRequest, SamplingParams

PROMPTS = ["Once upon a time", "abcabcabc", "The", "x = x + "]
ARRIVALS = [0, 0, 2, 5]
LETTERS = {token_id: -100.0 for token_id in range(260) if not ord("A") <= token_id + 33 <= ord("z")}
"""A bias that leaves the byte tokenizer characters of one byte: its token n is the character n + 33 up to "~"."""


@pytest.fixture
def model(load_tiny) -> LoadedModel:
    return load_tiny()


def letters(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 24, "seed": 11, "ignore_eos": True, "logit_bias": LETTERS} | changes))


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.4}, {"logit_bias": {65: 4.0, 70: -9.0}}], ids=str)
def test_edited_greedy_equals_generate_in_a_changing_batch(options, model, load_tiny, make_engine, run) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, **options)
    requests = [GenerateRequest(prompt, prompt, params) for prompt in PROMPTS]
    plain = GenerateRequest("plain", PROMPTS[0], SamplingParams(max_tokens=20, temperature=0))
    responses = run(make_engine(model, max_num_seqs=3), [*requests, plain], [*ARRIVALS, 0])
    bias = {"sequence_bias": [[[token_id], value] for token_id, value in options.get("logit_bias", {}).items()]}
    hf_options = bias if bias["sequence_bias"] else options
    untouched = load_tiny()
    for prompt in PROMPTS:
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        output = untouched.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0, **hf_options
        )
        assert responses[prompt].token_ids == output[0, ids.shape[1] :].tolist()
    assert responses["plain"].token_ids != responses[PROMPTS[0]].token_ids


def test_presence_and_frequency_penalties_forbid_and_favour_what_was_generated(model, make_engine, run) -> None:
    """Two tokens that the bias puts far above all others, a hair apart: the penalties decide between them."""
    bias = {65: 100.0, 66: 99.0}
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logit_bias=bias)
    with torch.no_grad():
        model.model.lm_head.weight[66] = model.model.lm_head.weight[65]
    variants = {
        "none": params,
        "presence": replace(params, presence_penalty=2.0),
        "frequency": replace(params, frequency_penalty=2.0),
        "favoured": replace(params, presence_penalty=-2.0),
    }
    # The prompt is full of the first token: these two penalties do not count it.
    responses = run(make_engine(model), [GenerateRequest(name, (65,) * 9, value) for name, value in variants.items()])
    assert responses["none"].token_ids == [65] * 6
    assert responses["presence"].token_ids == [65, 66] + [65] * 4
    assert responses["frequency"].token_ids == [65, 66] * 3
    assert responses["favoured"].token_ids == [65] * 6


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("begin", [1, 5, 17])
def test_a_stop_string_ends_the_response_and_is_not_shown(begin, include, model, make_engine, run) -> None:
    engine = make_engine(model)
    free = run(engine, [GenerateRequest("free", "hello", letters())])["free"]
    stop = free.text[begin : begin + 3]
    at = free.text.find(stop)
    params = letters(stop=("never", stop), include_stop_str_in_output=include)
    stopped = run(engine, [GenerateRequest("r", "hello", params)])["r"]
    assert stopped.text == free.text[: at + 3 if include else at]
    assert stopped.token_ids == free.token_ids[: at + 3]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.outputs[-1].stop_reason == stop
    assert {output.stop_reason for output in stopped.outputs[:-1]} <= {None}


def test_held_back_text_comes_with_the_last_token(model, make_engine, run) -> None:
    engine = make_engine(model)
    free = run(engine, [GenerateRequest("free", "hello", letters())])["free"]
    params = letters(stop=(free.text[-3:] + "!",))
    limited = run(engine, [GenerateRequest("r", "hello", params)])["r"]
    assert (limited.text, limited.finish_reason) == (free.text, FinishReason.LENGTH)
    assert limited.outputs[-1].text.endswith(free.text[-3:])
    assert limited.outputs[-1].stop_reason is None


def test_a_stop_string_may_be_completed_by_the_end_itself(model, make_engine, run) -> None:
    """Bytes that make no character become U+FFFD only when no token follows."""
    (first_of_four_bytes, *_) = model.tokenizer("🙂")["input_ids"]
    params = letters(max_tokens=2, logit_bias={first_of_four_bytes: 100.0}, stop=("\ufffd",))
    response = run(make_engine(model), [GenerateRequest("r", "hello", params)])["r"]
    assert (response.token_ids, response.text) == ([first_of_four_bytes] * 2, "")
    assert (response.finish_reason, response.outputs[-1].stop_reason) == (FinishReason.STOP, "\ufffd")


def test_an_aborted_response_keeps_what_was_held_back(model, make_engine, run) -> None:
    engine = make_engine(model)
    free = run(engine, [GenerateRequest("free", "hello", letters())])["free"]
    engine.add_request(GenerateRequest("r", "hello", letters(stop=(free.text[:5],))))
    shown = [output.text for _ in range(3) for output in engine.step()]
    engine.abort("r")
    (last,) = engine.step()
    assert (shown, last.text) == (["", "", ""], free.text[:3])
    assert (last.finish_reason, last.stop_reason) == (FinishReason.ABORT, None)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_the_response(include, model, make_engine, run) -> None:
    engine = make_engine(model)
    free = run(engine, [GenerateRequest("free", "hello", letters())])["free"]
    stop_token = free.token_ids[6]
    at = free.token_ids.index(stop_token)
    params = letters(stop_token_ids=(0, stop_token), include_stop_str_in_output=include)
    stopped = run(engine, [GenerateRequest("r", "hello", params)])["r"]
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert stopped.text == free.text[: at + include]
    assert (stopped.finish_reason, stopped.outputs[-1].stop_reason) == (FinishReason.STOP, stop_token)


def test_the_models_own_end_names_no_stop(model, make_engine, run) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, logit_bias={256: 100.0}, stop=("x",), stop_token_ids=(256,))
    response = run(make_engine(model), [GenerateRequest("r", "hello", params)])["r"]
    assert (response.token_ids, response.text) == ([256], "")
    assert (response.finish_reason, response.outputs[-1].stop_reason) == (FinishReason.STOP, None)
    ignored = run(make_engine(model), [GenerateRequest("r", "hello", replace(params, ignore_eos=True))])["r"]
    assert (ignored.token_ids, ignored.outputs[-1].stop_reason) == ([256], 256)


def test_logprobs_are_those_of_the_model(model, load_tiny, make_engine, run) -> None:
    """Whatever the parameters do to the draw: log-softmax in float64 of a forward pass of Hugging Face's model."""
    params = SamplingParams(
        max_tokens=12, seed=3, temperature=1.5, top_k=40, presence_penalty=1.0, ignore_eos=True, logprobs=4
    )
    prompt = tuple(model.tokenizer("hello")["input_ids"])
    neighbour = GenerateRequest("n", "world", SamplingParams(max_tokens=12, seed=0, ignore_eos=True))
    response = run(make_engine(model), [neighbour, GenerateRequest("r", prompt, params)])["r"]
    entries = [entry for output in response.outputs for entry in output.logprobs]
    with torch.inference_mode():
        logits = load_tiny().model(torch.tensor([[*prompt, *response.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(dim=-1).numpy()
    assert len(entries) == 12
    for entry, row, token in zip(entries, expected, response.token_ids, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)
        assert [row[token_id] for token_id, _ in entry.top] == pytest.approx([v for _, v in entry.top], abs=1e-4)
        assert entry.rank == 1 + (row > row[token]).sum()


def test_a_seed_reproduces_a_response_whatever_else_runs(model, make_engine, run) -> None:
    params = [
        letters(min_p=0.02, repetition_penalty=1.2, logprobs=2),
        letters(frequency_penalty=0.7, top_p=0.9, seed=5),
        letters(presence_penalty=-1.0, stop=("Q", "ab"), seed=6, logprobs=0),
    ]
    requests = [GenerateRequest(f"r{i}", PROMPTS[i], row) for i, row in enumerate(params)]
    alone = [run(make_engine(model), [request])[request.request_id] for request in requests]
    others = [GenerateRequest(f"o{i}", "zz", SamplingParams(max_tokens=5, seed=i)) for i in range(4)]
    crowd = run(make_engine(model), [*others, *requests], [0, 0, 1, 1, 0, 2, 4])
    for request, single in zip(requests, alone, strict=True):
        crowded = crowd[request.request_id]
        assert (crowded.token_ids, crowded.text) == (single.token_ids, single.text)
        assert crowded.outputs[-1].stop_reason == single.outputs[-1].stop_reason
    assert len({tuple(response.token_ids) for response in alone}) == 3


def test_every_response_of_a_request_is_that_of_its_own_seed(model, make_engine, run) -> None:
    """Each with its own penalties, stop and end, in a batch that holds only two of them at a time."""
    params = letters(frequency_penalty=0.7, stop=("Q", "ab"), logprobs=1)
    outputs = run(make_engine(model, max_num_seqs=2), [GenerateRequest("r", "hello", replace(params, n=3))])[
        "r"
    ].outputs
    singles = [GenerateRequest(f"s{i}", "hello", replace(params, seed=params.seed + i)) for i in range(3)]
    alone = run(make_engine(model), singles)
    for index, single in enumerate(alone.values()):
        own = [output for output in outputs if output.index == index]
        assert [token for output in own for token in output.token_ids] == single.token_ids
        assert "".join(output.text for output in own) == single.text
        assert [entry for output in own for entry in output.logprobs] == [
            entry for output in single.outputs for entry in output.logprobs
        ]
        assert own[-1].stop_reason == single.outputs[-1].stop_reason
        assert [output.finish_reason for output in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason is single.finish_reason
    assert len({tuple(single.token_ids) for single in alone.values()}) == 3


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"logit_bias": {1: 2.0, 7: -101.0}}, "logit_bias[7]"),
        ({"stop": ("a", "")}, "stop[1]"),
        ({"stop": ("a" * 1025,)}, "stop[0]"),
        ({"stop": ("a",) * 65}, "stop"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_parameters_out_of_range_are_refused_by_field(options, field) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**options)
    assert caught.value.field == f"sampling.{field}"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop_token_ids": (3, 260)}, "sampling.stop_token_ids[1]"),
        ({"stop_token_ids": (-1,)}, "sampling.stop_token_ids[0]"),
        ({"logit_bias": {3: 1.0, 260: 1.0}}, "sampling.logit_bias[260]"),
    ],
)
def test_tokens_that_the_model_lacks_are_refused_by_field(options, field, model, make_engine) -> None:
    engine = make_engine(model)
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request(GenerateRequest("r", "x", SamplingParams(max_tokens=2, **options)))
    assert (caught.value.field, caught.value.expected) == (field, "a token id from 0 to 259")
    assert not engine.has_unfinished()
