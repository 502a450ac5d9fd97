"""The evaluation of a pack, end to end: fit and tune the methods, run every arm on test texts, write the card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from steerserve.lab.bootstrap import Interval
from steerserve.lab.concept_eval.ability import IOI, Ability, ioi_prompts, next_token
from steerserve.lab.concept_eval.benign import BenignText, Reading
from steerserve.lab.concept_eval.card import ArmCard, EvaluationCard, Target, verdicts
from steerserve.lab.concept_eval.continuations import CONTINUATION_TOKENS
from steerserve.lab.concept_eval.contrast import Contrast, contrasts
from steerserve.lab.concept_eval.detection import detection, probe_auroc
from steerserve.lab.concept_eval.methods import (
    Method,
    difference_of_means,
    instructions,
    no_op,
    parts,
    policy,
    probe_gated,
    random_features,
    token_list,
)
from steerserve.lab.concept_eval.outcome import Outcome, degeneration
from steerserve.lab.concept_eval.pareto import Point, front, rivals
from steerserve.lab.concept_eval.prompts import digest
from steerserve.lab.concept_eval.texts import Corpus, Labels
from steerserve.lab.concept_eval.trial import Direction, Setting, Trial, rates
from steerserve.lab.concept_eval.tuning import OWN, Arm, Tuner, plan_arms
from steerserve.lab.corpus import Split, read_documents
from steerserve.lab.lexicon import Lexicon
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.packs import ConceptPack
from steerserve.types import Site


@dataclass(frozen=True)
class EvaluationConfig:
    """Sizes of an evaluation; the defaults are the protocol's.

    Attributes:
        ladder: budgets, in multiples of the pack's own benign KL.
        fitted_texts: of either kind, on which methods are fitted.
        tuning_tokens, benign_tokens: benign text on which KL is matched, and on which it is reported.
        validation_prompts, validation_seeds: on which variants of a method are compared.
    """

    num_prompts: int = 200
    num_seeds: int = 5
    ladder: tuple[float, ...] = (0.5, 1.0, 2.0)
    fitted_texts: int = 1500
    tuning_tokens: int = 5120
    benign_tokens: int = 20480
    validation_prompts: int = 60
    validation_seeds: int = 2
    ioi_prompts: int = 2000


QUICK = EvaluationConfig(
    num_prompts=12,
    num_seeds=2,
    ladder=(1.0,),
    fitted_texts=60,
    tuning_tokens=512,
    benign_tokens=1024,
    validation_prompts=8,
    validation_seeds=1,
    ioi_prompts=100,
)
"""To see that everything runs; its figures mean nothing."""


@dataclass(frozen=True)
class Texts:
    """The files, and what of them counts.

    Attributes:
        hard_negatives: benign sentences on which the pack is likely to fire; None: none are known.
    """

    positive: tuple[Path, ...]
    negative: tuple[Path, ...]
    labels: Labels
    hard_negatives: Path | None

    def corpus(self, split: Split, words: Path | None) -> Corpus:
        """Of one split."""
        return Corpus.read(self.positive, self.negative, split, words, self.labels)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file, by name."""
        files = {*self.positive, *self.negative, *([self.hard_negatives] if self.hard_negatives else [])}
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A pack and everything it is compared with."""

    model: LoadedModel
    pack: ConceptPack
    saes: Mapping[Site, SAE]
    texts: Texts
    setting: Setting
    instruction: str
    target: Target
    config: EvaluationConfig
    console: Console

    def run(self) -> tuple[EvaluationCard, dict[str, Outcome]]:
        """The card, and the continuations of every arm (``untreated`` among them)."""
        words = self.setting.primary.words
        test_corpus = self.texts.corpus(Split.TEST, words)
        validation_corpus = self.texts.corpus(Split.VALIDATION, words)
        train = self.texts.corpus(Split.TRAIN, words)
        seen = contrasts(self.model, self._sites, train, self.config.fitted_texts)
        site = self._best_site(seen, validation_corpus)
        arms = self._arms(seen, site, train, validation_corpus)
        trial = self._trial(test_corpus, self.config.num_prompts, self.config.num_seeds, self.config.benign_tokens)
        outcomes = {arm.name: trial.run(arm.treatment, arm.name) for arm in arms}
        readings = {arm.name: trial.benign.read(arm.treatment, f"{arm.name}: benign text") for arm in arms}
        cards = self._cards(trial, arms, outcomes, readings)
        card = EvaluationCard(
            protocol=self._protocol(trial),
            verdicts=verdicts(self.setting.direction, self.target, cards),
            arms=cards,
            front=front(self._points(trial, outcomes, readings)),
            detection=detection(self.model, self.pack, (site, seen[site].probe()), test_corpus),
        )
        return card, {"untreated": trial.untreated, **outcomes}

    @property
    def _sites(self) -> Sequence[Site]:
        """Where the pack edits; of one that edits nothing, where it reads."""
        return self.pack.edited_sites or self.pack.sites

    @property
    def _layer(self) -> int:
        """No treatment edits anything before it."""
        return self._sites[0].layer

    def _trial(self, corpus: Corpus, num_prompts: int, num_seeds: int, max_benign_tokens: int) -> Trial:
        return Trial.draw(self.model, corpus, self.setting, num_prompts, num_seeds, self._layer, max_benign_tokens)

    def _best_site(self, seen: Mapping[Site, Contrast], validation: Corpus) -> Site:
        """Where simple methods read and edit: of the pack's own, where a linear probe does best on validation."""
        if len(seen) == 1:
            return self._sites[0]
        return max(seen, key=lambda site: probe_auroc(self.model, site, seen[site].probe(), validation))

    def _arms(self, seen: Mapping[Site, Contrast], site: Site, train: Corpus, validation: Corpus) -> list[Arm]:
        config = self.config
        trial = self._trial(validation, config.validation_prompts, config.validation_seeds, config.tuning_tokens)
        methods, tuner = self._methods(seen, site, train), Tuner(trial, self.console)
        if tuner.kl(methods[0].treatment(1.0)) > 0:
            return list(plan_arms(tuner, methods, config.ladder))
        # Nothing but the model itself is as cheap as a pack that never fires: there is no knob to find.
        return list(plan_arms(tuner, [methods[0], *(method for method in methods if method.knob is None)], ()))

    def _methods(self, seen: Mapping[Site, Contrast], site: Site, train: Corpus) -> list[Method]:
        """The pack, then those that apply: random features need the pack's SAEs, a token list needs a word list."""
        direction, words = self.setting.direction, self.setting.primary.words
        max_norm = float(self.pack.tensors.max_norm.max())
        methods = [
            policy(self.model, self.pack),
            *parts(self.model, self.pack),
            difference_of_means(self.model, seen[site], direction, max_norm),
            *probe_gated(self.model, seen[site], direction),
            *instructions(self.model, self.instruction, self.setting.chat),
        ]
        if words is not None:
            methods.append(token_list(self.model, Lexicon.load(words, "selection"), train.negative, direction))
        if all(str(site) not in self.pack.card.saes or site in self.saes for site in self.pack.edited_sites):
            methods.append(random_features(self.model, self.pack, self.saes, seen))
        return [*methods, no_op(self.model, self.pack)]

    def _points(
        self, trial: Trial, outcomes: Mapping[str, Outcome], readings: Mapping[str, Reading]
    ) -> dict[str, Point]:
        def badness(outcome: Outcome) -> Any:
            rate = outcome.rate(trial.resamples)
            return rate if self.setting.direction is Direction.SUPPRESS else 1 - rate

        points = {name: Point(readings[name].mean_kl, badness(outcome)) for name, outcome in outcomes.items()}
        return {**points, "untreated": Point(0.0, badness(trial.untreated))}

    def _cards(
        self,
        trial: Trial,
        arms: Sequence[Arm],
        outcomes: Mapping[str, Outcome],
        readings: Mapping[str, Reading],
    ) -> list[ArmCard]:
        points = self._points(trial, outcomes, readings)
        ability = self._abilities(trial, arms, readings)
        return [
            _arm_card(trial, arm, outcomes[arm.name], readings[arm.name], points, ability.get(arm.name)) for arm in arms
        ]

    def _abilities(
        self, trial: Trial, arms: Sequence[Arm], readings: Mapping[str, Reading]
    ) -> dict[str, dict[str, Ability]]:
        """Of the arms at the pack's own KL, and of those without a knob."""
        ioi = IOI(self.model, ioi_prompts(self.config.ioi_prompts), self._layer)
        hard = self._hard_negatives()
        result: dict[str, dict[str, Ability]] = {}
        for arm in arms:
            if arm.budget not in (OWN, "KL × 1"):
                continue
            reading = readings[arm.name]
            tasks = {"IOI": ioi.measure(arm.treatment), "next token": next_token(reading)}
            if hard is not None:
                firing = hard.read(arm.treatment)
                tasks["next token, hard negatives"] = next_token(firing)
                tasks["next token, all"] = next_token(reading, firing)
            result[arm.name] = tasks
        return result

    def _hard_negatives(self) -> BenignText | None:
        path = self.texts.hard_negatives
        if path is None:
            return None
        sentences = [document.text for split in Split for document in read_documents([path], split)]
        return BenignText.sentences(self.model, sentences, self._layer)

    def _protocol(self, trial: Trial) -> dict[str, Any]:
        return {
            "direction": str(self.setting.direction),
            "split": str(Split.TEST),
            "files": self.texts.hashes(),
            "labels": self.texts.labels.record,
            "judge": self.setting.primary.name,
            "second_judge": self.setting.second.name if self.setting.second else None,
            "prompts": len(trial.prompts),
            "prompts_sha256": digest(trial.prompts),
            "chat": self.setting.chat,
            "seeds": trial.seeds,
            "max_tokens": CONTINUATION_TOKENS,
            "temperature": 1.0,
            "dtype": str(self.model.model.dtype).removeprefix("torch."),
            "instruction": self.instruction,
            "benign_tokens": trial.benign.num_tokens,
            "target": vars(self.target),
            "config": vars(self.config),
            "interval": "95 %, percentile bootstrap over prompts (benign text: over contexts), arms paired; "
            "rates of 0 and 1, and reductions to 0, by Clopper-Pearson over prompts",
        }


