"""Tokens a second of steerserve and of what one would use instead: SmolLM2 on this machine, one stream and 16.

Every row reads the same prompts of 16 tokens and generates the same number of greedy tokens; the time counts both.
Rows take turns. The last column is a row's tokens/s over those of plain ``generate`` of transformers. Weights are
bfloat16 where the row does not say otherwise. The hooks do at one layer what users of SAELens and TransformerLens do:
encode with all features of the built-in SAE, clamp one, decode, and keep the reconstruction error; or add a vector.
``first`` is the first call, in which some compile. A peer that is not installed, or fails, is named with the reason.

    pip install -e '.[bench]'
    python bench/bench_peers.py [--batch-sizes 1 16] [--only steerserve llama.cpp] [--rounds 20] [--write]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from unittest import mock

import numpy as np
import torch
from llama import LlamaProcess, gguf_file
from measure import Report, columns, interval, ratio, spread, take_turns
from rich.console import Console
from rich.progress import track
from torch import Tensor
from traffic import generate, without_end
from transformers import CompileConfig
from workload import (
    D_MODEL,
    MODEL,
    features_of_row,
    greedy_request,
    load,
    random_prompt,
    random_sae,
    same_weights,
    small_edits,
)

from steerserve import Site
from steerserve.config import EngineConfig
from steerserve.engine.engine import Engine
from steerserve.models.loading import LoadedModel
from steerserve.sae.registry import load_sae
from steerserve.steering.catalog import ASSETS, Catalog

PROMPT_LENGTH, NUM_TOKENS = 16, 16
BASELINE = "transformers generate"
FROZEN, INT8 = "transformers compiled, frozen weights", "transformers compiled, torchao int8"
SINGLE_STREAM = (FROZEN, INT8)
"""Peers that are for one stream, and too slow to compile to be shown elsewhere."""
NUM_FEATURES = 64
SAE_DIRECTORY = ASSETS / "saes" / "smollm2-135m-instruct-l24-4k"
SITE = Site.parse("blocks.24.hook_resid_post")

Run = Callable[[Sequence[tuple[int, ...]]], object]
"""Generates ``NUM_TOKENS`` tokens behind each prompt."""


class Setting:
    """What peers are set up for: a batch size, and one engine of each kind for those that are steerserve's.

    Attributes:
        cleanup: run when the batch size is done.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int, cleanup: ExitStack) -> None:
        self.loaded = loaded
        self.batch_size = batch_size
        self.cleanup = cleanup
        self.sae = random_sae(SITE, NUM_FEATURES * batch_size)
        self._engines: dict[bool, Engine] = {}

    def engine(self, compiled: bool) -> Engine:
        if compiled not in self._engines:
            config = EngineConfig(max_num_seqs=self.batch_size, max_model_len=64, compile=compiled)
            catalog = Catalog(self.loaded, {self.sae.name: self.sae}, {})
            engine = self._engines[compiled] = Engine(same_weights(self.loaded), catalog, config)
            self.cleanup.callback(engine.close)
            engine.warm_up()
        return self._engines[compiled]


def steerserve_engine(setting: Setting, *, compiled: bool = False, num_features: int = 0) -> Run:
    engine = setting.engine(compiled)

    def run(prompts: Sequence[tuple[int, ...]]) -> None:
        for row, prompt in enumerate(prompts):
            edits = small_edits(features_of_row(setting.sae, row, num_features))
            engine.add_request(greedy_request(str(row), prompt, NUM_TOKENS, edits))
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        assert sum(len(output.token_ids) for output in outputs) == NUM_TOKENS * len(prompts)
        receipts = [output.receipt for output in outputs if output.receipt]
        assert all(receipt.steered == (num_features > 0) for receipt in receipts), "a plan did not run"

    return run


def generate_with(setting: Setting, *, hook: Callable[[Tensor], Tensor] | None = None) -> Run:
    model = without_end(same_weights(setting.loaded).model)
    if hook is not None:
        module = setting.loaded.adapter.hook_point(model, SITE).module
        module.register_forward_hook(lambda module, args, output: hook(output))
    return partial(generate, model, num_tokens=NUM_TOKENS)


def generate_compiled(setting: Setting, *, frozen: bool = False, int8: bool = False) -> Run:
    model = without_end(same_weights(setting.loaded).model)
    if int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    # Stated here too: dynamo would run the code that another peer compiled with equal options.
    options = {"freezing": True} if frozen else {}
    config = CompileConfig(mode=None, dynamic=False, options=options)
    config._compile_all_devices = True  # `generate` compiles on accelerators alone unless it is told so

    def run(prompts: Sequence[tuple[int, ...]]) -> None:
        with ExitStack() as stack:
            if frozen:
                stack.enter_context(torch._inductor.config.patch(freezing=True))
                # The static cache marks its tensors as never moving, and freezing would take them for constants.
                stack.enter_context(mock.patch("torch._dynamo.mark_static_address"))
            generate(model, prompts, NUM_TOKENS, cache_implementation="static", compile_config=config)

    return run


