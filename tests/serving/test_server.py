"""What a user of a running server relies on: the right text, the right steering, and proof of it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from transformers import AutoModelForCausalLM

from steerserve import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    Guard,
    GuardAction,
    Intervention,
    Message,
    Op,
    Phase,
    Rewind,
    SteerserveClient,
    Unit,
)
from steerserve.config import ServerConfig
from steerserve.errors import InvalidRequestError
from steerserve.types import FinishReason

PROMPT = "The capital of France is"


def hf_greedy(model_dir: Path, token_ids: list[int], max_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    inputs = torch.tensor([token_ids])
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, do_sample=False, pad_token_id=2
    )
    return output[0, len(token_ids) :].tolist()


def feature(index: int, value: float = 1.0, **changes: object) -> Intervention:
    intervention = Intervention(FeatureTarget("tiny-sae", index), Op.CLAMP, value, Unit.MAX_ACTIVATION, always=True)
    return Intervention(**(vars(intervention) | changes))


def test_unsteered_greedy_equals_hf_generate(client, tiny, tokenizer) -> None:
    token_ids = tokenizer(PROMPT)["input_ids"]
    reply = client.generate(PROMPT, temperature=0, max_tokens=24)
    assert list(reply.token_ids) == hf_greedy(tiny.model, token_ids, 24)
    assert reply.num_prompt_tokens == len(token_ids)
    assert not reply.receipt.steered
    assert reply.receipt.interventions == ()


def test_unsteered_greedy_of_a_real_model_equals_hf_generate(start_server, smollm2_dir, tokenizer) -> None:
    config = ServerConfig(model=str(smollm2_dir), packs=(), saes=(), port=0)
    with start_server(config, max_num_seqs=2, max_model_len=256) as server, SteerserveClient(server.address) as client:
        reply = client.generate(PROMPT, temperature=0, max_tokens=16)
    expected = hf_greedy(smollm2_dir, tokenizer(PROMPT)["input_ids"], 16)
    assert list(reply.token_ids) == expected
    assert reply.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "Paris" in reply.text


@pytest.mark.parametrize("steer", [[], [feature(3)], [feature(5, op=Op.ADD, always=False)]])
def test_streaming_equals_unary(client, steer) -> None:
    options = {"steer": steer, "policies": [], "max_tokens": 12, "seed": 7, "return_activations": True}
    pieces = list(client.generate_stream(PROMPT, **options))
    reply = client.generate(PROMPT, **options)
    assert "".join(piece.text for piece in pieces) == reply.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == reply.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert [piece.receipt for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert (pieces[-1].finish_reason, pieces[-1].receipt) == (reply.finish_reason, reply.receipt)
    assert len(pieces) >= len(reply.token_ids) == 12
    assert {len(piece.token_ids) for piece in pieces[:-1]} == {1}
    streamed = [(at.position, at.scores.tolist()) for piece in pieces for at in piece.scores]
    assert streamed == [(at.position, at.scores.tolist()) for at in reply.scores]


def test_a_mistyped_keyword_does_not_drop_a_guard(client) -> None:
    with pytest.raises(InvalidRequestError, match=r"policy: .*policies"):
        client.generate("The weather is", policy=["mood"])


@pytest.mark.parametrize("form", ["text", "token ids", "messages"])
def test_every_form_of_prompt(client, tokenizer, form) -> None:
    turns = [Message("user", "Who are you?")]
    text = tokenizer.apply_chat_template([vars(turns[0])], tokenize=False, add_generation_prompt=True)
    token_ids = tokenizer(text)["input_ids"]
    prompt = {"text": text, "token ids": token_ids, "messages": turns}[form]
    reply = client.generate(prompt, temperature=0, max_tokens=4)
    assert reply.num_prompt_tokens == len(token_ids)
    assert reply.token_ids == client.generate(token_ids, temperature=0, max_tokens=4).token_ids


def test_a_feature_forces_its_token_and_the_receipt_proves_it(client, tiny, tokenizer) -> None:
    reply = client.generate(PROMPT, steer=[feature(9)], temperature=0, max_tokens=6)
    assert set(reply.token_ids) == {tiny.feature_token[9]}
    (entry,) = reply.receipt.interventions
    positions = reply.num_prompt_tokens + 5  # the last token is never fed
    assert (entry.tokens_in_scope, entry.tokens_covered, entry.tokens_edited) == (positions,) * 3
    assert reply.receipt.steered
    assert entry.source == "request"
    assert entry.site == tiny.site
    assert entry.mean_relative_edit > 1
    assert len(reply.receipt.plan_hash) == 64


def test_a_direction_forces_its_token(client, tiny) -> None:
    direction = DirectionTarget(tiny.site, tiny.unembedding[500].numpy())
    reply = client.generate(PROMPT, steer=[Intervention(direction, Op.ADD, 1000.0)], temperature=0, max_tokens=4)
    assert set(reply.token_ids) == {500}


def test_a_policy_has_the_last_word_over_the_request(client, tiny) -> None:
    reply = client.generate(PROMPT, steer=[feature(9)], policies=["mood"], temperature=0, max_tokens=4)
    assert set(reply.token_ids) == {tiny.policy_token}
    assert reply.receipt.policies == ("mood@1",)
    assert [entry.source for entry in reply.receipt.interventions] == ["request", "policy:mood@1"]
    assert list(reply.receipt.packs) == ["mood@1"]


def test_phase_generated_leaves_the_first_token_alone(client, tiny) -> None:
    unsteered = client.generate(PROMPT, temperature=0, max_tokens=1).token_ids
    reply = client.generate(PROMPT, steer=[feature(2, phase=Phase.GENERATED)], temperature=0, max_tokens=4)
    assert reply.token_ids == unsteered + (tiny.feature_token[2],) * 3
    assert reply.receipt.interventions[0].tokens_in_scope == 3


def test_monitoring_reads_scores_and_changes_nothing(client) -> None:
    plain = client.generate(PROMPT, seed=1, max_tokens=5)
    monitor = Intervention(ConceptTarget("mood"), Op.MONITOR)
    watched = client.generate(PROMPT, seed=1, max_tokens=5, steer=[monitor], return_activations=True)
    assert watched.token_ids == plain.token_ids
    assert [at.position for at in watched.scores] == list(range(watched.num_prompt_tokens + 5))
    scores = np.array([at.scores for at in watched.scores])
    assert scores.shape[1] == 1
    assert np.isfinite(scores).all()
    assert math.isclose(scores.max(), watched.receipt.interventions[0].max_activation, rel_tol=1e-6)
    assert watched.receipt.interventions[0].tokens_edited == 0


def test_concurrent_clients_each_get_their_own_steering(server, tiny) -> None:
    """More requests than slots, every one with another plan: each answer is its own feature's token."""

    def ask(index: int) -> set[int]:
        with SteerserveClient(server.address) as client:
            return set(client.generate(PROMPT, steer=[feature(index)], temperature=0, max_tokens=8).token_ids)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert answers == [{tiny.feature_token[index]} for index in range(12)]


