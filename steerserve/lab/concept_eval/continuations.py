"""Continuations of prompts by the engine that serves, and how likely the untreated model finds them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress

from steerserve.config import EngineConfig
from steerserve.engine.engine import Engine
from steerserve.lab.concept_eval.prompts import MAX_PROMPT_TOKENS, Prompt, digest
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.tokens import bos_of, padded
from steerserve.models.loading import LoadedModel
from steerserve.types import FinishReason, SamplingParams

CONTINUATION_TOKENS = 40
"""At most; a continuation may end by itself."""
MAX_PREFIX_TOKENS = 88
"""Of an instruction."""
RUNNING = 128
"""Continuations at once."""


@dataclass(frozen=True)
class Continuation:
    """One sampled response to ``prompts[prompt]``.

    Attributes:
        ended: by itself, before ``CONTINUATION_TOKENS``.
        nll: summed over its tokens, given the prompt, under the untreated model; NaN where nobody asked for it.
    """

    prompt: int
    seed: int
    token_ids: tuple[int, ...]
    text: str
    ended: bool
    nll: float


@dataclass(frozen=True)
class Arms:
    """Finished arms on disk, so that an interrupted evaluation goes on where it was; None: nowhere.

    An arm is found by what was done to the model, the prompts and the seeds, and by nothing else.
    """

    directory: Path | None

    def number(self, terms: object, compute: Callable[[], float]) -> float:
        """What ``compute`` gave when it was last asked with these terms."""
        if self.directory is None:
            return compute()
        path = self.directory / "numbers.json"
        known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        key = _key(terms)
        if key not in known:
            known[key] = compute()
            self._write(path, known)
        return known[key]

    def continuations(
        self,
        model: LoadedModel,
        treatment: Treatment,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        title: str,
        scored: bool = True,
    ) -> list[Continuation]:
        """Every prompt continued with every seed, ordered by prompt and seed; read back if that was done before."""
        if self.directory is None:
            return continue_prompts(model, treatment, prompts, seeds, title, scored)
        terms = (
            model.fingerprint,
            str(model.model.dtype),
            treatment.key,
            digest(prompts),
            list(seeds),
            CONTINUATION_TOKENS,
            scored,
        )
        path = self.directory / f"{_key(terms)}.json"
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            return [Continuation(**{**row, "token_ids": tuple(row["token_ids"])}) for row in rows]
        continuations = continue_prompts(model, treatment, prompts, seeds, title, scored)
        self._write(path, [asdict(continuation) for continuation in continuations])
        return continuations

    def _write(self, path: Path, content: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)


def _key(terms: object) -> str:
    return hashlib.sha256(repr(terms).encode()).hexdigest()[:24]


def continue_prompts(
    model: LoadedModel,
    treatment: Treatment,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    title: str,
    scored: bool = True,
) -> list[Continuation]:
    """Sample every prompt with every seed at temperature 1, 40 tokens, through the engine; edits alone.

    Args:
        scored: with the NLL of each, which takes about half as long again.
    """
    total = len(prompts) * len(seeds)
    longest = MAX_PROMPT_TOKENS + MAX_PREFIX_TOKENS + CONTINUATION_TOKENS
    config = EngineConfig(
        max_num_seqs=RUNNING, max_num_batched_tokens=2 * RUNNING, max_model_len=longest, max_waiting=total
    )
    with closing(Engine(model, treatment.catalog, config)) as engine:
        # Seed by seed for as many prompts as run at once: all but the first seed find their prompt in the prefix cache.
        for start in range(0, len(prompts), RUNNING):
            for seed, index in product(seeds, range(start, min(start + RUNNING, len(prompts)))):
                params = SamplingParams(max_tokens=CONTINUATION_TOKENS, temperature=1.0, seed=seed)
                token_ids = _instructed(model, treatment, prompts[index])
                engine.add_request(treatment.request(f"{index}/{seed}", token_ids, params))
        drawn = sorted(_finished(engine, title, total), key=lambda c: (c.prompt, list(seeds).index(c.seed)))
    return _with_nll(model, prompts, drawn) if scored else drawn


def _instructed(model: LoadedModel, treatment: Treatment, prompt: Prompt) -> tuple[int, ...]:
    """The prompt's tokens, with the treatment's instruction."""
    if treatment.opening is None:
        num_replaced = len(bos_of(model)) if treatment.prefix else 0
        return (*treatment.prefix, *prompt.token_ids[num_replaced:])
    plain, instructed = treatment.opening
    assert prompt.text.startswith(plain), "a prompt that is not in the chat template"
    text = instructed + prompt.text.removeprefix(plain)
    return tuple(model.tokenizer(text, add_special_tokens=False).input_ids)


def _finished(engine: Engine, title: str, total: int) -> list[Continuation]:
    """Step ``engine`` until its ``total`` requests, named ``<prompt>/<seed>``, have ended."""
    tokens: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    finished: list[Continuation] = []
    with Progress() as progress:
        task = progress.add_task(title, total=total)
        while engine.has_unfinished():
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                key = output.request_id
                tokens.setdefault(key, []).extend(output.token_ids)
                texts[key] = texts.get(key, "") + output.text
                if output.finish_reason is not None:
                    prompt, seed = map(int, key.split("/"))
                    ended = output.finish_reason is FinishReason.STOP
                    finished.append(Continuation(prompt, seed, tuple(tokens[key]), texts[key], ended, math.nan))
                    progress.advance(task)
    return finished


@torch.inference_mode()
def _with_nll(
    model: LoadedModel, prompts: Sequence[Prompt], continuations: Sequence[Continuation]
) -> list[Continuation]:
    """The same with their NLL; each prompt is read once for all of its continuations."""
    result: list[Continuation] = []
    for index, members in groupby(continuations, key=lambda c: c.prompt):
        group = list(members)
        nll = _nll(model, prompts[index].token_ids, [c.token_ids for c in group])
        result += [
            Continuation(c.prompt, c.seed, c.token_ids, c.text, c.ended, n) for c, n in zip(group, nll, strict=True)
        ]
    return result


def _nll(model: LoadedModel, head: Sequence[int], tails: Sequence[Sequence[int]]) -> list[float]:
    longest = max(map(len, tails))
    if longest == 0:
        return [0.0] * len(tails)
    first = model.model(torch.tensor([head]), use_cache=True, logits_to_keep=1)
    rows, real = padded(tails)
    logits = first.logits.expand(len(tails), -1, -1)
    if longest > 1:
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(tails))
        logits = torch.cat([logits, model.model(rows[:, :-1], past_key_values=cache).logits], dim=1)
    nll = F.cross_entropy(logits.float().transpose(1, 2), rows, reduction="none")
    sums: list[float] = (nll * real).sum(1).tolist()
    return sums
