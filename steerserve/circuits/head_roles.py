"""What heads attend to: the patterns by which the literature names them.

*Previous-token* and *induction* heads after Olsson et al. 2022, *duplicate-token*, *S-inhibition* and *name-mover*
heads after Wang et al. 2022. A pattern says where a head looks, not what it writes; whether that matters is for ACDC.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from steerserve.circuits.prompts import PromptPairs
from steerserve.models.loading import LoadedModel

BATCH_SIZE = 16


class Role(StrEnum):
    """A place that a head looks at."""

    PREVIOUS_TOKEN = "previous token"
    """From every position, the one before."""
    DUPLICATE_TOKEN = "duplicate token"
    """From a token that occurred before, the earlier occurrences."""
    INDUCTION = "induction"
    """From a token that occurred before, what came after the earlier occurrences."""
    WRONG_ANSWER = "S-inhibition"
    """From the last position, the last occurrence of a wrong answer."""
    CORRECT_ANSWER = "name mover"
    """From the last position, the occurrences of a correct answer."""


@dataclass(frozen=True, eq=False)
class HeadRoles:
    """Mean attention of every head to the place of every role, over clean prompts that have such a place.

    Attributes:
        attention: by role ``[layers, heads]`` in [0, 1]; roles of which no prompt has a place are missing.
        uniform: by role what a head that attends evenly would have.
    """

    task: str
    num_prompts: int
    attention: dict[Role, torch.Tensor]
    uniform: dict[Role, float]

    def strongest(self, role: Role, count: int) -> list[tuple[int, int, float]]:
        """``(layer, head, attention)`` of the heads that look there most."""
        values = self.attention[role]
        order = values.flatten().argsort(descending=True)[:count].tolist()
        heads = values.shape[1]
        return [(index // heads, index % heads, float(values.flatten()[index])) for index in order]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task,
            "num_prompts": self.num_prompts,
            "attention": {str(role): values.tolist() for role, values in self.attention.items()},
            "uniform": {str(role): value for role, value in self.uniform.items()},
        }


@torch.inference_mode()
def head_roles(model: LoadedModel, pairs: PromptPairs) -> HeadRoles:
    """Read the attention of every head on the clean prompts."""
    sums: dict[Role, torch.Tensor] = {}
    evenly: dict[Role, float] = dict.fromkeys(Role, 0.0)
    counts: dict[Role, int] = dict.fromkeys(Role, 0)
    with _eager_attention(model):
        for start in range(0, len(pairs), BATCH_SIZE):
            batch = pairs.take(range(start, min(start + BATCH_SIZE, len(pairs))))
            output = model.model(batch.clean, use_cache=False, output_attentions=True, logits_to_keep=1)
            patterns = torch.stack(output.attentions, dim=1).double()  # [n, layers, heads, T, T]
            for role, query, keys in (place for index in range(len(batch)) for place in _places(batch, index)):
                place = patterns[query[0], :, :, query[1], keys].sum(-1)
                sums[role] = sums.get(role, torch.zeros_like(place)) + place
                evenly[role] += len(keys) / (query[1] + 1)
                counts[role] += 1
    return HeadRoles(
        pairs.name,
        len(pairs),
        {role: sums[role] / counts[role] for role in Role if role in sums},
        {role: evenly[role] / counts[role] for role in Role if role in sums},
    )


def _places(pairs: PromptPairs, index: int) -> Iterator[tuple[Role, tuple[int, int], list[int]]]:
    """Of one prompt: each role, the ``(row, position)`` that looks, and the positions looked at."""
    last = int(pairs.last[index])
    tokens: list[int] = pairs.clean[index, : last + 1].tolist()
    for position in range(1, last + 1):
        yield Role.PREVIOUS_TOKEN, (index, position), [position - 1]
        earlier = [at for at in range(position) if tokens[at] == tokens[position]]
        if earlier:
            yield Role.DUPLICATE_TOKEN, (index, position), earlier
            yield Role.INDUCTION, (index, position), [at + 1 for at in earlier]
    correct = [at for at in range(last) if tokens[at] in pairs.correct[index]]
    wrong = [at for at in range(last) if tokens[at] in pairs.wrong[index]]
    if wrong:
        yield Role.WRONG_ANSWER, (index, last), wrong[-1:]
    if correct:
        yield Role.CORRECT_ANSWER, (index, last), correct


@contextmanager
def _eager_attention(model: LoadedModel) -> Iterator[None]:
    """Other implementations do not give their patterns."""
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)
