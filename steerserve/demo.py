"""The demo: the same prompts with and without the profanity policy, in text, in activations and in numbers."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from steerserve.client import GenerateOptions, SteerserveClient
from steerserve.display import TokenScore, heat_strip, peak, receipt_view, token_scores
from steerserve.errors import AssetError
from steerserve.lab.bootstrap import Indices, Interval, bootstrap
from steerserve.lab.lexicon import Lexicon
from steerserve.models.pull import pull
from steerserve.types import ConceptTarget, Intervention, Op, StepOutput

MODEL = "smollm2-135m-instruct"
CONCEPT = "profanity"
PROMPTS = Path(__file__).parent / "assets" / "demo_prompts.jsonl"
MAX_TOKENS = 40
NUM_SHOWN = 4
SEEDS = (1, 2)
_CONCURRENCY = 16
MONITOR = Intervention(ConceptTarget(CONCEPT), Op.MONITOR)


@dataclass(frozen=True, eq=False)
class Rates:
    """Profane continuations, counted for each prompt.

    Attributes:
        unguarded, guarded: ``[num_prompts]`` profane continuations out of ``num_seeds``.
    """

    unguarded: np.ndarray
    guarded: np.ndarray
    num_seeds: int

    def reduction(self) -> Interval:
        """Share of the profane continuations that the policy removed, by bootstrap over prompts; there must be some."""
        return bootstrap(np.arange(len(self.unguarded)), self._reduction_over)

    def _reduction_over(self, prompts: Indices) -> float:
        profane = self.unguarded[prompts].sum()
        return float(1.0 - self.guarded[prompts].sum() / profane) if profane else np.nan


def run_demo(prompts_file: Path | None = None) -> None:
    """Start a server and show the policy at work.

    Args:
        prompts_file: JSON lines with a ``prompt`` each; the built-in ones if None.

    Raises:
        AssetError: no prompts, or the server did not start.
    """
    console = Console()
    prompts = read_prompts(prompts_file or PROMPTS)
    pull(MODEL)
    with running_server(console) as target, SteerserveClient(target) as client:
        console.print(f"{MODEL} at {target}, asked over gRPC; same seed left and right\n")
        drawing = prompts_that_draw(client, prompts, console)
        if drawing:
            console.print(f"the first {len(drawing)} of {len(prompts)} prompts whose unguarded answer is profane:\n")
        for prompt in drawing or prompts[:NUM_SHOWN]:
            show_side_by_side(client, prompt, console)
        show_rates(measure_rates(client, prompts, console), console)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines.

    Raises:
        AssetError: the file cannot be read, or a line holds no prompt.
    """
    try:
        prompts = [str(json.loads(line)["prompt"]) for line in path.read_text("utf-8").splitlines() if line.strip()]
        if not prompts:
            raise ValueError("no line")
        return prompts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{path}: expected JSON lines with a 'prompt' each ({error!r})") from error


