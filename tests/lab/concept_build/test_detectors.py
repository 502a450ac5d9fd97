"""The better of two detectors is kept, at the site where it is better, with a threshold that benign texts respect."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.lab.concept_build.detectors import Detector, choose_detector, text_scores
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_eval.texts import READ_TOKENS
from steerserve.lab.pooled_probe import LabelledTexts
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site

PRE, POST = Site.parse("blocks.0.hook_resid_pre"), Site.parse("blocks.1.hook_resid_post")


def texts(count: int, seed: int, letter: str) -> list[str]:
    """Random letters a to m; with ``letter`` once, not at the start."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        letters = rng.choices("abcdefghijklm", k=14)
        letters.insert(rng.randrange(2, 14), letter)
        made.append("".join(letters))
    return made


TRAIN = LabelledTexts(texts(80, 0, "Z"), texts(80, 1, "a"))
VALIDATION = LabelledTexts(texts(60, 2, "Z"), texts(150, 3, "a"))


def feature_of(tiny: LoadedModel, sae: SAE, token: int) -> SAE:
    """Feature 0 at ``PRE`` fires on one token, and the others on nothing."""
    embedding = tiny.model.get_input_embeddings().weight.detach()[token]
    W_enc = torch.zeros_like(sae.W_enc)
    W_enc[:, 0] = embedding / embedding.norm() ** 2
    zero = torch.zeros(48)
    threshold = torch.full((48,), 0.8)
    return replace(sae, site=PRE, W_enc=W_enc, b_enc=zero, b_dec=torch.zeros(32), threshold=threshold)


def check(model: LoadedModel, detector: Detector) -> None:
    """The threshold is exceeded by at most 1 % of negative validation texts, and by most positive ones."""
    scores = text_scores(model, detector.rows, detector.weight, VALIDATION.all)
    positive, negative = scores[:60], scores[60:]
    assert (negative > detector.threshold).mean() <= 0.01
    assert (positive > detector.threshold).mean() > 0.8
    assert detector.threshold >= 0


def test_the_probe_wins_where_features_say_nothing(tiny: LoadedModel, random_sae: SAE, token_id) -> None:
    silent = feature_of(tiny, random_sae, token_id("Q"))
    rows = SiteRows.of_sae(silent, [0, 1], torch.ones(2))
    detector = choose_detector(tiny, [PRE, POST], [rows], TRAIN, VALIDATION)
    assert detector.kind == "probe"
    assert detector.auroc_features == 0.5
    assert detector.auroc_probe > 0.95
    assert detector.rows.feature_ids == (-1,)
    assert not detector.rows.W_dec.any(), "a probe edits nothing"
    check(tiny, detector)


def test_the_better_one_is_kept_and_both_are_recorded(tiny: LoadedModel, random_sae: SAE, token_id) -> None:
    """Labels that say nothing give a bad probe; a feature of the planted letter is perfect."""
    rows = SiteRows.of_sae(feature_of(tiny, random_sae, token_id("Z")), [0, 1], torch.ones(2))
    shuffled = LabelledTexts(TRAIN.negative[:40], TRAIN.negative[40:])
    blind = choose_detector(tiny, [POST], [], shuffled, VALIDATION)
    assert blind.auroc_probe < 0.9
    detector = choose_detector(tiny, [PRE], [rows], TRAIN, VALIDATION)
    assert detector.auroc_features == pytest.approx(1.0, abs=0.02)
    kinds = {"probe": detector.auroc_probe, "features": detector.auroc_features}
    assert kinds[detector.kind] == max(kinds.values())
    check(tiny, detector)


def test_a_text_scores_as_its_highest_token_whatever_stands_beside_it(tiny: LoadedModel, random_sae: SAE) -> None:
    rows = SiteRows.of_sae(random_sae, list(range(8)), torch.ones(8))
    weight = torch.linspace(-1, 1, 8)
    alone = np.concatenate([text_scores(tiny, rows, weight, [text]) for text in ("ab", "a longer text")])
    np.testing.assert_allclose(text_scores(tiny, rows, weight, ["ab", "a longer text"]), alone, rtol=1e-5, atol=1e-5)


def test_texts_are_scored_as_far_as_they_are_judged(tiny: LoadedModel, random_sae: SAE, token_id) -> None:
    rows = SiteRows.of_sae(feature_of(tiny, random_sae, token_id("Z")), [0], torch.ones(1))
    late = ["a" * place + "Z" for place in (READ_TOKENS - 1, READ_TOKENS)]
    assert (text_scores(tiny, rows, torch.ones(1), late) > 0).tolist() == [True, False]


def test_a_detector_follows_from_its_texts(tiny: LoadedModel) -> None:
    one, other = (choose_detector(tiny, [PRE], [], TRAIN, VALIDATION) for _ in range(2))
    assert torch.equal(one.rows.W_enc, other.rows.W_enc)
    assert one.threshold == other.threshold
