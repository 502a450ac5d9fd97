"""The compiled model: one graph for every step, the same bits for every company, and every edit in it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from runner_cases import feed, give_blocks, random_model, random_sequences, reference_logits, small_config
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from steerserve.engine.runner import ModelRunner
from steerserve.kernels.steer_delta import OpCode
from steerserve.models.hooks import transformed
from steerserve.models.splice import STAGES, SiteBank, SiteBuffers
from steerserve.types import Site, Stream

# Torch's own, when it first imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SITES = [Site(layer, stream) for layer in range(2) for stream in Stream]
AMOUNT = 3.0
D_MODEL = 32


@pytest.fixture(scope="module")
def runner() -> Iterator[ModelRunner]:
    """A compiled llama, shared by the tests here."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = random_model("llama")
    tokens = random_sequences([9])[0]
    before = reference_logits(model.model, tokens)
    runner = compiled(model, SITES)
    yield runner
    runner.close()
    assert torch.equal(reference_logits(model.model, tokens), before)
    torch.set_num_threads(num_threads)


def compiled(model, sites) -> ModelRunner:
    runner = ModelRunner(model, small_config(compile=True), sites)
    for buffers in runner.splicer.buffers.values():
        buffers.bank = axis_bank()
    graphs = counters["stats"]["unique_graphs"]
    runner.warm_up()
    assert counters["stats"]["unique_graphs"] == graphs + 1
    give_blocks(runner, 4)
    return runner


def axis_bank() -> SiteBank:
    """One feature, which reads and writes the first axis."""
    axis = torch.eye(D_MODEL)[:1].contiguous()
    bound = torch.full((1,), torch.inf)
    none = torch.zeros(1, dtype=torch.uint8)
    return SiteBank(axis, torch.zeros(1), threshold=-bound, max_norm=bound, normalization=none, W_dec=axis)


def one_entry_each(buffers: SiteBuffers, op: OpCode = OpCode.ADD, value: float = AMOUNT, scored: bool = False) -> None:
    """An entry for every token, in stage REQUEST; ``scored`` ones name score t of token t."""
    buffers.ptr.copy_((torch.arange(len(buffers.ptr)) + 1) // STAGES)
    buffers.slot.zero_()
    buffers.op.fill_(op)
    buffers.value.fill_(value)
    buffers.score_index.copy_(torch.arange(len(buffers.score_index)) if scored else torch.tensor(-1))
    buffers.activation.fill_(torch.nan)
    buffers.edit.fill_(torch.nan)
    buffers.active = True


@pytest.fixture
def inactive(runner) -> Iterator[None]:
    yield
    for buffers in runner.splicer.buffers.values():
        buffers.active = False


def test_logits_are_those_of_transformers_and_bits_depend_on_no_neighbour(runner) -> None:
    model = random_model("llama").model
    sequences = dict(enumerate(random_sequences()))
    alone = {row: feed(runner, {3: sequence}, max_chunk=1)[3] for row, sequence in sequences.items()}
    for row, logits in feed(runner, sequences, max_chunk=9).items():
        torch.testing.assert_close(logits, reference_logits(model, sequences[row]), rtol=0, atol=1e-4)
        assert torch.equal(logits, alone[row])


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.usefixtures("inactive")
def test_the_model_goes_on_with_the_edited_activation(site, runner) -> None:
    """Against an uncompiled model of transformers in which a hook of the test replaces the activation."""
    tokens = random_sequences([11])[0]
    model, shift = random_model("llama"), AMOUNT * torch.eye(D_MODEL)[0]
    unedited = feed(runner, {0: tokens}, max_chunk=16)[0]
    buffers = runner.splicer.buffers[site]
    one_entry_each(buffers, OpCode.MONITOR)
    assert torch.equal(feed(runner, {0: tokens}, max_chunk=16)[0], unedited)
    assert buffers.activation[0].isfinite()
    one_entry_each(buffers)
    edited = feed(runner, {0: tokens}, max_chunk=16)[0]
    with transformed(model, {site: lambda x: x + shift}):
        expected = reference_logits(model.model, tokens)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4)
    assert (edited - unedited).abs().max() > 1e-2


@pytest.mark.usefixtures("inactive")
def test_a_thousand_steps_of_churn_move_no_buffer_and_recompile_nothing(runner) -> None:
    store, splicer, rng = runner.kv_store, runner.splicer, random.Random(0)
    tensors = [store.blocks, store.block_table, store.row, store.position]
    tensors += [value for scores in [splicer.scores] for value in vars(scores).values()]
    for buffers in splicer.buffers.values():
        one_entry_each(buffers)
        tensors += [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
    pointers = [tensor.data_ptr() for tensor in tensors]
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(1000):
        for buffers in splicer.buffers.values():
            buffers.active = rng.random() < 0.5
        num_tokens = rng.randint(1, 12)
        rows = [rng.randrange(4) for _ in range(num_tokens)]
        positions = [16 * row + index for index, row in enumerate(rows)]
        runner.forward([rng.randrange(256)] * num_tokens, positions, rows, logits_at=[num_tokens - 1])
    assert counters["stats"]["unique_graphs"] == graphs
    assert [tensor.data_ptr() for tensor in tensors] == pointers


def values_asked_for(runner: ModelRunner) -> int:
    """Tensors whose value a step of two tokens with an entry at every site asks for."""
    for buffers in runner.splicer.buffers.values():
        one_entry_each(buffers)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        runner.forward([1, 2], [0, 0], [0, 1], [0, 1])
    ran = {event.key: event.count for event in profiler.key_averages()}
    assert {"steerserve::linear", "steerserve::attend"} <= ran.keys()
    return sum(ran.get(f"aten::{name}", 0) for name in ("_local_scalar_dense", "is_nonzero"))


def test_an_eager_step_asks_no_tensor_for_its_value() -> None:
    """On a GPU that would wait for it, and could not be captured in a graph."""
    runner = ModelRunner(random_model("llama"), small_config(), SITES)
    for buffers in runner.splicer.buffers.values():
        buffers.bank = axis_bank()
    give_blocks(runner, 4)
    assert values_asked_for(runner) == 0
    runner.close()


@pytest.mark.usefixtures("inactive")
def test_a_compiled_step_asks_for_sizes_alone(runner) -> None:
    """They reach compiled code as scalars on the host: three of them, however many layers and sites there are."""
    assert values_asked_for(runner) == 3


def test_a_recompilation_is_an_error(runner) -> None:
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="recompile"):
        runner.forward([1], [0], [0], [0])
    torch.set_num_threads(1)
    runner.forward([1], [0], [0], [0])


def test_a_gate_reads_before_the_edit_where_neither_feeds_the_other() -> None:
    """The parallel branches of a GPT-NeoX layer: only the scores say that attention comes before the MLP."""
    reader, editor = Site(0, Stream.ATTN_OUT), Site(0, Stream.MLP_OUT)
    runner = compiled(random_model("gpt_neox", num_hidden_layers=1), [reader, editor])
    try:
        scores, buffers = runner.splicer.scores, runner.splicer.buffers
        one_entry_each(buffers[reader], OpCode.MONITOR, value=1.0, scored=True)
        one_entry_each(buffers[editor], scored=True)
        scores.ptr.copy_(torch.arange(len(scores.ptr)))
        scores.threshold.zero_()
        tokens = random_sequences([24])[0]
        runner.forward(tokens, range(24), [0] * 24, [])
        is_open = buffers[reader].activation[:24] > 0
        assert 0 < is_open.sum() < 24
        assert torch.equal(buffers[editor].edit[:24] == AMOUNT, is_open)
    finally:
        runner.close()
