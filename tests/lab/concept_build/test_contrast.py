"""Planted words and features are found, and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from steerserve.errors import AssetError
from steerserve.lab.concept_build.contrast import auroc, contrast_features, contrast_words
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site

COMMON = ["the", "a", "house", "tree", "walks", "green", "seven", "and"]


def texts(count: int, seed: int, *planted: tuple[str, float]) -> list[str]:
    """Random common words; each planted word is put into its share of the texts."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = rng.choices(COMMON, k=8)
        words += [word for word, share in planted if rng.random() < share]
        rng.shuffle(words)
        made.append(" ".join(words))
    return made


def test_planted_words_are_found() -> None:
    """``dog`` is frequent, ``Leash`` rare and capital; ``house`` is common and ``bird`` belongs to the others."""
    positive = texts(200, 0, ("dog", 0.8), ("Leash", 0.1), ("bird", 0.01))
    negative = texts(200, 1, ("dog", 0.05), ("bird", 0.5))
    words = contrast_words(positive, negative)
    assert [word.word for word in words] == ["dog", "leash"]
    dog = words[0]
    assert dog.positive == sum("dog" in text for text in positive)
    assert dog.negative == sum("dog" in text for text in negative)
    assert dog.z > words[1].z > 3


def test_a_text_counts_a_word_once() -> None:
    """One text that is full of a word does not make it a word of the concept."""
    positive = [*texts(100, 0, ("dog", 0.5)), " ".join(["spam"] * 500)]
    assert [word.word for word in contrast_words(positive, texts(100, 1))] == ["dog"]


def test_texts_without_a_contrast_are_refused() -> None:
    with pytest.raises(AssetError, match=r"50 positive texts from the 60 negative.*give a word list"):
        contrast_words(texts(50, 0), texts(60, 1))


def test_auroc_is_the_known_one_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores = np.maximum(rng.standard_normal((60, 5)), 0).astype(np.float32)
    scores[:20] += np.arange(5)
    expected = [roc_auc_score(np.arange(60) < 20, column) for column in scores.T]
    np.testing.assert_allclose(auroc(scores, 20), expected)
    assert auroc(np.zeros((4, 1), np.float32), 2) == 0.5


def test_a_feature_that_fires_on_one_letter_is_found(tiny: LoadedModel, random_sae: SAE, token_id) -> None:
    """Feature 5 is made to read the embedding of Z."""
    embedding = tiny.model.get_input_embeddings().weight.detach()
    W_enc = random_sae.W_enc.clone()
    unit = embedding[token_id("Z")] / embedding[token_id("Z")].norm()
    W_enc[:, 5] = unit
    threshold = random_sae.threshold.clone()
    threshold[5] = 0.6 * embedding[token_id("Z")].norm()
    sae = replace(random_sae, site=Site.parse("blocks.0.hook_resid_pre"), W_enc=W_enc, threshold=threshold)
    sae = replace(sae, b_dec=torch.zeros(32), b_enc=torch.zeros(48))
    positive, negative = texts(40, 0, ("aZa", 1.0)), texts(40, 1)
    (contrast,) = contrast_features(tiny, [sae], positive, negative)
    assert contrast.candidates(1) == [5]
    assert contrast.auroc[5] > 0.9
    assert contrast.density_positive[5] > 0.9 > 0.1 > contrast.density_negative[5]
    assert all(contrast.density_positive[i] >= contrast.density_negative[i] for i in contrast.candidates(48))