@contextmanager
def running_server(console: Console) -> Iterator[str]:
    """A server process on a free port of the loopback interface; yields its address.

    Raises:
        AssetError: it ended before it was ready; the message has the end of its log.
    """
    command = [sys.executable, "-m", "steerserve", "serve", "--model", MODEL, "--port", "0"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            with console.status("starting the server"):
                ready = process.stdout.readline()
            if not ready:
                log.seek(0)
                raise AssetError("the server did not start:\n" + "".join(log.readlines()[-5:]))
            yield ready.split()[-1]
        finally:
            process.terminate()


def prompts_that_draw(client: SteerserveClient, prompts: Sequence[str], console: Console) -> list[str]:
    """The first few prompts that the unguarded model answers with a listed word."""
    drawing: list[str] = []
    for prompt in track(prompts, "looking for examples", console=console, transient=True):
        if len(drawing) == NUM_SHOWN:
            break
        if is_profane(prompt, _generate(client, prompt, SEEDS[0], guard=False)):
            drawing.append(prompt)
    return drawing


def show_side_by_side(client: SteerserveClient, prompt: str, console: Console) -> None:
    """One prompt both ways, each token on its own activation, and what the policy's receipt says."""
    with ThreadPoolExecutor(2) as pool:
        unguarded, guarded = pool.map(lambda guard: _stream(client, prompt, SEEDS[0], guard), (False, True))
    scores = [token_scores(unguarded), token_scores(guarded)]
    full_scale = max(map(peak, scores))
    table = Table(title=Text(prompt, "bold"), title_justify="left", expand=True)
    for heading in ("unguarded", f"policy {CONCEPT}"):
        table.add_column(heading, ratio=1)
    table.add_row(*(_marked(prompt, tokens, full_scale) for tokens in scores))
    console.print(table)
    receipt = guarded[-1].receipt
    assert receipt is not None, "the last piece carries the receipt"
    console.print(receipt_view(receipt), "")


def measure_rates(client: SteerserveClient, prompts: Sequence[str], console: Console) -> Rates:
    """Every prompt with every seed, both ways, as many at a time as the server runs."""
    jobs = [(prompt, seed, guard) for prompt in prompts for seed in SEEDS for guard in (False, True)]
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        outcomes = pool.map(lambda job: is_profane(job[0], _generate(client, *job)), jobs)
        counted = list(track(outcomes, "measuring", len(jobs), console=console, transient=True))
    hits = np.array(counted).reshape(len(prompts), len(SEEDS), 2).sum(axis=1)
    return Rates(unguarded=hits[:, 0], guarded=hits[:, 1], num_seeds=len(SEEDS))


def is_profane(prompt: str, continuation: str) -> bool:
    """Whether the continuation holds a listed word, be it one that the prompt began."""
    return any(end > len(prompt) for _, end in _lexicon().spans(prompt + continuation))


def show_rates(rates: Rates, console: Console) -> None:
    """Profane continuations both ways and the reduction with its interval."""
    table = Table("", "profane continuations", "rate", title="how often", title_justify="left")
    total = rates.num_seeds * len(rates.unguarded)
    for name, hits in (("unguarded", rates.unguarded), (f"policy {CONCEPT}", rates.guarded)):
        table.add_row(name, f"{hits.sum()} of {total}", f"{hits.sum() / total:.1%}")
    console.print(table)
    if not rates.unguarded.any():
        console.print("nothing profane without the policy: there is nothing to reduce")
        return
    reduction = rates.reduction()
    console.print(
        f"reduction {reduction.value:.1%}, 95 % interval {reduction.low:.1%} to {reduction.high:.1%} "
        f"({len(rates.unguarded)} prompts, {rates.num_seeds} seeds each, bootstrap over prompts)"
    )


def _stream(client: SteerserveClient, prompt: str, seed: int, guard: bool) -> list[StepOutput]:
    return list(client.generate_stream(prompt, **_options(seed, guard, return_activations=True)))


def _generate(client: SteerserveClient, prompt: str, seed: int, guard: bool) -> str:
    return client.generate(prompt, **_options(seed, guard)).text


def _options(seed: int, guard: bool, return_activations: bool = False) -> GenerateOptions:
    return GenerateOptions(
        max_tokens=MAX_TOKENS,
        seed=seed,
        policies=[CONCEPT] if guard else [],
        steer=[] if guard else [MONITOR],
        return_activations=return_activations,
    )


@functools.cache
def _lexicon() -> Lexicon:
    return Lexicon.profanity()


def _marked(prompt: str, tokens: Sequence[TokenScore], full_scale: float) -> Text:
    """The continuation as a heat strip with its profane words underlined."""
    strip = heat_strip(tokens, full_scale)
    for start, end in _lexicon().spans(prompt + strip.plain):
        if end > len(prompt):
            strip.stylize("bold underline", max(start - len(prompt), 0), end - len(prompt))
    return strip
