"""Probes find what can be read, find nothing in noise, and never see a group on both sides."""

from __future__ import annotations

import json

import pytest
import torch

from steerserve.circuits.forward import activations
from steerserve.circuits.layer_probes import Examples, examples_of_pairs, examples_of_texts, probe_layers
from steerserve.circuits.lens import residual_sites
from steerserve.errors import InvalidRequestError
from steerserve.models.loading import LoadedModel, load_model
from steerserve.types import Site, Stream

pytest.importorskip("sklearn")

SITE, OTHER = Site(0, Stream.RESID_PRE), Site(0, Stream.RESID_POST)


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> LoadedModel:
    return load_model(str(tiny_model_dir("llama")), torch.float32)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_what_is_linear_is_read_and_noise_is_not(model) -> None:
    labels = ["a", "b", "c"] * 40
    readable = noise(120, 8)
    for number, label in enumerate("abc"):
        readable[[each == label for each in labels], number] += 6
    found = probe_layers(model, Examples("t", {SITE: noise(120, 8), OTHER: readable}, labels, range(120)))
    nothing, everything = found.probes
    assert found.chance == pytest.approx(1 / 3)
    assert found.labels == ("a", "b", "c")
    assert abs(nothing.accuracy - 1 / 3) < 0.15
    assert everything.accuracy > 0.97
    assert everything.deviation < 0.05
    assert abs(everything.shuffled - 1 / 3) < 0.15
    assert (nothing.site, everything.site) == (str(SITE), str(OTHER))


def test_a_group_is_never_on_both_sides(model) -> None:
    """Every row occurs twice: a probe that had seen the one would know the other."""
    rows = noise(40, 200).repeat(2, 1)
    labels = ["a", "b"] * 40
    together = probe_layers(model, Examples("t", {SITE: rows}, labels, [*range(40)] * 2)).probes[0]
    apart = probe_layers(model, Examples("t", {SITE: rows}, labels, range(80))).probes[0]
    assert together.accuracy < 0.75
    assert apart.accuracy > 0.85


def test_the_last_token_is_the_same_until_heads_have_read(load_exact, make_pairs) -> None:
    model, pairs = load_exact("llama"), make_pairs(num=4)
    examples = examples_of_pairs(model, pairs)
    embedded, *later = (examples.rows[site] for site in residual_sites(model))
    assert embedded[:4].equal(embedded[4:])
    assert all((rows[:4] - rows[4:]).abs().min(0).values.max() > 0 for rows in later)
    assert examples.labels == ["clean"] * 4 + ["corrupted"] * 4
    assert examples.groups == [0, 1, 2, 3] * 2
    single = activations(model, pairs.corrupted[:1, : pairs.last[0] + 1], residual_sites(model))
    torch.testing.assert_close(later[-1][4], single[residual_sites(model)[-1]][0, -1])


def test_a_text_is_the_mean_of_its_positions_behind_the_first(model) -> None:
    examples = examples_of_texts(model, "t", ["abcdefgh", "a", "xyz"], ["l", "m", "n"], max_tokens=5)
    site = residual_sites(model)[-1]
    tokens = torch.tensor([model.tokenizer("abcde").input_ids])
    torch.testing.assert_close(examples.rows[site][0], activations(model, tokens, [site])[site][0, 1:].mean(0))
    assert examples.labels == ["l", "n"]


@pytest.mark.parametrize("labels", [["a"] * 20, ["a"] * 16 + ["b"] * 4])
def test_too_few_examples_are_refused(model, labels) -> None:
    with pytest.raises(InvalidRequestError, match=r"labels.*at least two labels, with 5 examples each"):
        probe_layers(model, Examples("t", {SITE: noise(20, 4)}, labels, range(20)))


def test_the_result_is_plain_json(model) -> None:
    found = probe_layers(model, Examples("t", {SITE: noise(20, 4)}, ["a", "b"] * 10, range(20)))
    assert json.loads(json.dumps(found.to_dict()))["probes"][0].keys() == {"site", "accuracy", "deviation", "shuffled"}
