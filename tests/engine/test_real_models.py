"""Real weights: what transformers gives, bits that no neighbour changes, and sites that are where they are said to be.

Gemma 3 is a larger download, and its vocabulary makes every token dear: its tests are slow ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import Outcome, assert_same, drive, request
from torch import nn

from steerserve.models.families import STEERABLE
from steerserve.models.loading import LoadedModel, load_model
from steerserve.types import DirectionTarget, Intervention, Op, Site, SteeringSpec, Stream

PROMPTS = (
    "Once upon a time, there was a",
    "Q: What is the capital of France?\nA:",
    "def fibonacci(n):\n    ",
    "The three laws of motion are as follows. First, an object at rest",
    "Dear Sir or Madam, I am writing to you about the parcel that",
    "1, 2, 4, 8, 16,",
    "Les plus belles villes d'Europe sont",
    "x",
)
ARRIVALS = (0, 0, 2, 3, 5, 5, 6, 9)

SMOLLM2 = pytest.param("smollm2_dir", id="SmolLM2")
GEMMA3 = pytest.param("gemma3_dir", id="Gemma 3", marks=pytest.mark.slow)
Load = Callable[[torch.dtype], LoadedModel]


@pytest.fixture(scope="module", params=[SMOLLM2, GEMMA3])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """A model, held once for each dtype."""
    yield from loader(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def load_gemma(gemma3_dir: Path) -> Iterator[Load]:
    yield from loader(gemma3_dir)


def loader(directory: Path) -> Iterator[Load]:
    held: dict[torch.dtype, LoadedModel] = {}

    def load(dtype: torch.dtype) -> LoadedModel:
        if dtype not in held:
            held[dtype] = load_model(str(directory), dtype)
        return held[dtype]

    yield load
    held.clear()


@dataclass(frozen=True)
class Greedy:
    """What transformers generates for a prompt: ``tokens [n]``, and ``logprobs [n, vocab]`` where each was drawn."""

    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor

    @property
    def chosen(self) -> torch.Tensor:
        """``[n]`` log-probabilities of the tokens."""
        return self.logprobs[range(len(self.tokens)), self.tokens]


def generate(model: LoadedModel, prompt: str, max_tokens: int) -> Greedy:
    """``model`` is not to be held by an engine."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logprobs = torch.cat(output.logits).float().log_softmax(-1)
    return Greedy(ids[0].tolist(), output.sequences[0, ids.shape[1] :].tolist(), logprobs)


def assert_equals(result: Outcome, expected: Greedy) -> None:
    """The same tokens, with the same log-probabilities but for rounding in float32."""
    assert list(result.token_ids) == expected.tokens
    logprobs = torch.tensor([entry.logprob for entry in result.logprobs])
    torch.testing.assert_close(logprobs, expected.chosen, rtol=0, atol=1e-3)


