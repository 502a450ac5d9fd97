"""The strongest setting within the budget is taken, and continuations are spent on none that is too dear."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from steerserve.lab.bootstrap import Interval
from steerserve.lab.concept_build import strength as module
from steerserve.lab.concept_build.strength import Budget, choose_strength, described
from steerserve.lab.concept_eval.trial import Comparison, Direction

KL = {3.0: 0.5, 2.0: 0.05, 1.0: 0.04, 0.5: 0.01}
CONTINUATIONS = {2.0: 1.2, 1.0: 1.05, 0.5: 1.01}


class FakeTrial:
    """Costs by strength; a treatment is its strength."""

    model, benign_resamples = None, None
    setting = SimpleNamespace(direction=Direction.SUPPRESS)

    def __init__(self) -> None:
        self.run_at: list[float] = []
        self.benign = SimpleNamespace(read=self._read)

    def _read(self, strength: float) -> SimpleNamespace:
        return SimpleNamespace(mean_kl=KL[strength], perplexity_ratio=lambda _: np.array([1 + KL[strength]]))

    def run(self, strength: float, title: str) -> float:
        self.run_at.append(strength)
        return strength

    def compare(self, strength: float, reading: SimpleNamespace) -> Comparison:
        same = Interval(0.5, 0.4, 0.6)
        ratio = CONTINUATIONS.get(strength, 9.0)
        return Comparison(same, same, same, same, Interval(ratio, ratio - 0.1, ratio + 0.1), same, same)


@pytest.mark.parametrize(
    ("budget", "chosen", "run_at"),
    [
        (Budget(0.1, 1.1), 1.0, [2.0, 1.0]),  # 3 costs too much KL, 2 too much of its continuations' likelihood
        (Budget(0.1, None), 2.0, [2.0]),
        (Budget(0.02, 1.1), 0.5, [0.5]),
        (Budget(1.0, 1.02), 0.5, [0.5]),  # benign text counts too
        (Budget(0.001, None), None, []),
    ],
)
def test_the_strongest_within_the_budget(budget, chosen, run_at, monkeypatch) -> None:
    monkeypatch.setattr(module, "Treatment", SimpleNamespace(policy=lambda model, pack: pack))
    trial, written = FakeTrial(), StringIO()
    console = Console(file=written, force_terminal=True, color_system="standard", width=300)
    strength, result = choose_strength(trial, lambda strength: strength, tuple(KL), budget, console)
    assert ("\x1b[33mno strength keeps within" in written.getvalue()) == (chosen is None), "in yellow"
    assert strength == (chosen or 0.5), "the weakest, if none is"
    assert (result is None) == (chosen is None)
    assert trial.run_at == run_at


def test_where_nothing_was_to_reduce_the_difference_is_told() -> None:
    nothing, figure = Interval(float("nan"), float("nan"), float("nan")), Interval(0.5, 0.4, 0.6)
    result = Comparison(figure, Interval(0.0, 0.0, 0.1), nothing, figure, figure, figure, figure)
    line = described(result, Direction.AMPLIFY)
    assert line.startswith("shown 0.0% → 50.0% (difference 50.0%, 40.0% to 60.0%)")
    assert "nan" not in line


def test_what_is_to_be_written_may_surprise_the_model() -> None:
    assert Budget.of(Direction.SUPPRESS) == Budget(0.1, 1.05)
    assert Budget.of(Direction.AMPLIFY) == Budget(0.5, None)
    assert Budget.of(Direction.AMPLIFY, 0.2) == Budget(0.2, None)
