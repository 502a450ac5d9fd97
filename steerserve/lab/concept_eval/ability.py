"""What a treatment must not break: indirect object identification, and the next token of ordinary text.

A treated model is non-inferior if the lower one-sided 95 % bound of its accuracy minus the untreated model's is
above −1 point, paired item by item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from steerserve.lab.bootstrap import Resamples, one_sided
from steerserve.lab.concept_eval.benign import Reading
from steerserve.lab.concept_eval.outcome import Sums
from steerserve.lab.concept_eval.teacher_forced import earlier_layers, last_hidden, logits_of
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.tokens import padded
from steerserve.models.loading import LoadedModel

MARGIN = 0.01
BATCH_SIZE = 50

NAMES = (
    "Mary", "John", "Tom", "James", "Sarah", "Anna", "Mark", "Paul", "Peter", "David", "Michael", "Robert", "Alice",
    "Emma", "Jack", "Kate", "Laura", "Simon", "Susan", "Lucy", "Adam", "Henry", "George", "Rachel", "Martin",
    "Jane", "Helen", "Frank", "Steve", "Kevin", "Brian", "Emily", "Jessica", "Andrew", "Daniel", "Matthew", "Lisa",
)  # fmt: skip
PLACES = (
    "store", "park", "school", "office", "station", "garden", "library", "hospital", "restaurant", "market",
    "museum", "beach",
)  # fmt: skip
OBJECTS = (
    "book", "drink", "ring", "letter", "key", "ball", "necklace", "basket", "computer", "kiss", "phone", "ticket",
)  # fmt: skip
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {object} to",
    "Then, {first} and {second} had a long argument at the {place}. Afterwards {subject} said to",
    "After {first} and {second} left the {place}, {subject} handed a {object} to",
    "While {first} and {second} were working at the {place}, {subject} passed a {object} to",
    "{first} and {second} met at the {place} in the morning. {subject} decided to give a {object} to",
    "Friends {first} and {second} found a {object} at the {place}. {subject} offered it to",
)


@dataclass(frozen=True)
class IOIPrompt:
    """``text`` ends where the indirect object's name is due; ABBA if the indirect object is named first, else BABA."""

    text: str
    indirect_object: str
    subject: str
    template: str


def ioi_prompts(count: int, seed: int = 0) -> list[IOIPrompt]:
    """As many of ABBA as of BABA (one more if odd), all different."""
    rng = Random(seed)
    prompts: dict[str, IOIPrompt] = {}
    while len(prompts) < count:
        template = "ABBA" if len(prompts) % 2 == 0 else "BABA"
        indirect_object, subject = rng.sample(NAMES, 2)
        first, second = (indirect_object, subject) if template == "ABBA" else (subject, indirect_object)
        text = rng.choice(TEMPLATES).format(
            first=first, second=second, subject=subject, place=rng.choice(PLACES), object=rng.choice(OBJECTS)
        )
        prompts.setdefault(text, IOIPrompt(text, indirect_object, subject, template))
    return list(prompts.values())


def _question(model: LoadedModel, prompt: IOIPrompt) -> tuple[list[int], tuple[int, int]]:
    """Tokens up to where the two names part, and the next one of the indirect object's and of the subject's name."""
    tokenizer = model.tokenizer
    names = [tokenizer(f" {n}", add_special_tokens=False).input_ids for n in (prompt.indirect_object, prompt.subject)]
    common = next(i for i, (a, b) in enumerate(zip(*names, strict=False)) if a != b)
    return [*tokenizer(prompt.text).input_ids, *names[0][:common]], (names[0][common], names[1][common])


class IOI:
    """The task, with what does not depend on the treatment computed once."""

    def __init__(self, model: LoadedModel, prompts: Sequence[IOIPrompt], layer: int) -> None:
        """Treatments edit nothing before ``layer``."""
        self._model = model
        self._untreated = Treatment.none(model)
        asked = sorted((_question(model, prompt) for prompt in prompts), key=lambda question: len(question[0]))
        self._batches = []
        for start in range(0, len(asked), BATCH_SIZE):
            rows, names = zip(*asked[start : start + BATCH_SIZE], strict=True)
            tokens, _ = padded(rows)
            last = torch.tensor([len(row) - 1 for row in rows])
            self._batches.append((tokens, last, torch.tensor(names), *earlier_layers(model, layer, tokens)))

    def correct(self, treatment: Treatment) -> tuple[Sums, Sums]:
        """``[n]`` prompts at which the indirect object has the larger logit; ``[n]`` those that were edited."""
        correct, fired = [], []
        for tokens, last, names, earlier, plain in self._batches:
            at = torch.arange(len(tokens))
            if treatment is self._untreated:
                hidden, edited = plain, torch.zeros(tokens.shape)
            else:
                hidden, trace = last_hidden(self._model, treatment, tokens, earlier)
                edited = trace.relative_edit
            logits = logits_of(self._model, treatment, hidden[at, last]).gather(1, names)
            correct.append((logits[:, 0] > logits[:, 1]).double())
            fired.append(((edited > 0) & (torch.arange(tokens.shape[1]) <= last[:, None])).any(1).double())
        return torch.cat(correct).numpy(), torch.cat(fired).numpy()

    def measure(self, treatment: Treatment) -> Ability:
        """Accuracy with the treatment and without."""
        untreated, _ = self.correct(self._untreated)
        treated, fired = self.correct(treatment)
        return Ability.of(np.ones_like(treated), treated, untreated, float(fired.mean()))


@dataclass(frozen=True)
class Ability:
    """Accuracies over ``items``, in ``clusters`` texts; ``lower`` is the one-sided 95 % bound of the difference.

    Attributes:
        firing_rate: share of items (for IOI: prompts) at which something was edited.
    """

    items: int
    clusters: int
    untreated: float
    treated: float
    difference: float
    lower: float
    non_inferior: bool
    firing_rate: float

    @classmethod
    def of(cls, items: Sums, treated: Sums, untreated: Sums, firing_rate: float) -> Ability:
        """From sums over clusters."""
        draws = Resamples(len(items), draws=2000).ratio(treated - untreated, items)
        lower = one_sided(draws, 0.05)
        return cls(
            items=int(items.sum()),
            clusters=len(items),
            untreated=float(untreated.sum() / items.sum()),
            treated=float(treated.sum() / items.sum()),
            difference=float(draws[0]),
            lower=lower,
            non_inferior=lower > -MARGIN,
            firing_rate=firing_rate,
        )


def next_token(*readings: Reading) -> Ability:
    """How often the likeliest next token is the text's own, over all the readings' texts."""
    items, treated, untreated, fired = (
        np.concatenate([getattr(reading, name) for reading in readings])
        for name in ("tokens", "correct", "correct_untreated", "fired")
    )
    return Ability.of(items, treated, untreated, float(fired.sum() / items.sum()))
