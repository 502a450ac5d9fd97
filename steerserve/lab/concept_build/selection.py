"""Which features a pack edits: candidates by contrast, a shortlist by first-order effect, each proved by its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from steerserve.errors import AssetError
from steerserve.lab.concept_build.completions import Completions
from steerserve.lab.concept_build.contexts import Contexts
from steerserve.lab.concept_build.contrast import contrast_features
from steerserve.lab.concept_build.effects import Attribution, attribute, measure_effects
from steerserve.lab.concept_build.shortlists import Shortlists
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_eval.texts import Corpus
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Op

SHORTLIST = 1.25
"""Features whose effect is measured, per feature that is wanted."""


@dataclass(frozen=True)
class SelectionConfig:
    """How features are chosen.

    Attributes:
        num_features: edited ones, over all sites.
        num_candidates: of each SAE, by contrast.
        num_detector_features: of each SAE, by contrast, for the detector.
        num_proof_contexts: on which each feature is measured: those where the estimate is largest.
        max_texts: of each kind.
        shortlists: candidates of SAEs in place of those by contrast; they too are taken only if their effect is shown.
    """

    num_features: int = 128
    num_candidates: int = 1024
    num_detector_features: int = 64
    num_proof_contexts: int = 8
    max_texts: int = 1500
    shortlists: Shortlists = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows to edit, at the sites that have any, and rows for the detector at every site; in model order.

    Attributes:
        gradients: ``[m, d]`` at the last edited site, as of ``Attribution``.
        effect: what was measured of each edited feature, by site and feature: change of log Σ P(completion).
    """

    edited: list[SiteRows]
    detector: list[SiteRows]
    gradients: torch.Tensor
    effect: dict[str, dict[int, float]]


def choose_rows(
    model: LoadedModel,
    saes: Sequence[SAE],
    op: Op,
    train: Corpus,
    contexts: Contexts,
    completions: Completions,
    config: SelectionConfig,
) -> Selection:
    """Features that fire in positive texts and whose edit by ``op`` is shown to change the concept's words.

    Raises:
        AssetError: no feature does.
    """
    positive, negative = train.positive[: config.max_texts], train.negative[: config.max_texts]
    contrasts = contrast_features(model, saes, positive, negative)
    attributions = attribute(model, saes, contexts, completions)
    telling = [contrast.candidates(config.num_candidates) for contrast in contrasts]
    candidates = [list(config.shortlists.get(sae.sha256, of)) for sae, of in zip(saes, telling, strict=True)]
    shortlist = _shortlist(attributions, candidates, round(SHORTLIST * config.num_features))
    proved = _prove(model, saes, attributions, shortlist, op, contexts, completions, config.num_proof_contexts)
    strongest = _strongest(proved, len(saes), config.num_features)
    edited, effect, gradients = [], {}, attributions[-1].gradients
    for sae, attribution, features in zip(saes, attributions, strongest, strict=True):
        if features:
            edited.append(SiteRows.of_sae(sae, list(features), attribution.max_activation[list(features)]))
            effect[str(sae.site)] = features
            gradients = attribution.gradients
    if not edited:
        raise AssetError(f"no feature of {', '.join(sae.name for sae in saes)} changes how likely the words are")
    detector = [
        SiteRows.of_sae(sae, chosen, attribution.max_activation[chosen])
        for sae, attribution, features in zip(saes, attributions, telling, strict=True)
        if (chosen := features[: config.num_detector_features])
    ]
    return Selection(edited, detector, gradients, effect)


def _shortlist(attributions: Sequence[Attribution], candidates: Sequence[list[int]], count: int) -> list[list[int]]:
    """For each SAE, its share of the ``count`` candidates with the largest positive effect, largest first."""
    effects = [
        (float(attribution.effect[feature]), index, feature)
        for index, (attribution, features) in enumerate(zip(attributions, candidates, strict=True))
        for feature in features
        if attribution.effect[feature] > 0
    ]
    chosen = sorted(effects, reverse=True)[:count]
    return [[feature for _, of, feature in chosen if of == index] for index in range(len(attributions))]


@dataclass(frozen=True)
class _Proved:
    sae: int
    feature: int
    estimate: float
    measured: float


def _prove(
    model: LoadedModel,
    saes: Sequence[SAE],
    attributions: Sequence[Attribution],
    shortlist: Sequence[list[int]],
    op: Op,
    contexts: Contexts,
    completions: Completions,
    num_proofs: int,
) -> list[_Proved]:
    """Those of the shortlist whose edit, alone, moves the words the way it should."""
    proved = []
    sign = 1 if op is Op.ADD else -1
    for index, (sae, attribution, features) in enumerate(zip(saes, attributions, shortlist, strict=True)):
        if not features:
            continue
        rows = SiteRows.of_sae(sae, features, attribution.max_activation[features])
        best = attribution.by_context[:, features].float().topk(min(num_proofs, len(contexts)), dim=0).indices.T
        value = rows.max_activation if op is Op.ADD else torch.zeros(len(rows))
        measured = measure_effects(model, rows, op, value, contexts, best, completions)
        for feature, change in zip(features, measured.tolist(), strict=True):
            if sign * change > 0:
                proved.append(_Proved(index, feature, float(attribution.effect[feature]), change))
    return proved


def _strongest(proved: Sequence[_Proved], num_saes: int, count: int) -> list[dict[int, float]]:
    """For each SAE, what was measured of its share of the ``count`` with the largest estimate."""
    chosen = sorted(proved, key=lambda feature: -feature.estimate)[:count]
    return [{each.feature: each.measured for each in chosen if each.sae == index} for index in range(num_saes)]
