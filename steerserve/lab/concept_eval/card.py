"""What is written into ``card.json`` as ``evaluation``: figures, and the verdicts that follow from them.

Every figure with a spread is ``{"value", "low", "high"}``, a 95 % interval over prompts (KL and perplexity on benign
text: over texts); figures that do not exist are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerserve.lab.bootstrap import Interval
from steerserve.lab.concept_eval.ability import Ability
from steerserve.lab.concept_eval.pareto import Rival
from steerserve.lab.concept_eval.trial import Comparison, Direction

MIN_UNTREATED_RATE = 0.2


@dataclass(frozen=True)
class ArmCard:
    """One arm, on test texts.

    Attributes:
        variant: of the method, chosen on validation.
        budget: the KL that the knob was tuned to, in words; ``reached`` if validation found such a knob.
        validation_kl: what the knob was read to cost there.
        second: ``rate``, ``untreated_rate`` and ``reduction`` by the second judge.
        firing_rate: shares of benign tokens, and of benign texts, in which something was edited.
        rivals: every other arm beside this one.
        on_front: no other arm is better at no more KL (see ``Rival.beats``).
    """

    name: str
    method: str
    variant: str
    budget: str
    knob: dict[str, Any] | None
    reached: bool
    validation_kl: float
    steering: Comparison
    second: dict[str, Interval] | None
    degeneration: dict[str, dict[str, object]]
    firing_rate: dict[str, float]
    ability: dict[str, Ability] | None
    rivals: Sequence[Rival]
    on_front: bool


@dataclass(frozen=True)
class Target:
    """What the pack is to reach, at the worse end of every interval.

    Attributes:
        effect: to suppress, the reduction of the rate; to amplify, the rate.
        perplexity: largest ratio of both perplexities; to amplify, of benign text only.
    """

    effect: float
    perplexity: float = 1.1


@dataclass(frozen=True)
class Verdict:
    """A sentence computed from figures; ``holds`` is null where it is neither good nor bad."""

    about: str
    holds: bool | None
    text: str


@dataclass(frozen=True)
class EvaluationCard:
    """``evaluation``; the arm named ``policy`` is the pack as it serves."""

    protocol: dict[str, Any]
    verdicts: Sequence[Verdict]
    arms: Sequence[ArmCard]
    front: Sequence[str]
    detection: Mapping[str, Any]
    schema: str = "steerserve.evaluation/1"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def verdicts(direction: Direction, target: Target, arms: Sequence[ArmCard]) -> list[Verdict]:
    """What the figures of the arm ``policy`` say."""
    (pack,) = [arm for arm in arms if arm.name == "policy"]
    found = [_untreated(pack, direction), _effect(pack, direction, target)]
    found += [*_perplexity(pack, direction, target), _degeneration(pack), _front(pack), _silent(pack), _second(pack)]
    found += [_ability(task, ability) for task, ability in (pack.ability or {}).items()]
    found += [_no_op(arm) for arm in arms if arm.method == "no-op"]
    return [verdict for verdict in found if verdict is not None]


def _untreated(pack: ArmCard, direction: Direction) -> Verdict | None:
    rate = pack.steering.untreated_rate.value
    if direction is Direction.AMPLIFY:
        return None
    holds = rate >= MIN_UNTREATED_RATE
    beside = "as the protocol asks" if holds else f"less than the {MIN_UNTREATED_RATE:.0%} the protocol asks for"
    return Verdict(
        "untreated rate", holds, f"The untreated model shows the concept in {rate:.1%} of continuations, {beside}."
    )


def _effect(pack: ArmCard, direction: Direction, target: Target) -> Verdict:
    figures = pack.steering
    if direction is Direction.AMPLIFY:
        holds = figures.rate.low >= target.effect
        text = f"The rate rises from {figures.untreated_rate.value:.1%} to {percent(figures.rate)}"
    else:
        holds = figures.reduction.low >= target.effect
        text = f"The rate falls by {percent(figures.reduction)}, to {figures.rate.value:.1%}"
    return Verdict("effect", holds, f"{text}: target {target.effect:.0%} {'met' if holds else 'not met'}.")


def _perplexity(pack: ArmCard, direction: Direction, target: Target) -> list[Verdict]:
    written, benign = pack.steering.continuation_perplexity_ratio, pack.steering.benign_perplexity_ratio
    on_benign = f"of benign text ×{times(benign)}: target ×{target.perplexity:g}"
    if direction is Direction.AMPLIFY:
        holds = benign.high <= target.perplexity
        informative = f"Perplexity of continuations ×{times(written)}: they are to be what the model would not write."
        return [
            Verdict("perplexity", holds, f"Perplexity {on_benign} {'met' if holds else 'not met'}."),
            Verdict("perplexity of continuations", None, informative),
        ]
    holds = max(written.high, benign.high) <= target.perplexity
    text = f"Perplexity of continuations ×{times(written)}, {on_benign} {'met' if holds else 'not met'}."
    return [Verdict("perplexity", holds, text)]


def _degeneration(pack: ArmCard) -> Verdict:
    off = [name.replace("_", "-") for name, figures in pack.degeneration.items() if not figures["within_10_percent"]]
    if off:
        return Verdict("degeneration", False, f"More than 10 % off the untreated model: {', '.join(off)}.")
    return Verdict(
        "degeneration", True, "Repetition, distinct-2, length and share that end are within 10 % of untreated."
    )


def _front(pack: ArmCard) -> Verdict:
    winners = [rival.name for rival in pack.rivals if rival.beats]
    if winners:
        return Verdict("Pareto front", False, f"At no more KL, it is beaten by: {', '.join(winners)}.")
    if pack.steering.difference.low <= 0 <= pack.steering.difference.high:
        text = "Not shown to differ from the untreated model in its rate: the Pareto front says nothing of it."
        return Verdict("Pareto front", None, text)
    return Verdict("Pareto front", True, "No other arm is better at no more KL: it is on the Pareto front.")


def _silent(pack: ArmCard) -> Verdict | None:
    if pack.validation_kl > 0:
        return None
    text = "It never fires on benign validation text: no method with a knob is as cheap, and none is compared."
    return Verdict("benign text", None, text)


def _second(pack: ArmCard) -> Verdict | None:
    if pack.second is None:
        return None
    before, after = pack.second["untreated_rate"], pack.second["rate"]
    change = percent(pack.second["reduction"])
    return Verdict(
        "second judge", None, f"By the second judge: {before.value:.1%} → {after.value:.1%}, a reduction of {change}."
    )


def _ability(task: str, ability: Ability) -> Verdict:
    return Verdict(
        task,
        ability.non_inferior,
        f"{task}: accuracy {ability.untreated:.1%} → {ability.treated:.1%} over {ability.items:,} items (edited at "
        f"{ability.firing_rate:.1%}), at worst {100 * ability.lower:+.2f} points: "
        f"{'non-inferior' if ability.non_inferior else 'not shown to be non-inferior'} by 1 point.",
    )


def _no_op(arm: ArmCard) -> Verdict:
    difference = arm.steering.difference
    holds = difference.low == difference.high == 0
    return Verdict("no-op", holds, f"Edits of size 0 change the rate by {100 * difference.value:+.1f} points.")


def percent(interval: Interval) -> str:
    """``87.3 % (82.5 to 91.3)``."""
    return f"{interval.value:.1%} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def times(interval: Interval) -> str:
    """``1.035 (1.020 to 1.050)``."""
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
