"""Shapes whose dimensions and angles are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from steerserve.circuits.geometry import describe, describe_layers
from steerserve.errors import InvalidRequestError
from steerserve.models.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir("llama")), torch.float32)


def circle(n: int, width: int = 5) -> torch.Tensor:
    """Evenly spaced directions in a plane."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    rows = torch.zeros(n, width, dtype=torch.float64)
    rows[:, 1], rows[:, 3] = angle.cos(), angle.sin()
    return rows


def test_a_circle_has_two_dimensions_whatever_the_lengths_are() -> None:
    lengths = torch.linspace(1, 1000, 12, dtype=torch.float64)[:, None]
    seen = describe("s", circle(12) * lengths)
    assert seen.participation_ratio == pytest.approx(2)
    assert seen.dimensions_90 == 2
    assert seen.mean_cosine == pytest.approx(-1 / 11)
    assert seen.norm_max == pytest.approx(1000)
    assert seen.norm_median == pytest.approx(lengths[:, 0].median().item())
    assert seen.cosine_to_previous is None


def test_a_line_has_one_dimension() -> None:
    rows = torch.tensor([[2.0, 0, 0], [-1, 0, 0], [5, 0, 0]], dtype=torch.float64)
    seen = describe("s", rows, previous=rows)
    assert seen.participation_ratio == pytest.approx(1)
    assert seen.dimensions_90 == 1
    assert seen.mean_cosine == pytest.approx(-1 / 3)
    assert seen.cosine_to_previous == pytest.approx(1)


def test_a_common_part_is_seen_in_the_angles_and_not_in_the_dimensions() -> None:
    rows = circle(12)
    rows[:, 0] = 3
    seen = describe("s", rows, previous=-rows)
    assert seen.mean_cosine > 0.85
    assert seen.participation_ratio == pytest.approx(2)
    assert seen.cosine_to_previous == pytest.approx(-1)


def test_padding_and_first_positions_do_not_count(model) -> None:
    tokens = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.arange(12) < torch.tensor([[12], [7], [9]])
    other = tokens.where(real, 65)
    geometry = describe_layers(model, "t", tokens, real)
    assert geometry.num_positions == 11 + 6 + 8
    assert geometry == describe_layers(model, "t", other, real)
    assert len(geometry.layers) == model.n_layers + 1
    assert json.loads(json.dumps(geometry.to_dict()))["layers"][0]["cosine_to_previous"] is None
    assert 0 < geometry.layers[1].cosine_to_previous < 1


def test_too_few_positions_are_refused(model) -> None:
    with pytest.raises(InvalidRequestError, match=r"texts.*2 positions.*at least 3"):
        describe_layers(model, "t", torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