def test_a_seed_reproduces_a_response(client) -> None:
    first, second, other = (client.generate(PROMPT, seed=seed, max_tokens=8).token_ids for seed in (3, 3, 4))
    assert first == second != other


def test_every_response_of_a_request_is_that_of_its_own_seed(client) -> None:
    options = {"max_tokens": 8, "logprobs": 1, "return_activations": True, "steer": ["mood=monitor"]}
    reply = client.generate(PROMPT, seed=7, n=3, **options)
    alone = [client.generate(PROMPT, seed=seed, **options) for seed in (7, 8, 9)]
    assert [done.index for done in reply.completions] == [0, 1, 2]
    assert [done.token_ids for done in reply.completions] == [single.token_ids for single in alone]
    assert len({single.token_ids for single in alone}) == 3
    assert (reply.text, reply.token_ids, reply.receipt) == tuple(
        getattr(reply.completions[0], name) for name in ("text", "token_ids", "receipt")
    )
    pieces = list(client.generate_stream(PROMPT, seed=7, n=3, **options))
    for index, (done, single) in enumerate(zip(reply.completions, alone, strict=True)):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == done.text == single.text
        assert tuple(token for piece in own for token in piece.token_ids) == done.token_ids
        assert own[-1].receipt == done.receipt
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [FinishReason.LENGTH]


def test_the_engine_is_given_deadline_priority_and_salt(client, server, monkeypatch) -> None:
    given, add_request = [], server.engine.add_request
    monkeypatch.setattr(server.engine, "add_request", lambda request: (given.append(request), add_request(request)))
    client.generate(PROMPT, max_tokens=1, timeout=50, priority=-3, cache_salt="mine")
    list(client.generate_stream(PROMPT, max_tokens=1, timeout=50))
    client.generate(PROMPT, max_tokens=1)
    assert [(request.priority, request.cache_salt) for request in given] == [(-3, "mine"), (0, ""), (0, "")]
    assert given[0].timeout_s == pytest.approx(50, abs=10)
    assert given[1].timeout_s == pytest.approx(50, abs=10)
    assert given[2].timeout_s is None


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_a_gate_opens_above_its_threshold(client, tiny, threshold) -> None:
    steer = [feature(9, gate=Gate(ConceptTarget("mood"), threshold))]
    reply = client.generate(PROMPT, steer=steer, temperature=0, max_tokens=6)
    edited = {entry.label: entry.tokens_edited for entry in reply.receipt.interventions}
    if threshold < 0:
        assert set(reply.token_ids) == {tiny.feature_token[9]}
        assert max(edited.values()) == reply.num_prompt_tokens + 5
    else:
        assert reply.token_ids == client.generate(PROMPT, temperature=0, max_tokens=6).token_ids
        assert set(edited.values()) == {0}


