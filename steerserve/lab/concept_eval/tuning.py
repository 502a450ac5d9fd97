"""From methods to arms: variants chosen and knobs tuned on validation, so that methods are compared at equal KL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console

from steerserve.lab.concept_eval.matching import KnobMatcher, Match
from steerserve.lab.concept_eval.methods import DIRECTIONS, FEATURES, NOTHING, POLICY, RANDOM, Method
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.concept_eval.trial import Direction, Trial

OWN = "its own"
EQUAL_NORM = "equal norm"


@dataclass(frozen=True, eq=False)
class Arm:
    """A method at one setting of its knob.

    Attributes:
        budget: what its KL was matched to, in words; ``OWN`` for the pack as it serves and methods without a knob.
        tuned: knob, KL on validation, and whether the budget was reached.
    """

    method: Method
    treatment: Treatment
    budget: str
    tuned: Match

    @property
    def name(self) -> str:
        """What a card calls it."""
        return self.method.name if self.budget == OWN else f"{self.method.name}, {self.budget}"


class Tuner:
    """Reads KL on a validation trial's benign text."""

    def __init__(self, trial: Trial, console: Console) -> None:
        self._trial = trial
        self._console = console
        self._matchers: dict[int, KnobMatcher] = {}

    def kl(self, treatment: Treatment) -> float:
        """Mean KL per benign token."""
        benign, arms = self._trial.benign, self._trial.setting.arms
        return arms.number(("kl", benign.sha256, treatment.key), lambda: benign.read(treatment).mean_kl)

    def edit_size(self, treatment: Treatment) -> float:
        """Mean |x' − x| / |x| over benign tokens."""
        benign, arms = self._trial.benign, self._trial.setting.arms
        return arms.number(("edit", benign.sha256, treatment.key), lambda: benign.read(treatment).mean_relative_edit)

    def equal_norm(self, method: Method, other: Treatment) -> Arm:
        """The method with edits as large as the other's on average; its knob multiplies them."""
        knob = self.edit_size(other) / self.edit_size(method.treatment(1.0))
        treatment = method.treatment(knob)
        return Arm(method, treatment, EQUAL_NORM, Match(knob, self.kl(treatment), True))

    def arm(self, method: Method, budget: str, kl: float) -> Arm:
        """The method with its knob at ``kl``; without a knob, as it is."""
        if method.knob is None:
            treatment = method.treatment(0.0)
            return Arm(method, treatment, OWN, Match(0.0, self.kl(treatment), True))
        matcher = self._matchers.get(id(method))
        if matcher is None:
            knob = method.knob
            matcher = KnobMatcher(lambda value: self.kl(method.treatment(value)), knob.start, knob.largest)
            self._matchers[id(method)] = matcher
        tuned = matcher.match(kl)
        self._console.print(
            f"{method.name} ({method.variant}): knob {tuned.knob:.4g} for KL {kl:.4g}, read {tuned.kl:.4g}"
        )
        return Arm(method, method.treatment(tuned.knob), budget, tuned)

    def choose(self, variants: Sequence[Method], kl: float) -> Method:
        """The variant that does best on the validation prompts, at that KL if it has a knob."""
        if len(variants) == 1:
            return variants[0]
        sign = 1 if self._trial.setting.direction is Direction.SUPPRESS else -1
        badness = {}
        for index, method in enumerate(variants):
            arm = self.arm(method, "", kl)
            outcome = self._trial.run(arm.treatment, f"validation: {method.name}")
            badness[index] = sign * float(outcome.hits.sum() / outcome.count.sum())
            self._console.print(f"{method.name} ({method.variant}): {abs(badness[index]):.1%} on validation")
        return variants[min(badness, key=lambda index: badness[index])]


def plan_arms(tuner: Tuner, methods: Sequence[Method], ladder: Sequence[float]) -> Iterator[Arm]:
    """All arms: the pack as it serves, and every method at each step of the ladder of budgets.

    The budgets are multiples of the pack's own KL. At the KL of each method without a knob, the pack is run too.
    """
    (policy,) = [method for method in methods if method.name == POLICY]
    treatment = policy.treatment(1.0)
    budget = tuner.kl(treatment)
    yield Arm(policy, treatment, OWN, Match(1.0, budget, True))
    yield from (tuner.arm(policy, _times(factor), factor * budget) for factor in ladder if factor != 1)
    others = [method for method in methods if method is not policy]
    for _, group in groupby(others, key=lambda method: method.name):
        method = tuner.choose(list(group), budget)
        if method.name == RANDOM:
            yield tuner.equal_norm(method, treatment)
        if method.knob is not None:
            yield from (tuner.arm(method, _times(factor), factor * budget) for factor in ladder)
            continue
        single = tuner.arm(method, OWN, 0.0)
        yield single
        if method.name not in (NOTHING, FEATURES, DIRECTIONS) and single.tuned.kl > 0:
            yield tuner.arm(policy, f"KL of {method.name}", single.tuned.kl)


def _times(factor: float) -> str:
    return f"KL × {factor:g}"
