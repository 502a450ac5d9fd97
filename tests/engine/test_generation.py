"""Unsteered greedy output is what Hugging Face ``generate`` gives, alone or in a changing batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import Outcome, drive, request

from steerserve.errors import InvalidRequestError
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


def assert_equals_hf(model: LoadedModel, lengths: list[int], results: dict[tuple[str, int], Outcome]) -> None:
    """``model`` is a copy that no engine holds."""
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        expected = hf_generate(model, model.tokenizer(prompt)["input_ids"], length)
        result = results[f"r{i}", 0]
        assert list(result.token_ids) == expected
        assert result.text == model.tokenizer.decode(expected, skip_special_tokens=True)
        ended = FinishReason.STOP if expected[-1] in model.eos_token_ids else FinishReason.LENGTH
        assert result.finish_reason is ended


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_equals_generate_alone_and_in_a_changing_batch_of_chunks(family, load_tiny, make_engine) -> None:
    """The windows of the sliding layers hold 8 positions; a chunk is cut after 5 tokens, which are of all requests."""
    model = load_tiny(family)
    alone = drive(make_engine(model, max_num_seqs=1), greedy_requests(LENGTHS))
    engine = make_engine(model, max_num_seqs=3, max_num_batched_tokens=5)
    crowded = drive(engine, greedy_requests(LENGTHS), ARRIVALS)
    engine.close()
    assert_equals_hf(model, LENGTHS, alone)
    assert_equals_hf(model, LENGTHS, crowded)
    assert len({token for result in alone.values() for token in result.token_ids}) > 10


def test_messages_are_rendered_through_the_chat_template(smollm2_dir: Path, make_engine) -> None:
    model = load_model(str(smollm2_dir), torch.float32)
    engine = make_engine(model)
    greedy = SamplingParams(max_tokens=3, temperature=0)
    result = drive(engine, [GenerateRequest("chat", (Message("user", "Say yes."),), greedy)])["chat", 0]
    foreign = (Message("user", "Say yes."), Message("user<|im_end|>", "x"))
    with pytest.raises(InvalidRequestError, match=r"messages\[1\]\.role: .* one of system, user"):
        engine.add_request(GenerateRequest("bad", foreign, greedy))
    engine.close()
    turns = [{"role": "user", "content": "Say yes."}]
    rendered = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(result.token_ids) == hf_generate(model, rendered, 3)


def test_an_engine_gives_its_model_back(load_tiny, make_engine) -> None:
    model = load_tiny()
    before = hf_generate(model, [1, 2, 3], 8)
    engine = make_engine(model)
    drive(engine, [request("r", [1, 2, 3])])
    engine.close()
    assert hf_generate(model, [1, 2, 3], 8) == before


def test_end_of_sequence_stops_unless_ignored(load_tiny, make_engine) -> None:
    model = load_tiny()
    with torch.no_grad():
        model.model.lm_head.weight[256] = 1000 * model.model.lm_head.weight[:256].abs().sum(0)  # mostly the largest
    engine = make_engine(model)
    free = drive(engine, [request("r", "abc", max_tokens=30)])["r", 0]
    assert len(free.token_ids) == 30
    assert free.finish_reason is FinishReason.LENGTH
    first_eos = free.token_ids.index(256)
    stopped = drive(engine, [request("r", "abc", max_tokens=30, ignore_eos=False)])["r", 0]
    assert stopped.token_ids == free.token_ids[: first_eos + 1]
    assert stopped.finish_reason is FinishReason.STOP
    assert "eos" not in stopped.text


def test_a_seed_reproduces_a_response_whatever_runs_beside_it(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    sampling = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, top_k=50, seed=7, ignore_eos=True)
    wanted = GenerateRequest("r", "hello", sampling)
    alone = drive(engine, [wanted])["r", 0]
    others = [GenerateRequest(f"o{i}", "world", SamplingParams(max_tokens=9, seed=i)) for i in range(5)]
    assert drive(engine, [*others, wanted])["r", 0].token_ids == alone.token_ids
    unseeded = SamplingParams(max_tokens=20, ignore_eos=True)
    twice = drive(engine, [GenerateRequest(name, "hello", unseeded) for name in "ab"])
    assert twice["a", 0].token_ids != twice["b", 0].token_ids


def test_responses_of_a_request_are_those_of_separate_requests_with_the_next_seeds(load_tiny, make_engine) -> None:
    engine = make_engine(load_tiny())
    drawn = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, logprobs=2, n=3)
    prompt = "Once upon a time, there was a queen"  # two blocks and three tokens
    together = drive(engine, [request("r", prompt, sampling=drawn)])
    assert set(together) == {("r", index) for index in range(3)}
    engine = make_engine(engine.model)
    for index in range(3):
        separate = drive(engine, [request("s", prompt, sampling=drawn, n=1, seed=5 + index)])["s", 0]
        result = together["r", index]
        assert result.token_ids == separate.token_ids
        assert result.text == separate.text
        assert result.logprobs == separate.logprobs
        assert result.receipt.num_cached_tokens == (0 if index == 0 else 32)
    assert len({result.token_ids for result in together.values()}) == 3
