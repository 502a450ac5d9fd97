"""Sparse probes on texts whose labels follow from one letter, and on an SAE one feature of which is that letter."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from steerserve.errors import AssetError
from steerserve.lab.corpus import Document, Split
from steerserve.lab.evaluation.probing import auroc_interval, labels_to_probe, pool, probe_labels, separation
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

from .conftest import TokenId

EMBEDDINGS = Site(0, Stream.RESID_PRE)
PLANTED = 17


@pytest.fixture
def letter_sae(tiny: LoadedModel, random_sae: SAE, token_id: TokenId) -> SAE:
    """Feature 17 fires on the letter Q and on nothing else; the others are random, and silent on Q."""
    embeddings = tiny.model.get_input_embeddings().weight.detach()
    direction = embeddings[token_id("Q")] / embeddings[token_id("Q")].norm()
    scores = (embeddings @ direction).sort(descending=True).values
    sae = replace(random_sae, site=EMBEDDINGS, apply_b_dec_to_input=False)
    sae.W_enc[:] -= direction[:, None] * (direction @ sae.W_enc)
    sae.b_enc.zero_()
    sae.W_enc[:, PLANTED] = direction
    sae.threshold[PLANTED] = scores[:2].mean()
    return sae


@pytest.fixture
def documents() -> dict[Split, list[Document]]:
    """A third of the texts holds a Q, and is labelled so."""
    rng = random.Random(0)

    def document(number: int) -> Document:
        letters = rng.choices("abcdefghij klm", k=rng.randint(5, 20))
        if number % 3 == 0:
            letters.insert(rng.randrange(1, 5), "Q")
        return Document("".join(letters), "q" if number % 3 == 0 else "none")

    return {split: [document(n) for n in range(size)] for split, size in zip(Split, (120, 60, 60), strict=True)}


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_planted_feature_is_the_one_feature_probe(
    tiny: LoadedModel, letter_sae: SAE, documents: dict[Split, list[Document]], pooling: str
) -> None:
    (task,) = probe_labels(tiny, letter_sae, documents, 64, pooling)
    assert task.label == "q"  # the rarer of the two
    assert task.positives == {"train": 40, "validation": 20, "test": 20}
    assert task.texts == {"train": 120, "validation": 60, "test": 60}
    probes = {(probe.basis, probe.k): probe for probe in task.probes}
    assert set(probes) == {(basis, k) for basis in ("features", "activation") for k in (1, 5, 20, None)}
    best = probes["features", 1]
    assert best.chosen == (PLANTED,)
    assert (best.auroc.value, best.accuracy) == (1, 1)
    if pooling == "mean":
        assert probes["activation", 1].auroc.value < 0.98  # a letter is no coordinate
    assert len(set(probes["features", 20].chosen)) == 20
    assert probes["features", 20].chosen[:1] == best.chosen


def test_labels_that_say_nothing_cannot_be_read(
    tiny: LoadedModel, letter_sae: SAE, documents: dict[Split, list[Document]]
) -> None:
    """Test texts do not reach the fit: with labels drawn at random, no probe is far from 0.5."""
    rng = random.Random(1)
    shuffled = {s: [Document(d.text, rng.choice("ab")) for d in of] for s, of in documents.items()}
    (task,) = probe_labels(tiny, letter_sae, shuffled, 64, "mean")
    for probe in task.probes:
        assert probe.auroc.low < 0.55
        assert probe.auroc.high > 0.45


def test_every_one_of_several_labels_is_set_against_the_rest(
    tiny: LoadedModel, letter_sae: SAE, documents: dict[Split, list[Document]]
) -> None:
    three = {
        split: [replace(d, label="short" if d.label == "none" and len(d.text) < 10 else d.label) for d in of]
        for split, of in documents.items()
    }
    tasks = probe_labels(tiny, letter_sae, three, 64, "max")
    assert [task.label for task in tasks] == ["none", "q", "short"]
    assert sum(task.positives["test"] for task in tasks) == 60
    assert tasks[1].to_dict()["probes"][0]["auroc"]["value"] == 1


@pytest.mark.parametrize(
    "labels",
    [["a"] * 40, ["a"] * 36 + ["b"] * 4, [""] * 40, []],
    ids=["one class", "too few", "no labels", "no texts"],
)
def test_labels_without_a_contrast_are_refused_with_their_counts(labels: list[str]) -> None:
    texts = dict.fromkeys(Split, labels)
    with pytest.raises(AssetError) as error:
        labels_to_probe(texts)
    counts = {label: labels.count(label) for label in labels}
    assert f"train: {counts or 'no texts'}; validation:" in str(error.value)


def test_texts_without_a_token_do_not_count(
    tiny: LoadedModel, letter_sae: SAE, documents: dict[Split, list[Document]]
) -> None:
    documents[Split.TEST] = [replace(d, text="" if d.label == "q" else d.text) for d in documents[Split.TEST]]
    with pytest.raises(AssetError, match=r"test: \{'none': 40\}"):
        probe_labels(tiny, letter_sae, documents, 64, "mean")


def test_a_label_that_one_split_lacks_is_left_out() -> None:
    labels = {split: ["a", "b", "c"] * 5 for split in Split}
    labels[Split.VALIDATION] = ["a", "b"] * 5
    assert labels_to_probe(labels) == ["a", "b"]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_text_is_pooled_by_itself(tiny: LoadedModel, letter_sae: SAE, pooling: str) -> None:
    """Padding and neighbours in its batch change nothing; the first position is left out."""
    texts = ["a Q and more", "b", "a much longer text, of more than one word", ""]
    pooled = pool(tiny, letter_sae, [Document(text, text) for text in texts], 64, pooling)
    assert sorted(pooled.labels) == sorted(texts[:3])  # an empty text has no position to read
    for features, activation, text in zip(pooled.features, pooled.activation, pooled.labels, strict=True):
        rows = tiny.model.get_input_embeddings()(torch.tensor(tiny.tokenizer(text).input_ids)).detach()
        for found, expected in ((activation, rows), (features, letter_sae.encode(rows))):
            one = expected.mean(0) if pooling == "mean" else expected.amax(0)
            np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-6)


def test_a_text_is_cut_at_the_context(tiny: LoadedModel, letter_sae: SAE) -> None:
    pooled = pool(tiny, letter_sae, [Document("abcdefgQ"), Document("abcdefg")], 8, "mean")
    np.testing.assert_allclose(pooled.features[0], pooled.features[1], rtol=1e-5)


def test_the_interval_of_the_auroc_covers() -> None:
    """95 of 100 intervals hold the true area, Φ(1/√2) for normal scores one deviation apart; ties count half."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        positive, negative = rng.normal(1, 1, 40), rng.normal(0, 1, 70)
        found = auroc_interval(positive, negative)
        covered += found.low <= 0.7602499 <= found.high
    assert 0.91 <= covered / 400 <= 0.98
    positive, negative = rng.integers(0, 4, 30).astype(float), rng.integers(0, 3, 20).astype(float)
    truth = np.repeat([True, False], [30, 20])
    expected = roc_auc_score(truth, np.concatenate([positive, negative]))
    assert auroc_interval(positive, negative).value == pytest.approx(expected)


def test_a_column_that_does_not_vary_separates_nothing() -> None:
    x = np.array([[0, 1, 3], [0, 1, 2], [0, 5, 3], [0, 6, 2]], dtype=np.float32)
    scores = separation(x, np.array([True, True, False, False]))
    assert scores[0] == scores[2] == 0
    assert scores[1] > 0
