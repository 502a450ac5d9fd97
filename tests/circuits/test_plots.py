"""Pictures hold what they are given."""

from __future__ import annotations

import pytest

from steerserve.circuits.plots import bars, curves, heat_map, save

pytest.importorskip("matplotlib")


def test_a_heat_map_has_a_row_a_layer_and_colours_centred_on_zero() -> None:
    axes = heat_map([[0.5, -2.0], [0.1, 1.0], [0.0, 0.0]], ["a", "b"], "title", "head").axes[0]
    (image,) = axes.images
    assert image.get_array().tolist() == [[0.5, -2.0], [0.1, 1.0], [0.0, 0.0]]
    assert image.get_clim() == (-2.0, 2.0)
    assert image.origin == "lower"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_a_heat_map_of_nothing_but_zeros_can_be_drawn(tmp_path) -> None:
    save(heat_map([[0.0]], ["a"], "title", "head"), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 0


def test_curves_stand_in_their_panels() -> None:
    figure = curves({"p": {"x": [1, 2], "y": [3, 4]}, "q": {"z": [5, 6]}}, ["emb", "0"], "title")
    first, second = figure.axes
    assert [line.get_ydata().tolist() for line in first.lines] == [[1, 2], [3, 4]]
    assert (first.get_ylabel(), second.get_ylabel()) == ("p", "q")
    assert first.get_legend() is not None
    assert second.get_legend() is None


def test_bars_stand_side_by_side() -> None:
    (axes,) = bars({"x": [1.0, -2.0], "y": [0.5, 0.25]}, ["7", "8"], "title").axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, -2.0, 0.5, 0.25]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["7", "8"]
