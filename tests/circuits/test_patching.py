"""Patches that must bring all of the behaviour over, none of it, or exactly one head's share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from steerserve.circuits.forward import num_heads
from steerserve.circuits.metrics import logit_difference
from steerserve.circuits.patching import Direction, Part, Positions, patch
from steerserve.errors import InvalidRequestError

DIRECTIONS = list(Direction)


def column(result, name: str) -> list[float]:
    index = result.columns.index(name)
    return [row[index] for row in result.effect]


def test_positions_from_the_first_change_on_are_each_of_one_kind(make_pairs) -> None:
    pairs = make_pairs()
    kinds = torch.stack([kind.of(pairs) for kind in Positions])
    assert kinds[0].sum(1).tolist() == [3, 3, 3]
    expected = (torch.arange(10) >= 2) & pairs.real
    assert kinds.sum(0).equal(expected.long())
    assert kinds[2].nonzero()[:, 1].equal(pairs.last)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_changed_embeddings_are_all_of_the_difference(load_exact, make_pairs, direction) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    result = patch(model, pairs, logit_difference(pairs), Part.RESID_PRE, direction)
    assert column(result, "changed")[0] == pytest.approx(1, abs=1e-9)
    assert column(result, "between")[0] == pytest.approx(0, abs=1e-9)
    assert column(result, "last")[0] == pytest.approx(0, abs=1e-9)
    assert result.clean != result.corrupted
    assert len(result.effect) == model.n_layers


def test_a_late_patch_of_the_last_position_alone_is_all_of_the_difference(load_exact, make_pairs) -> None:
    """In the last layer heads still read other positions; behind it nothing does."""
    model, pairs = load_exact("gpt2", 2), make_pairs()
    for projection in model.adapter.out_projections(model.model)[1:]:
        torch.nn.init.zeros_(projection.weight)
    result = patch(model, pairs, logit_difference(pairs), Part.RESID_PRE)
    assert column(result, "last")[1] == pytest.approx(1, abs=1e-9)
    assert column(result, "changed")[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_only_head_that_writes_carries_everything(load_exact, make_pairs, direction) -> None:
    model, pairs = load_exact("llama", 1), make_pairs()
    (projection,) = model.adapter.out_projections(model.model)
    heads, width = num_heads(model), projection.weight.shape[1] // num_heads(model)
    with torch.no_grad():
        projection.weight.unflatten(1, (heads, width))[:, [0, 1, 3]] = 0
    result = patch(model, pairs, logit_difference(pairs), Part.HEADS, direction)
    assert result.columns == ("0", "1", "2", "3")
    assert result.effect[0] == pytest.approx((0, 0, 1, 0), abs=1e-9)


def test_noising_is_denoising_of_the_exchanged_pair(load_exact, make_pairs) -> None:
    model, pairs = load_exact("gpt_neox"), make_pairs()
    exchanged = replace(pairs, clean=pairs.corrupted, corrupted=pairs.clean)
    metric = logit_difference(pairs)
    noising = patch(model, pairs, metric, Part.MLP_OUT, Direction.NOISING)
    denoising = patch(model, exchanged, metric, Part.MLP_OUT, Direction.DENOISING)
    assert noising.effect == denoising.effect
    assert any(abs(value) > 0.01 for value in column(noising, "changed"))


def test_many_prompts_are_patched_like_few(load_exact, make_pairs) -> None:
    """More than fit into one pass."""
    model, pairs = load_exact("llama"), make_pairs(num=40)
    result = patch(model, pairs, logit_difference(pairs), Part.ATTN_OUT)
    first, rest = (pairs.take(part) for part in (range(33), range(33, 40)))
    parts = [patch(model, part, logit_difference(part), Part.ATTN_OUT) for part in (first, rest)]
    sizes = [33 / 40, 7 / 40]
    restored = [
        sum(size * (of.corrupted - of.clean) * column(of, "last")[1] for size, of in zip(sizes, parts, strict=True))
    ]
    assert column(result, "last")[1] * (result.corrupted - result.clean) == pytest.approx(restored[0], rel=1e-6)


def test_a_metric_that_sees_no_difference_is_refused(load_exact, make_pairs) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    same = replace(pairs, corrupted=pairs.clean)
    with pytest.raises(InvalidRequestError, match="metric logit_difference"):
        patch(model, same, logit_difference(same))


def test_the_result_is_plain_json(load_exact, make_pairs) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    result = patch(model, pairs, logit_difference(pairs), Part.MLP_OUT)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["part"] == "mlp_out"
    assert content["direction"] == "denoising"
    assert content["columns"] == ["changed", "between", "last"]
    assert len(content["effect"]) == 2
