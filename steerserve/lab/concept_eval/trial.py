"""Prompts and seeds of one split, and benign text beside them: what every arm is run on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from steerserve.errors import AssetError
from steerserve.lab.bootstrap import Draws, Interval, Resamples, quotient
from steerserve.lab.concept_eval.benign import BenignText, Reading
from steerserve.lab.concept_eval.continuations import Arms
from steerserve.lab.concept_eval.judges import Judge
from steerserve.lab.concept_eval.outcome import Outcome
from steerserve.lab.concept_eval.prompts import Prompt, candidates, joined, seeds_for
from steerserve.lab.concept_eval.texts import Corpus
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.models.loading import LoadedModel

SCREENINGS = 4
"""Continuations of each candidate for a prompt."""
SCREENED = 5
"""Candidates per prompt that is wanted."""


class Direction(StrEnum):
    """What a policy is for: the concept is to be written less often, or more often."""

    SUPPRESS = "suppress"
    AMPLIFY = "amplify"


@dataclass(frozen=True)
class Setting:
    """What texts are judged by, and how prompts are made.

    Attributes:
        chat: each prompt is a user's turn in the model's chat template, else two texts, a line each.
    """

    direction: Direction
    primary: Judge
    second: Judge | None = None
    chat: bool = False
    arms: Arms = field(default_factory=lambda: Arms(None))


@dataclass(frozen=True)
class Comparison:
    """A treated arm against the untreated one: ``reduction`` is 1 − treated/untreated rate."""

    rate: Interval
    untreated_rate: Interval
    reduction: Interval
    difference: Interval
    continuation_perplexity_ratio: Interval
    benign_perplexity_ratio: Interval
    kl: Interval


@dataclass(frozen=True, eq=False)
class Trial:
    """Prompts and seeds of one split, and what the untreated model makes of them."""

    model: LoadedModel
    setting: Setting
    prompts: list[Prompt]
    seeds: list[int]
    benign: BenignText
    untreated: Outcome

    @classmethod
    def draw(
        cls,
        model: LoadedModel,
        corpus: Corpus,
        setting: Setting,
        num_prompts: int,
        num_seeds: int,
        layer: int,
        max_benign_tokens: int,
    ) -> Trial:
        """Choose prompts, then draw seeds from all of them, then run the untreated arm.

        Args:
            layer: treatments edit nothing before it.
        """
        prompts = draw_prompts(model, corpus, setting, num_prompts)
        seeds = seeds_for(prompts, num_seeds)
        benign = BenignText.contexts(model, corpus.negative, max_benign_tokens, layer)
        untreated = _run(model, setting, prompts, seeds, Treatment.none(model), "untreated")
        return cls(model, setting, prompts, seeds, benign, untreated)

    def run(self, treatment: Treatment, title: str) -> Outcome:
        """Continue all prompts under a treatment."""
        return _run(self.model, self.setting, self.prompts, self.seeds, treatment, title)

    @cached_property
    def resamples(self) -> Resamples:
        """Of the prompts; all arms share them."""
        return Resamples(len(self.prompts))

    @cached_property
    def benign_resamples(self) -> Resamples:
        """Of the benign texts."""
        return Resamples(self.benign.num_texts)

    def compare(self, outcome: Outcome, reading: Reading) -> Comparison:
        """An arm and its reading of the benign text, against the untreated arm."""
        ours, theirs = outcome.rate(self.resamples), self.untreated.rate(self.resamples)
        perplexity = quotient(outcome.perplexity(self.resamples), self.untreated.perplexity(self.resamples))
        return Comparison(
            **rates(ours, theirs, len(self.prompts)),
            difference=Interval.of(ours - theirs),
            continuation_perplexity_ratio=Interval.of(perplexity),
            benign_perplexity_ratio=Interval.of(reading.perplexity_ratio(self.benign_resamples)),
            kl=Interval.of(self.benign_resamples.ratio(reading.kl, reading.tokens)),
        )


def rates(treated: Draws, untreated: Draws, num_prompts: int) -> dict[str, Interval]:
    """``rate``, ``untreated_rate`` and ``reduction``, which is NaN where there is nothing to reduce.

    Resamples of a rate of 0 or 1 have no spread. Its open end is the Clopper-Pearson bound of the share of prompts
    with a continuation unlike all others: of several seeds of a prompt it counts none but the first.
    """
    bound = 1 - 0.025 ** (1 / num_prompts)
    reduction = Interval.of(1 - quotient(treated, untreated))
    if treated[0] == 0 < untreated[0]:
        reduction = replace(reduction, low=1 - bound / float(untreated[0]))
    return {
        "rate": _opened(Interval.of(treated), bound),
        "untreated_rate": _opened(Interval.of(untreated), bound),
        "reduction": reduction,
    }


def _opened(rate: Interval, bound: float) -> Interval:
    if rate.value == 0:
        return replace(rate, high=bound)
    return replace(rate, low=1 - bound) if rate.value == 1 else rate


def draw_prompts(model: LoadedModel, corpus: Corpus, setting: Setting, count: int) -> list[Prompt]:
    """At most ``count`` prompts.

    To be suppressed, a concept has to be drawn: candidates from positive texts are continued a few times, untreated,
    with seeds used nowhere else, and those that most often show the concept to the primary judge are kept. To be
    amplified, it has to be absent: the first candidates from negative texts are taken as they come.

    Raises:
        AssetError: no candidate, or none that draws the concept.
    """
    if setting.direction is Direction.AMPLIFY:
        prompts = candidates(model, corpus.negative[: 4 * count], setting.chat)[:count]
        if not prompts:
            raise AssetError("no negative text is short enough for a prompt")
        return prompts
    pool = list(dict.fromkeys(candidates(model, corpus.positive, setting.chat)))[: SCREENED * count]
    shown = _times_shown(model, setting, pool) if pool else []
    drawing = sorted((index for index, times in enumerate(shown) if times), key=lambda index: -shown[index])
    if not drawing:
        raise AssetError("no prompt made of the positive texts makes the untreated model write the concept")
    return [pool[index] for index in drawing[:count]]


def _times_shown(model: LoadedModel, setting: Setting, pool: list[Prompt]) -> list[int]:
    """How many continuations of each prompt by the untreated model show the concept."""
    untreated, seeds = Treatment.none(model), list(range(SCREENINGS))
    continuations = setting.arms.continuations(model, untreated, pool, seeds, "choosing prompts", scored=False)
    flags = setting.primary.flags([joined(pool[c.prompt].text, c.text) for c in continuations])
    shown = [0] * len(pool)
    for continuation, flag in zip(continuations, flags, strict=True):
        shown[continuation.prompt] += int(flag)
    return shown


def _run(
    model: LoadedModel, setting: Setting, prompts: list[Prompt], seeds: list[int], treatment: Treatment, title: str
) -> Outcome:
    continuations = setting.arms.continuations(model, treatment, prompts, seeds, title)
    return Outcome.of(prompts, continuations, setting.primary, setting.second)