def towards_feature(tiny, index: int, **changes: object) -> Guard:
    """A guard that fires where feature ``index`` was clamped."""
    target = DirectionTarget(tiny.site, tiny.unembedding[tiny.feature_token[index]].numpy())
    return Guard(**({"target": target, "threshold": 500.0, "action": GuardAction.BLOCK} | changes))


def test_a_guard_that_flags_changes_nothing_else(client, tiny) -> None:
    options = {"steer": [feature(9, phase=Phase.GENERATED)], "temperature": 0, "max_tokens": 4}
    reply = client.generate(PROMPT, guards=[towards_feature(tiny, 9, action=GuardAction.FLAG)], **options)
    assert reply.token_ids == client.generate(PROMPT, **options).token_ids
    assert reply.finish_reason is FinishReason.LENGTH
    positions = [event.position for event in reply.guard_events]
    # The last token is read too before it is released.
    assert positions == list(range(reply.num_prompt_tokens, reply.num_prompt_tokens + 4))
    assert {(event.guard, event.action) for event in reply.guard_events} == {(0, GuardAction.FLAG)}
    assert all(event.score > 500 for event in reply.guard_events)


def test_a_guard_that_blocks_ends_the_response_before_what_it_fired_on(client, tiny) -> None:
    guards = [towards_feature(tiny, 3), towards_feature(tiny, 9)]
    steer = [feature(9, phase=Phase.GENERATED)]
    options = {"steer": steer, "guards": guards, "temperature": 0, "max_tokens": 4}
    reply = client.generate(PROMPT, **options)
    assert (reply.text, reply.token_ids, reply.finish_reason) == ("", (), FinishReason.BLOCKED)
    ((guard, action, position),) = [(event.guard, event.action, event.position) for event in reply.guard_events]
    assert (guard, action, position) == (1, GuardAction.BLOCK, reply.num_prompt_tokens)
    pieces = list(client.generate_stream(PROMPT, **options))
    assert [piece.token_ids for piece in pieces if piece.token_ids] == []
    assert (pieces[-1].finish_reason, pieces[-1].guard_events) == (FinishReason.BLOCKED, reply.guard_events)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_rewind_is_never_seen_and_the_receipt_counts_it(client, tiny, num_tokens) -> None:
    """The guard fires on the first generated token; what follows is as if the stronger edit had been asked for.

    The site is the last one: edits at earlier positions, which the rewind leaves alone, do not reach later ones.
    """
    calm = feature(9, value=0.0)
    guard = towards_feature(tiny, 9, action=GuardAction.REWIND, rewind=Rewind(num_tokens, (calm,)))
    options = {"temperature": 0, "max_tokens": 6, "logprobs": 2}
    expected = client.generate(PROMPT, steer=[calm], **options)
    steer = [feature(9, phase=Phase.GENERATED)]
    reply = client.generate(PROMPT, steer=steer, guards=[guard], **options)
    assert (reply.token_ids, reply.text) == (expected.token_ids, expected.text)
    assert reply.token_ids != client.generate(PROMPT, steer=steer, **options).token_ids
    assert reply.logprobs == expected.logprobs
    ((action, position),) = [(event.action, event.position) for event in reply.guard_events]
    assert (action, position) == (GuardAction.REWIND, reply.num_prompt_tokens)
    assert (reply.receipt.num_rewinds, reply.receipt.num_rewound_tokens) == (1, 1)  # the prompt is never taken back
    pieces = list(client.generate_stream(PROMPT, steer=steer, guards=[guard], **options))
    assert tuple(token for piece in pieces for token in piece.token_ids) == expected.token_ids
    assert "".join(piece.text for piece in pieces) == expected.text


def test_finish_reasons(client, tiny) -> None:
    assert client.generate(PROMPT, max_tokens=2, seed=0).finish_reason is FinishReason.LENGTH
    towards_eos = Intervention(DirectionTarget(tiny.site, tiny.unembedding[2].numpy()), Op.ADD, 1000.0)
    stopped = client.generate(PROMPT, steer=[towards_eos], temperature=0, max_tokens=5)
    assert (stopped.finish_reason, stopped.token_ids) == (FinishReason.STOP, (2,))
    ignored = client.generate(PROMPT, steer=[towards_eos], temperature=0, max_tokens=5, ignore_eos=True)
    assert (ignored.finish_reason, ignored.token_ids) == (FinishReason.LENGTH, (2,) * 5)


