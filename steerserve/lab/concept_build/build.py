"""From SAEs, or from none, and labelled texts to a concept pack.

The splits have one job each: rows are chosen, their operands and the detector fitted on *train*; how far the
operands go, which detector is kept and its threshold on *validation*; *test* is left to the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from steerserve.errors import AssetError
from steerserve.lab.concept_build.capped import capped_directions
from steerserve.lab.concept_build.completions import Completions
from steerserve.lab.concept_build.concept import Concept, Materials
from steerserve.lab.concept_build.contexts import Contexts, seed_of
from steerserve.lab.concept_build.detectors import Detector, choose_detector
from steerserve.lab.concept_build.directions import difference_of_means
from steerserve.lab.concept_build.draft import PackDraft
from steerserve.lab.concept_build.fitting import FitConfig, Pools, Start, fit_values
from steerserve.lab.concept_build.selection import SelectionConfig, choose_rows
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_build.strength import AMPLIFYING, SUPPRESSING, choose_strength
from steerserve.lab.concept_eval.prompts import candidates
from steerserve.lab.concept_eval.trial import Direction, Setting, Trial
from steerserve.lab.pooled_probe import LabelledTexts
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.catalog import refuse_unsteerable
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import ConceptPack
from steerserve.types import Op, Site

VALIDATION_TOKENS = 30_000


@dataclass(frozen=True)
class BuildConfig:
    """How a pack is made.

    Attributes:
        suppressing, amplifying: strengths tried, strongest first. To suppress, how far below the fitted operands,
            in multiples of the largest activation, or below a direction's mean, in multiples of the distance of the
            means; to amplify, a factor.
        directions: fitted beside the features to suppress, at the last site; none to amplify.
        detector_sites: where a probe may read; none: where the policy edits. What only reads a text stops behind it.
        on_policy_prompts: of positive texts, that the model goes on from once each.
        validation_prompts, validation_seeds: continuations on which strengths are compared; too few, and noise
            picks the strength.
    """

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    suppressing: tuple[float, ...] = SUPPRESSING
    amplifying: tuple[float, ...] = AMPLIFYING
    directions: int = 8
    detector_sites: tuple[Site, ...] = ()
    on_policy_prompts: int = 600
    validation_prompts: int = 100
    validation_seeds: int = 5


def build_from_features(
    model: LoadedModel, saes: Sequence[SAE], concept: Concept, config: BuildConfig, directory: Path, console: Console
) -> ConceptPack:
    """Choose features of the SAEs by effect, fit and calibrate their operands, write the pack.

    To suppress, features are capped where they are active, and a few directions beside them; to amplify, features
    are raised everywhere.

    Raises:
        AssetError: texts or words that nothing can be learned from, or two SAEs of one site.
        IncompatibleError: an SAE whose features cannot be edited one by one.
    """
    saes = _in_model_order(saes)
    for sae in saes:
        refuse_unsteerable(sae)
    _freeze(model)
    materials = Materials.read(concept, needs_words=True)
    train = materials.train
    console.print(
        f"{len(materials.words.forms)} words, {len(train.positive)} positive and {len(train.negative)} others"
    )
    completions = Completions.learn(model, [*train.positive, *train.negative], materials.words)
    if not completions:
        raise AssetError(f"none of the concept's {len(materials.words.forms)} words is completed in the train texts")
    amplify = concept.direction is Direction.AMPLIFY
    op = Op.ADD if amplify else Op.CLIP
    pools = _pools(model, materials, saes[0].site.layer, config)
    selection = choose_rows(model, saes, op, train, pools.drawing[0], completions, config.selection)
    for part in selection.edited:
        console.print(f"features at {part.site}, largest effect first: {list(part.feature_ids)}")
    starts = [Start(part, torch.zeros(len(part)), part.max_activation) for part in selection.edited]
    if config.directions and not amplify:
        starts[-1] = _with_directions(model, starts[-1], selection.gradients, train.negative, config.directions)
    with _fit_progress(config.fit.steps) as report:
        fitted = fit_values(model, starts, op, amplify, pools, completions, config.fit, report)
    detector = _detector(model, [sae.site for sae in saes], selection.detector, materials, config, console)
    draft = PackDraft(
        concept.name,
        f"SAE features that make the model write {concept.name}, {'raised' if amplify else 'capped where active'}.",
        op,
        concept.direction,
        [rows for rows, _ in fitted],
        [value for _, value in fitted],
        [_steps(rows) for rows, _ in fitted],
        detector,
    )
    return _finish(model, draft, materials, config, {"effect": selection.effect}, directory, console)


def _pools(model: LoadedModel, materials: Materials, layer: int, config: BuildConfig) -> Pools:
    """The contexts of the fit; those that features are ranked on come first.

    To suppress, what the model itself writes of positive texts, and these; to amplify, texts of both kinds.
    """
    concept, limit = materials.concept, config.selection.max_texts
    positive = Contexts.of_texts(model, materials.train.positive[:limit], layer)
    negative = Contexts.of_texts(model, materials.train.negative[:limit], layer)
    if concept.direction is Direction.AMPLIFY:
        return Pools([positive, negative], negative)
    prompts = candidates(model, materials.train.positive[: config.on_policy_prompts], concept.chat)
    written = Contexts.on_policy(model, prompts, seed_of(materials.train.positive), layer)
    return Pools([written, positive], negative)


def _with_directions(
    model: LoadedModel, start: Start, gradients: torch.Tensor, benign: Sequence[str], count: int
) -> Start:
    """Capped directions beside the features of a site, on the same domain."""
    capped = capped_directions(model, start.rows.site, gradients, benign, count, float(start.rows.max_norm[0]))
    return Start(
        start.rows.joined(capped.rows),
        torch.cat([start.value, capped.value]),
        torch.cat([start.scale, capped.scale]),
    )


def _steps(rows: SiteRows) -> torch.Tensor:
    """Strength moves features; the caps of directions stay where they were fitted."""
    return rows.max_activation * torch.tensor([float(feature >= 0) for feature in rows.feature_ids])


def build_from_direction(
    model: LoadedModel, sites: Sequence[Site], concept: Concept, config: BuildConfig, directory: Path, console: Console
) -> ConceptPack:
    """A unit difference of means at each site: capped to suppress, added to amplify.

    Raises:
        AssetError: texts that nothing can be learned from.
    """
    _freeze(model)
    materials = Materials.read(concept, needs_words=False)
    amplify = concept.direction is Direction.AMPLIFY
    sites = sorted(set(sites))
    limit = config.selection.max_texts
    found = [difference_of_means(model, site, materials.train, concept.chat, limit) for site in sites]
    draft = PackDraft(
        concept.name,
        f"The direction from other texts to those of {concept.name}, {'added' if amplify else 'capped'}.",
        Op.ADD if amplify else Op.CLIP,
        concept.direction,
        [direction.rows for direction in found],
        [direction.step if amplify else direction.cap for direction in found],
        [direction.step for direction in found],
        _detector(model, sites, [], materials, config, console),
    )
    return _finish(model, draft, materials, config, {}, directory, console)


def _in_model_order(saes: Sequence[SAE]) -> list[SAE]:
    ordered = sorted(saes, key=lambda sae: sae.site)
    for one, other in pairwise(ordered):
        if one.site == other.site:
            raise AssetError(f"{one.name} and {other.name} are both SAEs of {one.site}; expected one a site")
    return ordered


def _freeze(model: LoadedModel) -> None:
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)


@contextmanager
def _fit_progress(steps: int) -> Iterator[Callable[[int, float, float], None]]:
    """What shows the progress of ``fit_values`` inside the block."""
    with Progress() as progress:
        task = progress.add_task("fit", total=steps)

        def report(step: int, share: float, kl: float) -> None:
            progress.update(task, completed=step, description=f"fit  words ×{share:.3f}  KL {kl:.4f}")

        yield report


def _detector(
    model: LoadedModel,
    sites: Sequence[Site],
    features: Sequence[SiteRows],
    materials: Materials,
    config: BuildConfig,
    console: Console,
) -> Detector:
    limit = config.selection.max_texts
    train = LabelledTexts(materials.train.positive[:limit], materials.train.negative[:limit])
    validation = LabelledTexts(materials.validation.positive, materials.validation.negative)
    detector = choose_detector(model, config.detector_sites or sites, features, train, validation)
    areas = {"probe": detector.auroc_probe, "features": detector.auroc_features}
    figures = ", ".join(f"{kind} {area:.3f}" for kind, area in areas.items() if area is not None)
    console.print(f"detector: {detector.kind} at {detector.rows.site}; AUROC on validation: {figures}")
    return detector


def _finish(
    model: LoadedModel,
    draft: PackDraft,
    materials: Materials,
    config: BuildConfig,
    data: dict[str, Any],
    directory: Path,
    console: Console,
) -> ConceptPack:
    """Choose the strength on validation and write the pack; its card has no evaluation yet."""
    concept = materials.concept
    setting = Setting(concept.direction, materials.judge, chat=concept.chat)
    first = min(part.site for part in draft.edited).layer
    trial = Trial.draw(
        model,
        materials.validation,
        setting,
        config.validation_prompts,
        config.validation_seeds,
        first,
        VALIDATION_TOKENS,
    )
    strengths = config.amplifying if concept.direction is Direction.AMPLIFY else config.suppressing
    strength, result = choose_strength(
        trial, lambda strength: draft.pack(model, strength, {}), strengths, concept.budget, console
    )
    record = {
        **materials.record,
        **data,
        "config": asdict(config) | {"detector_sites": [str(site) for site in config.detector_sites]},
        "strength": strength,
        "within_budget": result is not None,
        "validation": None if result is None else asdict(result),
    }
    pack = draft.pack(model, strength, record)
    return save_pack(pack.card, pack.tensors, directory)
