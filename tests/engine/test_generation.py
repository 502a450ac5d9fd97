"""Unsteered greedy output is what Hugging Face ``generate`` gives, alone or in a changing batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerserve.models.families import FAMILIES
from steerserve.models.loading import LoadedModel, load_model
from steerserve.types import FinishReason, GenerateRequest, Message, SamplingParams

PROMPTS = [
    "Once upon a time, there was a",
    "Q: What is the capital of France?\nA:",
    "def fibonacci(n):\n    ",
    "The three laws of motion are as follows. First, an object at rest",
    "x",
]
LENGTHS = [14, 3, 22, 9, 17]
ARRIVALS = [0, 0, 2, 3, 9]


def hf_generate(model: LoadedModel, token_ids: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([token_ids])
    output = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0
    )
    return output[0, len(token_ids) :].tolist()


def greedy_requests(lengths: list[int]) -> list[GenerateRequest]:
    return [
        GenerateRequest(f"r{i}", prompt, SamplingParams(max_tokens=length, temperature=0))
        for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]


def assert_equals_hf(model: LoadedModel, lengths: list[int], responses: dict) -> None:
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        expected = hf_generate(model, model.tokenizer(prompt)["input_ids"], length)
        response = responses[f"r{i}"]
        assert response.token_ids == expected
        assert response.text == model.tokenizer.decode(expected, skip_special_tokens=True)
        ended = FinishReason.STOP if expected[-1] in model.eos_token_ids else FinishReason.LENGTH
        assert response.finish_reason is ended
        assert len({output.num_prompt_tokens for output in response.outputs}) == 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_equals_generate_in_a_changing_batch(family, load_tiny, make_engine, run) -> None:
    model = load_tiny(family)
    engine = make_engine(model, max_num_seqs=3)
    responses = run(engine, greedy_requests(LENGTHS), ARRIVALS)
    assert_equals_hf(model, LENGTHS, responses)
    assert len({token for response in responses.values() for token in response.token_ids}) > 10


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_equals_generate_alone(family, load_tiny, make_engine, run) -> None:
    model = load_tiny(family)
    engine = make_engine(model, max_num_seqs=1)
    assert_equals_hf(model, LENGTHS, run(engine, greedy_requests(LENGTHS)))


def test_greedy_equals_generate_on_real_weights(smollm2_dir: Path, make_engine, run) -> None:
    model = load_model(str(smollm2_dir), torch.float32)
    lengths = [8, 4, 10, 6, 8]
    responses = run(make_engine(model), greedy_requests(lengths), [0, 0, 1, 2, 4])
    assert_equals_hf(model, lengths, responses)


def test_messages_are_rendered_through_the_chat_template(smollm2_dir: Path, make_engine, run) -> None:
    model = load_model(str(smollm2_dir), torch.float32)
    messages = (Message("user", "Say yes."),)
    greedy = SamplingParams(max_tokens=3, temperature=0)
    responses = run(make_engine(model), [GenerateRequest("chat", messages, greedy)])
    turns = [{"role": "user", "content": "Say yes."}]
    rendered = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert responses["chat"].token_ids == hf_generate(model, rendered, 3)


def test_end_of_sequence_stops_unless_ignored(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    prompt = tuple(model.tokenizer("abc")["input_ids"])
    with torch.no_grad():
        model.model.lm_head.weight[256] = 1000 * model.model.lm_head.weight[:256].abs().sum(0)  # mostly the largest
    free = run(
        make_engine(model),
        [GenerateRequest("r", prompt, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))],
    )["r"]
    assert len(free.token_ids) == 30
    assert free.finish_reason is FinishReason.LENGTH
    first_eos = free.token_ids.index(256)
    stopped = run(make_engine(model), [GenerateRequest("r", prompt, SamplingParams(max_tokens=30, temperature=0))])["r"]
    assert stopped.token_ids == free.token_ids[: first_eos + 1]
    assert stopped.finish_reason is FinishReason.STOP
    assert "eos" not in stopped.text


def test_a_seed_reproduces_a_response_whatever_runs_beside_it(load_tiny, make_engine, run) -> None:
    model = load_tiny()
    sampling = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, top_k=50, seed=7, ignore_eos=True)
    alone = run(make_engine(model), [GenerateRequest("r", "hello", sampling)])["r"]
    others = [GenerateRequest(f"o{i}", "world", SamplingParams(max_tokens=9, seed=i)) for i in range(5)]
    crowded = run(make_engine(model), [*others, GenerateRequest("r", "hello", sampling)])["r"]
    assert crowded.token_ids == alone.token_ids
    unseeded = SamplingParams(max_tokens=20, ignore_eos=True)
    twice = run(make_engine(model), [GenerateRequest(name, "hello", unseeded) for name in "ab"])
    assert twice["a"].token_ids != twice["b"].token_ids