def test_a_stop_string_is_never_streamed(client) -> None:
    free = client.generate(PROMPT, seed=5, max_tokens=24, ignore_eos=True)
    first_word = len(client.generate(PROMPT, seed=5, max_tokens=1, ignore_eos=True).text)
    stop = free.text[first_word - 1 : first_word + 2]  # from one token into the next
    options = {"seed": 5, "max_tokens": 24, "ignore_eos": True, "stop": ["no such text", stop]}
    reply = client.generate(PROMPT, **options)
    pieces = list(client.generate_stream(PROMPT, **options))
    assert reply.text == "".join(piece.text for piece in pieces) == free.text[: free.text.find(stop)]
    assert (reply.finish_reason, reply.stop_reason) == (FinishReason.STOP, stop)
    assert [piece.stop_reason for piece in pieces] == [None] * (len(pieces) - 1) + [stop]
    assert 1 < len(reply.token_ids) < 24
    assert reply.token_ids == free.token_ids[: len(reply.token_ids)]
    shown = client.generate(PROMPT, **(options | {"stop": stop}), include_stop_str_in_output=True)
    assert shown.text == reply.text + stop


def test_a_stop_token_is_named(client, tiny) -> None:
    token = tiny.feature_token[3]
    reply = client.generate(PROMPT, steer=[feature(3)], temperature=0, max_tokens=5, stop_token_ids=[7, token])
    assert (reply.token_ids, reply.text) == ((token,), "")
    assert (reply.finish_reason, reply.stop_reason) == (FinishReason.STOP, token)


def test_logprobs_come_with_every_token_streamed_or_not(client, tiny, tokenizer) -> None:
    token_ids = tokenizer(PROMPT)["input_ids"]
    options = {"seed": 2, "max_tokens": 8, "ignore_eos": True, "temperature": 0.7, "logprobs": 3}
    reply = client.generate(PROMPT, **options)
    streamed = list(client.generate_stream(PROMPT, **options))
    assert tuple(entry for piece in streamed for entry in piece.logprobs) == reply.logprobs
    assert [len(piece.logprobs) for piece in streamed] == [1] * 8
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[*token_ids, *reply.token_ids]])).logits[0, len(token_ids) - 1 : -1]
    expected = logits.double().log_softmax(dim=-1).numpy()
    for entry, row, token in zip(reply.logprobs, expected, reply.token_ids, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        assert [value for _, value in entry.top] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-3)
    assert client.generate(PROMPT, max_tokens=1).logprobs == ()


def test_bias_and_penalties_reach_the_draw(client) -> None:
    """A steered model gives the same two tokens everywhere; a bias takes the second to just below the first."""
    options = {"steer": [feature(3)], "temperature": 0, "max_tokens": 4}
    (first, best), (second, next_best) = client.generate(PROMPT, **options, logprobs=2).logprobs[0].top
    options["logit_bias"] = {second: best - next_best - 0.5}
    assert set(client.generate(PROMPT, **options).token_ids) == {first}
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.5}):
        assert set(client.generate(PROMPT, **options, **penalty).token_ids) == {first, second}
    greedy = client.generate(PROMPT, temperature=0, max_tokens=6).token_ids
    assert client.generate(PROMPT, seed=1, min_p=1.0, max_tokens=6).token_ids == greedy


def test_model_info_names_what_requests_can_name(client, tiny, server) -> None:
    info = client.get_model_info()
    assert (info.model_name, info.d_model, info.n_layers, info.max_model_len) == ("tiny-llama", 64, 3, 1 << 15)
    assert info.model_fingerprint == client.generate(PROMPT, max_tokens=1).receipt.model_fingerprint
    assert str(tiny.site) in info.sites
    assert [(sae.name, sae.site, sae.d_sae, len(sae.sha256)) for sae in info.saes] == [
        ("tiny-sae", str(tiny.site), 32, 64)
    ]
    (concept,) = info.concepts
    assert (concept.name, concept.version, concept.num_features) == ("mood", "1", 1)
    assert concept.evaluation_json == '{"rate": 0.5}'
    assert list(info.policies) == ["mood@1"]


def test_reflection_describes_the_service(server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="steerserve.v1.GenerationService"),
        ]
        listed, described = stub.ServerReflectionInfo(iter(requests))
    assert {service.name for service in listed.list_services_response.service} == {
        "steerserve.v1.GenerationService",
        "steerserve.v1.PolicyService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert [method.name for method in file.service[0].method] == [
        "Generate",
        "GenerateStream",
        "Score",
        "GetServerInfo",
        "GetModelInfo",
    ]