def test_greedy_is_that_of_generate_in_a_changing_batch_of_chunks(load, make_engine) -> None:
    model = load(torch.float32)
    lengths = [8, 4, 10, 6, 8, 5, 9, 3]
    expected = [generate(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    engine = make_engine(model, max_num_seqs=3, max_num_batched_tokens=7)
    requests = [
        request(str(i), prompt, max_tokens=length, ignore_eos=False)
        for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    results = drive(engine, requests, ARRIVALS)
    engine.close()
    for i, greedy in enumerate(expected):
        assert_equals(results[str(i), 0], greedy)


@pytest.mark.slow
def test_a_prompt_beyond_the_sliding_window(load_gemma, make_engine, monkeypatch) -> None:
    model = load_gemma(torch.float32)
    values = np.random.default_rng(0).integers(100, 999, 60)
    prompt = "".join(f"Line {i} holds the number {value}.\n" for i, value in enumerate(values)) + "Line 1 holds the"
    expected = generate(model, prompt, 6)
    assert len(expected.prompt) > 512 + 100
    engine = make_engine(model, max_model_len=1024, max_num_batched_tokens=101)
    results = drive(engine, [request("long", prompt, max_tokens=6), request("short", PROMPTS[0], max_tokens=20)])
    engine.close()
    assert_equals(results["long", 0], expected)
    monkeypatch.setattr(model.model.config, "sliding_window", 4096)
    assert (generate(model, prompt, 1).logprobs[0] - expected.logprobs[0]).abs().max() > 0.1  # the window shows


def direction(model: LoadedModel, site: Site, op: Op, value: float | None = None, seed: int = 0) -> Intervention:
    vector = np.random.default_rng(seed).standard_normal(model.d_model).astype(np.float32)
    return Intervention(DirectionTarget(site, vector), op, value)


def test_bfloat16_bits_depend_on_no_neighbour_and_no_chunk(load, make_engine) -> None:
    """Tokens, log-probabilities and scores of eight requests, most of them steered, at sites of their own."""
    model = load(torch.bfloat16)
    streams = islice(cycle(STEERABLE), len(PROMPTS))
    requests = []
    for i, (prompt, stream) in enumerate(zip(PROMPTS, streams, strict=True)):
        edit = direction(model, Site(2 + i, stream), Op.ADD if i % 3 else Op.MONITOR, 2.0 if i % 3 else None, seed=i)
        requests.append(
            request(
                str(i), 3 * prompt, SteeringSpec((edit,)), max_tokens=6 + i % 3, logprobs=5, return_activations=True
            )
        )
    alone = drive(make_engine(model, max_num_seqs=1), requests)
    for max_num_batched_tokens, arrivals in ((9, ARRIVALS), (64, None)):
        engine = make_engine(model, max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens)
        together = drive(engine, requests, arrivals)
        for key, result in alone.items():
            assert_same(together[key], result)
    engine.close()


def test_bfloat16_is_as_near_to_float32_as_generate_is(load, make_engine) -> None:
    """Tokens may part only where transformers' own two dtypes leave the choice between the best two open."""
    prompts, num_tokens = PROMPTS[::2], 16
    model, exact = load(torch.bfloat16), load(torch.float32)
    expected = [generate(model, prompt, num_tokens) for prompt in prompts]
    engine = make_engine(model)
    requests = [request(str(i), prompt, max_tokens=num_tokens, ignore_eos=False) for i, prompt in enumerate(prompts)]
    results = drive(engine, requests)
    engine.close()

    gap_noises, partings, errors, hf_errors = [], [], [], []
    for i, greedy in enumerate(expected):
        result = results[str(i), 0]
        with torch.inference_mode():
            logits = exact.model(torch.tensor([greedy.prompt + greedy.tokens])).logits[0, len(greedy.prompt) - 1 : -1]
        truth = logits.log_softmax(-1)
        best = greedy.logprobs.topk(2).indices
        gaps, true_gaps = (-logprobs.gather(1, best).diff(dim=1)[:, 0] for logprobs in (greedy.logprobs, truth))
        gap_noises.append((gaps - true_gaps).abs().max())
        pairs = list(zip(result.token_ids, greedy.tokens, strict=False))
        same = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
        partings += gaps[same : same + 1].tolist() if same < len(pairs) else []
        chosen = truth[range(same), greedy.tokens[:same]]
        errors.append(torch.tensor([entry.logprob for entry in result.logprobs[:same]]) - chosen)
        hf_errors.append(greedy.chosen[:same] - chosen)
    ours, theirs = torch.cat(errors), torch.cat(hf_errors)
    assert len(ours) > 0.5 * sum(len(greedy.tokens) for greedy in expected)
    assert all(gap <= 2 * max(gap_noises) for gap in partings)
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()


GEMMA_SITES = [
    Site(6, Stream.RESID_PRE),
    Site(11, Stream.ATTN_OUT),
    Site(9, Stream.MLP_OUT),
    Site(17, Stream.RESID_POST),
]


@pytest.mark.slow
def test_gemma_streams_are_read_where_hand_written_hooks_read_them(load_gemma, make_engine) -> None:
    """By the inputs of layers and norms: what is added to the residual, by subtraction."""
    model = load_gemma(torch.float32)
    decoder = model.model.model
    modules = {
        "before layer 6": decoder.layers[6],
        "before layer 11": decoder.layers[11],
        "between the halves of layer 11": decoder.layers[11].pre_feedforward_layernorm,
        "between the halves of layer 9": decoder.layers[9].pre_feedforward_layernorm,
        "behind layer 9": decoder.layers[10],
        "behind the last layer": decoder.norm,
    }
    tokens = model.tokenizer(PROMPTS[3])["input_ids"]
    x: dict[str, np.ndarray] = {}
    with torch.inference_mode(), ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(
                lambda _module, args, name=name: x.update({name: args[0][0].double().numpy()})
            )
            hooks.callback(hook.remove)
        model.model(torch.tensor([tokens]))
    expected = [
        x["before layer 6"],
        x["between the halves of layer 11"] - x["before layer 11"],
        x["behind layer 9"] - x["between the halves of layer 9"],
        x["behind the last layer"],
    ]
    monitors = tuple(direction(model, site, Op.MONITOR) for site in GEMMA_SITES)
    engine = make_engine(model, max_num_batched_tokens=5)
    spec = SteeringSpec(monitors)
    result = drive(engine, [request("r", tokens, spec, max_tokens=1, return_activations=True)])["r", 0]
    engine.close()
    scores = np.stack([np.frombuffer(line, np.float32) for _, line in result.scores])[: len(tokens)]
    unit = monitors[0].target.vector.astype(np.float64)
    unit /= np.linalg.norm(unit)
    rounding = 1e-6 * np.max([np.linalg.norm(stream, axis=1) for stream in x.values()], axis=0)  # by position
    for read, stream in zip(scores.T, expected, strict=True):
        assert (np.abs(stream @ unit) / rounding).max() > 100
        assert (np.abs(read - stream @ unit) <= rounding).all()


@pytest.mark.slow
def test_gemma_streams_are_edited_where_hand_written_hooks_edit_them(load_gemma, make_engine) -> None:
    """Four requests in one batch, each with an edit at a site of another stream."""
    model = load_gemma(torch.float32)
    decoder, value, num_tokens = model.model.model, 300.0, 8
    places: list[tuple[nn.Module, bool]] = [  # and whether it is the module's input that is edited
        (decoder.layers[6], True),
        (decoder.layers[11].post_attention_layernorm, False),
        (decoder.layers[10], True),
        (decoder.norm, True),
    ]
    edits = [direction(model, site, Op.ADD, value, seed=seed) for seed, site in enumerate(GEMMA_SITES)]
    plain = generate(model, PROMPTS[3], num_tokens)
    expected = []
    for (module, is_input), edit in zip(places, edits, strict=True):
        shift = value * torch.nn.functional.normalize(torch.from_numpy(edit.target.vector), dim=0)
        if is_input:
            hook = module.register_forward_pre_hook(lambda _m, args, shift=shift: (args[0] + shift, *args[1:]))
        else:
            hook = module.register_forward_hook(lambda _m, _args, output, shift=shift: output + shift)
        expected.append(generate(model, PROMPTS[3], num_tokens))
        hook.remove()
    engine = make_engine(model, max_num_batched_tokens=6)
    requests = [
        request(str(i), PROMPTS[3], SteeringSpec((edit,)), max_tokens=num_tokens, ignore_eos=False)
        for i, edit in enumerate(edits)
    ]
    results = drive(engine, requests)
    engine.close()
    for i, steered in enumerate(expected):
        assert_equals(results[str(i), 0], steered)
        assert (steered.logprobs[0] - plain.logprobs[0]).abs().max() > 0.1
