"""The pack's score, and other detectors, as classifiers of whole texts: the largest score over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steerserve.lab.concept_eval.teacher_forced import scores_of
from steerserve.lab.concept_eval.texts import READ_TOKENS, Corpus
from steerserve.lab.concept_eval.treatments import Treatment, scaled
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import LoadedModel
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack
from steerserve.types import ConceptTarget, DirectionTarget, FloatArray, Guard, GuardAction, Site, SteeringSpec, Target

BATCH_SIZE = 16
FALSE_POSITIVE_RATE = 0.01
MAX_COMPARED = 200

Scores = npt.NDArray[np.float32]


def guard_scores(
    model: LoadedModel, targets: Sequence[tuple[Target, ConceptPack | None]], texts: Sequence[str]
) -> Scores:
    """``[targets, texts]`` the largest score of each target over a text's first ``READ_TOKENS`` tokens.

    Scores are those that guards of the targets would read; a concept comes with its pack.
    """
    packs = {pack.name: pack for _, pack in targets if pack is not None}
    guards = tuple(Guard(target, 0.0, GuardAction.FLAG) for target, _ in targets)
    treatment = Treatment(Catalog(model, {}, packs), SteeringSpec(guards=guards))
    parts = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenize(model, texts[start : start + BATCH_SIZE], READ_TOKENS)
        scores = scores_of(model, treatment, batch.tokens)
        parts.append(scores.masked_fill(~batch.text[..., None], -torch.inf).amax(1).T)
    joined: Scores = torch.cat(parts, dim=1).numpy()
    return joined


def detection(model: LoadedModel, pack: ConceptPack, probe: tuple[Site, FloatArray], corpus: Corpus) -> dict[str, Any]:
    """The pack's own detector, the sum of its edited features, and a linear probe fitted on train texts."""
    site, weights = probe
    detectors: dict[str, tuple[Target, ConceptPack | None]] = {"detector": (ConceptTarget(pack.name), pack)}
    features = _feature_reader(pack)
    if features is not None:
        detectors["features"] = (ConceptTarget(features.name), features)
    detectors["probe"] = (DirectionTarget(site, weights), None)
    positive = guard_scores(model, list(detectors.values()), corpus.positive)
    negative = guard_scores(model, list(detectors.values()), corpus.negative)
    threshold = pack.card.detector.threshold
    return {
        "positive_texts": len(corpus.positive),
        "negative_texts": len(corpus.negative),
        "kind": pack.card.detector.kind,
        "site": pack.card.detector.site,
        "threshold": threshold,
        "true_positive_rate": float((positive[0] > threshold).mean()),
        "false_positive_rate": float((negative[0] > threshold).mean()),
        "detectors": {name: _figures(positive[i], negative[i]) for i, name in enumerate(detectors)},
    }


def probe_auroc(model: LoadedModel, site: Site, weights: FloatArray, corpus: Corpus) -> float:
    """Of a linear probe, on at most ``MAX_COMPARED`` texts of each kind."""
    targets: list[tuple[Target, ConceptPack | None]] = [(DirectionTarget(site, weights), None)]
    positive = guard_scores(model, targets, corpus.positive[:MAX_COMPARED])[0]
    negative = guard_scores(model, targets, corpus.negative[:MAX_COMPARED])[0]
    return _figures(positive, negative)["auroc"]


def _figures(positive: Scores, negative: Scores) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    labels = np.arange(len(positive) + len(negative)) < len(positive)
    cut = np.quantile(negative, 1 - FALSE_POSITIVE_RATE)
    return {
        "auroc": float(roc_auc_score(labels, np.concatenate([positive, negative]))),
        "true_positive_rate_at_1_percent": float((positive > cut).mean()),
    }


def _feature_reader(pack: ConceptPack) -> ConceptPack | None:
    """The pack with Σ f / max_activation of its edited features for a score, at its last site that has any."""
    tensors = pack.tensors
    features = tensors.edited & (tensors.feature_ids >= 0)
    if not features.any():
        return None
    site = int(tensors.site[features].max())
    weight = np.where(features & (tensors.site == site), 1 / tensors.max_activation, 0.0).astype(np.float32)
    card = pack.card.model_copy(
        update={
            "name": f"{pack.name}-features",
            "detector": pack.card.detector.model_copy(update={"site": pack.card.sites[site]}),
        }
    )
    return scaled(ConceptPack(card, replace(tensors, weight=weight), ""), 1.0)
