"""Activation functions give an element the same bits wherever it stands and however many threads share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from steerserve.models.rowwise import row_activation

NUM_ROWS = 150
PARTS = ((0, 1), (0, 13), (1, NUM_ROWS), (3, 8), (7, 132))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    num_threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(num_threads)


def rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(1, NUM_ROWS, width, generator=torch.Generator().manual_seed(0))).to(dtype)


def depends_on_company(function, x: torch.Tensor, set_threads) -> bool:
    set_threads(1)
    alone = torch.cat([function(x[:, row : row + 1]) for row in range(NUM_ROWS)], dim=1)
    for num_threads in (1, 2, 3, 5):
        set_threads(num_threads)
        if not all(torch.equal(function(x[:, begin:end]), alone[:, begin:end]) for begin, end in PARTS):
            return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [37, 576, 1536])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_bits_depend_on_no_neighbour_and_no_thread(name, width, dtype, set_threads) -> None:
    assert not depends_on_company(row_activation(ACT2FN[name]), rows(width, dtype), set_threads)


def test_those_of_torch_do(set_threads) -> None:
    """If this fails, ``row_activation`` can go."""
    assert depends_on_company(F.silu, rows(37, torch.float32), set_threads)


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 5, 37), (2, 3, 64), (1, 700, 64), (1, 0, 64)])
def test_values_are_those_of_torch(shape) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(row_activation(F.silu)(x), F.silu(x))
