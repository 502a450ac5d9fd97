"""How far a pack's operands go: the strongest of several settings that keeps within a budget on validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from steerserve.lab.concept_eval.benign import Reading
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.concept_eval.trial import Comparison, Direction, Trial
from steerserve.steering.packs import ConceptPack


@dataclass(frozen=True)
class Budget:
    """What a policy may cost on validation.

    Attributes:
        kl: KL(untreated ‖ treated) on negative texts, in nats per token.
        perplexity_ratio: of negative texts under the treated model, and of continuations under the untreated one;
            None where the policy is to write what the model would not. The estimate counts, not the end of its
            interval: at the size of a validation trial that would choose by noise.
    """

    kl: float
    perplexity_ratio: float | None

    @classmethod
    def of(cls, direction: Direction, kl: float | None = None) -> Budget:
        """The usual one; ``kl`` replaces that of it."""
        if direction is Direction.SUPPRESS:
            return cls(0.1 if kl is None else kl, 1.05)
        return cls(0.5 if kl is None else kl, None)


SUPPRESSING = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)
AMPLIFYING = (3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)


def choose_strength(
    trial: Trial, pack_at: Callable[[float], ConceptPack], strengths: Sequence[float], budget: Budget, console: Console
) -> tuple[float, Comparison | None]:
    """The first of ``strengths`` that keeps within the budget, and what it did; the last one and None if none does.

    What negative texts cost is read first: a forward pass over them is cheaper than continuations.
    """
    for strength in strengths:
        treatment = Treatment.policy(trial.model, pack_at(strength))
        reading = trial.benign.read(treatment)
        benign = float(reading.perplexity_ratio(trial.benign_resamples)[0])
        if not _is_cheap(reading, benign, budget):
            console.print(f"strength {strength:g}: KL {reading.mean_kl:.4f}, benign perplexity ×{benign:.3f}: too much")
            continue
        comparison = trial.compare(trial.run(treatment, f"strength {strength:g}"), reading)
        console.print(f"strength {strength:g}: {described(comparison, trial.setting.direction)}")
        ratio = comparison.continuation_perplexity_ratio.value
        if budget.perplexity_ratio is None or ratio <= budget.perplexity_ratio:
            return strength, comparison
    console.print(
        f"[yellow]no strength keeps within the budget ({budget}): {strengths[-1]:g}, the last, is kept[/yellow]"
    )
    return strengths[-1], None


def _is_cheap(reading: Reading, perplexity_ratio: float, budget: Budget) -> bool:
    within = budget.perplexity_ratio is None or perplexity_ratio <= budget.perplexity_ratio
    return reading.mean_kl <= budget.kl and within


def described(result: Comparison, direction: Direction) -> str:
    """One line of the figures that matter."""
    rate = f"{result.untreated_rate.value:.1%} → {result.rate.value:.1%}"
    suppress = direction is Direction.SUPPRESS
    kind, change = ("reduction", result.reduction) if suppress else ("difference", result.difference)
    return (
        f"shown {rate} ({kind} {change.value:.1%}, {change.low:.1%} to {change.high:.1%}), "
        f"perplexity of continuations ×{result.continuation_perplexity_ratio.value:.3f}, "
        f"of benign text ×{result.benign_perplexity_ratio.value:.3f}, KL {result.kl.value:.4f}"
    )
