"""Weights keep their values, their ties and their layout when they move."""

from __future__ import annotations

import torch
from torch import nn

from steerserve.models.huge_pages import ALIGNMENT, move_to_huge_pages


class Tied(nn.Module):
    """An embedding that is its own unembedding, and layers of odd sizes and other types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 5)
        self.inner = nn.Linear(5, 7, dtype=torch.bfloat16)
        self.head = nn.Linear(5, 13, bias=False)
        self.head.weight = self.embed.weight


def test_weights_move_and_stay_what_they_were() -> None:
    torch.manual_seed(0)
    model = Tied()
    before = {name: (weight, weight.data_ptr(), weight.detach().clone()) for name, weight in model.named_parameters()}
    move_to_huge_pages(model)
    assert len(before) == 3
    for name, weight in model.named_parameters():
        same, old_address, values = before[name]
        assert weight is same
        assert weight.data_ptr() != old_address
        assert weight.data_ptr() % ALIGNMENT == 0
        assert weight.is_contiguous()
        assert torch.equal(weight, values)
    assert model.head.weight is model.embed.weight
    addresses = sorted((weight.data_ptr(), weight.nbytes) for weight in model.parameters())
    assert all(end <= begin for end, (begin, _) in zip((a + n for a, n in addresses), addresses[1:], strict=False))


def test_moved_weights_can_be_written_and_outlive_nothing_else() -> None:
    model = Tied()
    move_to_huge_pages(model)
    with torch.no_grad():
        model.embed.weight.fill_(2.0)
    assert torch.equal(model.head(torch.ones(5)), torch.full((13,), 10.0))
