"""Flat batches give what transformers gives, and not a bit of a token depends on who shares its pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from runner_cases import (
    ONE_PER_FAMILY,
    VARIANTS,
    feed,
    give_blocks,
    random_model,
    random_sequences,
    reference_logits,
    small_config,
)

from steerserve.engine.runner import ModelRunner
from steerserve.errors import IncompatibleError
from steerserve.models.families import FAMILIES
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

MakeRunner = Callable[..., ModelRunner]


@pytest.fixture
def make_runner() -> Iterator[MakeRunner]:
    """Runners with small sizes."""
    runners: list[ModelRunner] = []

    def make(model: LoadedModel, sites: Sequence[Site] = ()) -> ModelRunner:
        runners.append(ModelRunner(model, small_config(), sites))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_batches_of_chunks_give_the_logits_of_transformers(variant, make_runner) -> None:
    model = random_model(variant)
    sequences = random_sequences()
    expected = [reference_logits(model.model, sequence) for sequence in sequences]
    runner = make_runner(model)
    give_blocks(runner, len(sequences))
    for row, logits in feed(runner, dict(enumerate(sequences)), max_chunk=9).items():
        torch.testing.assert_close(logits, expected[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ONE_PER_FAMILY)
def test_greedy_tokens_are_those_of_generate(variant, make_runner) -> None:
    model = random_model(variant)
    prompts, num_new = random_sequences(), 20
    expected = [
        model.model.generate(torch.tensor([prompt]), max_new_tokens=num_new, do_sample=False, eos_token_id=None)
        for prompt in prompts
    ]
    runner = make_runner(model)
    give_blocks(runner, len(prompts))
    last = [logits[-1] for logits in feed(runner, dict(enumerate(prompts)), max_chunk=16).values()]
    sequences = [list(prompt) for prompt in prompts]
    rows = range(len(prompts))
    for _ in range(num_new):
        for sequence, logits in zip(sequences, last, strict=True):
            sequence.append(int(logits.argmax()))
        positions = [len(sequence) - 1 for sequence in sequences]
        last = list(runner.forward([sequence[-1] for sequence in sequences], positions, rows, rows))
    assert sequences == [tokens[0].tolist() for tokens in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [*ONE_PER_FAMILY, "llama, odd sizes"])
def test_bits_depend_on_no_neighbour_chunk_or_block(variant, dtype, make_runner) -> None:
    model = random_model(variant, dtype)
    sequences = dict(enumerate(random_sequences()))
    runner = make_runner(model)
    give_blocks(runner, 4)
    alone = {row: feed(runner, {3: sequence}, max_chunk=1)[3] for row, sequence in sequences.items()}
    for seed, max_chunk in enumerate((1, 5, 16)):
        give_blocks(runner, 4, seed=seed + 1)
        for row, logits in feed(runner, sequences, max_chunk, seed=seed).items():
            assert torch.equal(logits, alone[row])


def test_only_the_logits_asked_for_are_computed(make_runner) -> None:
    runner = make_runner(random_model("llama"))
    give_blocks(runner, 1)
    tokens = random_sequences([9])[0]
    every = runner.forward(tokens, range(9), [0] * 9, range(9))
    some = runner.forward(tokens, range(9), [0] * 9, [7, 2])
    assert every.dtype is torch.float32
    assert torch.equal(some, every[[7, 2]])
    assert runner.forward(tokens, range(9), [0] * 9, []).shape == (0, 260)


def test_logits_are_the_callers(make_runner) -> None:
    """A later pass does not write them."""
    runner = make_runner(random_model("llama"))
    give_blocks(runner, 1)
    first = runner.forward([1], [0], [0], [0])
    kept = first.clone()
    runner.forward([2], [0], [0], [0])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("variant", ONE_PER_FAMILY)
def test_close_gives_the_model_back_as_it_was(variant, make_runner) -> None:
    model = random_model(variant)
    tokens = random_sequences([13])[0]
    before, implementation = reference_logits(model.model, tokens), model.model.config._attn_implementation
    kinds = [(type(module), set(module.__dict__)) for module in model.model.modules()]
    pointers = {name: (weight.data_ptr(), weight.stride()) for name, weight in model.model.named_parameters()}
    runner = ModelRunner(model, small_config(), model.adapter.sites(model.model))
    held = {name: weight.data_ptr() for name, weight in model.model.named_parameters()}
    if variant != "gpt2":
        assert held == {name: pointer for name, (pointer, _) in pointers.items()}, "weights were copied"
    runner.splicer.install()
    runner.close()
    runner.close()
    assert torch.equal(reference_logits(model.model, tokens), before)
    assert model.model.config._attn_implementation == implementation
    assert [(type(module), set(module.__dict__)) for module in model.model.modules()] == kinds
    assert {name: weight.stride() for name, weight in model.model.named_parameters()} == {
        name: stride for name, (_, stride) in pointers.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_two_runners_serve_two_models_side_by_side(make_runner) -> None:
    """Nothing that a runner puts into its model is found by name alone."""
    tokens = random_sequences([20])[0]
    models = [random_model("llama"), random_model("qwen3, sliding")]
    expected = [reference_logits(model.model, tokens) for model in models]
    runners = [make_runner(model) for model in models]
    for runner in runners:
        give_blocks(runner, 1)
    for start in range(0, 20, 5):
        positions = range(start, start + 5)
        for runner, logits in zip(runners, expected, strict=True):
            got = runner.forward(tokens[start : start + 5], positions, [0] * 5, range(5))
            torch.testing.assert_close(got, logits[start : start + 5], rtol=0, atol=1e-4)


def test_tied_weights_stay_tied(make_runner) -> None:
    loaded = random_model("llama")
    model = loaded.model
    make_runner(loaded)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_batch_are_refused(kind) -> None:
    model = random_model("llama")
    model.model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(IncompatibleError, match=kind):
        ModelRunner(model, small_config(), [])


def test_every_family_has_a_variant() -> None:
    assert {family for family, _ in VARIANTS.values()} == FAMILIES.keys()
