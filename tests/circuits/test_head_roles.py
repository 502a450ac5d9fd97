"""Where heads look, against attention patterns that are written down by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from steerserve.circuits.head_roles import Role, head_roles
from steerserve.circuits.prompts import PromptPairs


def pairs_of(rows: list[list[int]], correct: list[int], wrong: list[int]) -> PromptPairs:
    clean = torch.tensor(rows)
    last = torch.full((len(rows),), clean.shape[1] - 1)
    return PromptPairs("t", clean, clean.roll(1, 0), last, tuple((c,) for c in correct), tuple((w,) for w in wrong), ())


class Attending:
    """Stands for a model: head 0 of layer 0 attends evenly, head 1 to the token before, head 2 to position 1."""

    def __init__(self) -> None:
        self.model = self
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.asked: list[str] = []

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name
        self.asked.append(name)

    def __call__(self, tokens: torch.Tensor, **_: object) -> SimpleNamespace:
        n, length = tokens.shape
        even = torch.ones(length, length).tril()
        even = even / even.sum(-1, keepdim=True)
        before = torch.zeros(length, length)
        before[range(1, length), range(length - 1)] = 1
        first = torch.zeros(length, length)
        first[1:, 1] = 1
        return SimpleNamespace(attentions=(torch.stack([even, before, first]).expand(n, 3, length, length),))


def test_every_role_is_its_place() -> None:
    model = Attending()
    # positions: 0   1   2   3   4   5
    roles = head_roles(model, pairs_of([[0, 11, 12, 11, 13, 14]] * 20, correct=[12] * 20, wrong=[11] * 20))
    assert model.asked == ["eager", "sdpa"]
    attention = {role: values[0].tolist() for role, values in roles.attention.items()}
    assert attention[Role.PREVIOUS_TOKEN][1] == 1
    assert attention[Role.DUPLICATE_TOKEN] == [pytest.approx(1 / 4), 0, 1]  # of position 3: position 1
    assert attention[Role.INDUCTION] == [pytest.approx(1 / 4), 1, 0]  # of position 3: position 2
    assert attention[Role.WRONG_ANSWER] == [pytest.approx(1 / 6), 0, 0]  # of position 5: position 3
    assert attention[Role.CORRECT_ANSWER] == [pytest.approx(1 / 6), 0, 0]  # of position 5: position 2
    for role, values in attention.items():
        assert values[0] == pytest.approx(roles.uniform[role])
    assert roles.strongest(Role.INDUCTION, 2) == [(0, 1, 1.0), (0, 0, pytest.approx(1 / 4))]


def test_a_role_that_no_prompt_has_is_missing() -> None:
    roles = head_roles(Attending(), pairs_of([[1, 2, 3, 4]], correct=[9], wrong=[8]))
    assert list(roles.attention) == [Role.PREVIOUS_TOKEN]
    assert json.loads(json.dumps(roles.to_dict()))["num_prompts"] == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_attention_of_real_layers_sums_to_one(load_exact, make_pairs, family: str) -> None:
    model = load_exact(family)
    pairs = make_pairs()
    before = model.model.config._attn_implementation
    roles = head_roles(model, pairs)
    assert model.model.config._attn_implementation == before
    for values in roles.attention.values():
        assert values.shape[0] == model.n_layers
        assert ((values >= 0) & (values <= 1 + 1e-9)).all()