def whole_sae(setting: Setting) -> Run:
    sae = load_sae(SAE_DIRECTORY)
    tensors = (sae.W_enc, sae.encoder_bias(), sae.threshold, sae.W_dec, sae.b_dec)
    W_enc, b_enc, threshold, W_dec, b_dec = (tensor.bfloat16() for tensor in tensors)

    def splice(x: Tensor) -> Tensor:
        pre = x @ W_enc + b_enc
        f = pre * (pre > threshold)
        error = x - (f @ W_dec + b_dec)
        return clamp_one(f) @ W_dec + b_dec + error

    return generate_with(setting, hook=splice)


def saelens(setting: Setting) -> Run:
    from sae_lens import SAE

    sae = SAE.load_from_disk(SAE_DIRECTORY, device="cpu", dtype="bfloat16")
    sae.use_error_term = True
    hooks = [("hook_sae_acts_post", clamp_one)]
    return generate_with(setting, hook=lambda x: sae.run_with_hooks(x, fwd_hooks=hooks))


def clamp_one(f: Tensor, hook: object = None) -> Tensor:
    """The first feature to 1 wherever it fires; f ``[B, T, d_sae]``."""
    f[..., 0] = torch.where(f[..., 0] > 0, 1.0, f[..., 0])
    return f


def vector_added(setting: Setting) -> Run:
    vector = torch.from_numpy(small_vector()).bfloat16()
    return generate_with(setting, hook=lambda x: x + vector)


def llama_cpp(setting: Setting, *, control_vector: bool = False) -> Run:
    process = LlamaProcess(
        gguf=str(gguf_file(MODEL)),
        batch_size=setting.batch_size,
        max_len=PROMPT_LENGTH + NUM_TOKENS,
        num_threads=torch.get_num_threads(),
        vector=small_vector().tolist() if control_vector else [],
        layer=SITE.layer,
    )
    setting.cleanup.callback(process.close)
    return partial(process.generate, num_tokens=NUM_TOKENS)


def small_vector() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(D_MODEL).astype(np.float32)


PEERS: dict[str, Callable[[Setting], Run]] = {
    BASELINE: generate_with,
    "  + hook: a vector added": vector_added,
    "  + hook: the whole SAE, torch": whole_sae,
    "  + hook: the whole SAE, SAELens": saelens,
    "transformers compiled, static cache": generate_compiled,
    FROZEN: partial(generate_compiled, frozen=True),
    INT8: partial(generate_compiled, int8=True),
    "llama.cpp Q4_1": llama_cpp,
    "llama.cpp Q4_1, control vector": partial(llama_cpp, control_vector=True),
    "steerserve": steerserve_engine,
    "steerserve, 64 features a row": partial(steerserve_engine, num_features=NUM_FEATURES),
    "steerserve compiled": partial(steerserve_engine, compiled=True),
    "steerserve compiled, 64 features a row": partial(steerserve_engine, compiled=True, num_features=NUM_FEATURES),
}


def prompts(batch_size: int, number: int) -> list[tuple[int, ...]]:
    """New ones each round: nothing of them is in a prefix cache."""
    generator = random.Random(number)
    return [random_prompt(generator, PROMPT_LENGTH) for _ in range(batch_size)]


def set_up(setting: Setting, names: Sequence[str], report: Report) -> tuple[dict[str, Run], dict[str, float]]:
    """The peers that work, and the seconds that the first call of each took."""
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    for name in track(names, f"B = {setting.batch_size}, first calls", console=Console(stderr=True)):
        start = time.perf_counter()
        try:
            run = PEERS[name](setting)
            run(prompts(setting.batch_size, -1))
        except Exception as error:  # whatever is wrong with one peer, the others are to be measured
            report.print(f"B = {setting.batch_size}, no {name.strip()}: {type(error).__name__}: {str(error)[:300]}")
        else:
            runs[name], first[name] = run, time.perf_counter() - start
    return runs, first


def tokens_per_second(run: Run, batch_size: int, number: int) -> float:
    batch = prompts(batch_size, number)
    start = time.perf_counter()
    run(batch)
    return batch_size * NUM_TOKENS / (time.perf_counter() - start)


def compare(loaded: LoadedModel, batch_size: int, names: Sequence[str], rounds: int, report: Report) -> None:
    with ExitStack() as cleanup:
        cleanup.callback(torch._dynamo.reset)  # the next batch size has shapes, and so compiled code, of its own
        runs, first = set_up(Setting(loaded, batch_size, cleanup), names, report)
        arms = {name: partial(tokens_per_second, run, batch_size) for name, run in runs.items()}
        rates = take_turns(f"B = {batch_size}", arms, rounds)
    title = f"B = {batch_size}: tokens/s of {NUM_TOKENS} tokens behind {PROMPT_LENGTH}: median and range"
    table = columns(title, "", "first, s", "tokens/s", "÷ generate, 95 % interval")
    for name, values in rates.items():
        table.add_row(name, f"{first[name]:.0f}", spread(values, ".1f"), interval(ratio(values, rates[BASELINE])))
    report.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--only", nargs="+", default=[""], metavar="PEER", help="peers whose names have this in them")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results")
    options = parser.parse_args()
    names = [name for name in PEERS if name == BASELINE or any(part in name for part in options.only)]
    report, loaded = Report(), load()
    for batch_size in options.batch_sizes:
        left_out = () if batch_size == 1 else SINGLE_STREAM
        compare(loaded, batch_size, [name for name in names if name not in left_out], options.rounds, report)
    if options.write:
        report.save()


if __name__ == "__main__":
    main()
