"""The prompts of a trial: chosen first, on texts of one split; seeds are then derived from all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerserve.models.loading import LoadedModel

MAX_PROMPT_TOKENS = 128
USERS_TEXT = "[the user's text]"
"""Stands for it where a template is taken apart."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it; ``text`` is what it looks like."""

    text: str
    token_ids: tuple[int, ...]


def candidates(model: LoadedModel, texts: Sequence[str], chat: bool) -> list[Prompt]:
    """Prompts of at most ``MAX_PROMPT_TOKENS``: pairs of texts, a line each, or with ``chat`` a user's turn each."""
    prompts = [_turn(model, text) if chat else _plain(model, text) for text in (texts if chat else _pairs(texts))]
    return [prompt for prompt in prompts if len(prompt.token_ids) <= MAX_PROMPT_TOKENS]


def _pairs(texts: Sequence[str]) -> list[str]:
    return [f"{a}\n{b}\n" for a, b in zip(texts, [*texts[1:], *texts[:1]], strict=True)]


def _plain(model: LoadedModel, text: str) -> Prompt:
    return Prompt(text, tuple(model.tokenizer(text).input_ids))


def _turn(model: LoadedModel, text: str) -> Prompt:
    rendered = rendered_turn(model, text)
    return Prompt(rendered, tuple(model.tokenizer(rendered, add_special_tokens=False).input_ids))


def rendered_turn(model: LoadedModel, text: str, system: str | None = None) -> str:
    """A user's turn in the model's chat template, behind a system message if one is given, up to the answer."""
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return str(model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def opening(model: LoadedModel, instruction: str = "", system: str | None = None) -> str:
    """How such a turn begins, up to the user's own text, which may stand behind an ``instruction``."""
    return rendered_turn(model, f"{instruction}{USERS_TEXT}", system).partition(USERS_TEXT)[0]


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all prompts, in order."""
    return hashlib.sha256("\0".join(prompt.text for prompt in prompts).encode()).hexdigest()


def seeds_for(prompts: Sequence[Prompt], count: int) -> list[int]:
    """Seeds that depend on all the prompts, so that prompts cannot have been chosen for their seeds."""
    entropy = int(digest(prompts)[:32], 16)
    return [int(seed) for seed in np.random.SeedSequence(entropy).generate_state(count)]


def joined(prompt: str, continuation: str) -> str:
    """What is judged: the continuation, with the part of a word that the prompt left unfinished."""
    unfinished = re.search(r"\w*\Z", prompt)
    return unfinished[0] + continuation if unfinished and continuation[:1].isalnum() else continuation