def _arm_card(
    trial: Trial,
    arm: Arm,
    outcome: Outcome,
    reading: Reading,
    points: Mapping[str, Point],
    ability: dict[str, Ability] | None,
) -> ArmCard:
    knob = arm.method.knob
    beside = rivals(arm.name, points)
    return ArmCard(
        name=arm.name,
        method=arm.method.name,
        variant=arm.method.variant,
        budget=arm.budget,
        knob=None if knob is None else {"meaning": knob.meaning, "value": arm.tuned.knob},
        reached=arm.tuned.reached,
        validation_kl=arm.tuned.kl,
        steering=trial.compare(outcome, reading),
        second=_second(trial, outcome),
        degeneration=degeneration(outcome, trial.untreated, trial.resamples),
        firing_rate={
            "tokens": float(reading.fired.sum() / reading.tokens.sum()),
            "texts": float(np.mean(reading.fired > 0)),
        },
        ability=ability,
        rivals=beside,
        on_front=not any(rival.beats for rival in beside),
    )


def _second(trial: Trial, outcome: Outcome) -> dict[str, Interval] | None:
    if trial.setting.second is None:
        return None
    ours, theirs = outcome.second_rate(trial.resamples), trial.untreated.second_rate(trial.resamples)
    return rates(ours, theirs, len(trial.prompts))
