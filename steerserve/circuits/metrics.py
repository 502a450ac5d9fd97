"""What a changed model is judged by, from the logits behind each prompt.

A metric maps logits ``[..., N, V]`` at the last position of N prompts to ``[...]``, float64. All have one sign:
**larger is worse**, further from the clean model's behaviour. An edit that raises a metric by less than a threshold
does not matter. Metrics can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from steerserve.circuits.prompts import PromptPairs

PerPrompt = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Metric:
    """A mean over prompts.

    Attributes:
        name: a key of ``METRICS``.
        meaning: formula, with its sign.
        per_prompt: ``[..., N, V]`` to ``[..., N]`` float64, for intervals.
    """

    name: str
    meaning: str
    per_prompt: PerPrompt

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Mean over the N prompts of ``logits`` ``[..., N, V]``."""
        return self.per_prompt(logits).mean(-1)


def kl(reference_logits: torch.Tensor) -> Metric:
    """KL(reference ‖ model) in nats; ``reference_logits`` ``[N, V]`` are the clean model's. At least 0.

    The softmax is taken in float32 (float64 if the logits are), the sum in float64.
    """
    reference = _log_softmax(reference_logits.detach())
    p = reference.exp()

    def per_prompt(logits: torch.Tensor) -> torch.Tensor:
        return (p * (reference - _log_softmax(logits))).sum(-1, dtype=torch.float64)

    return Metric("kl", "KL(clean ‖ model), nats", per_prompt)


def logit_difference(pairs: PromptPairs) -> Metric:
    """The mean logit of the wrong answers less that of the correct ones; below 0 where the model is right."""
    correct, wrong = _Answers(pairs.correct), _Answers(pairs.wrong)

    def per_prompt(logits: torch.Tensor) -> torch.Tensor:
        return wrong.mean(wrong.logits(logits)) - correct.mean(correct.logits(logits))

    return Metric("logit_difference", "mean logit(wrong) − mean logit(correct)", per_prompt)


def greater_than(pairs: PromptPairs) -> Metric:
    """P(wrong answers) − P(correct answers), from −1 to 1: for years, P(too early) − P(late enough)."""
    correct, wrong = _Answers(pairs.correct), _Answers(pairs.wrong)

    def per_prompt(logits: torch.Tensor) -> torch.Tensor:
        total = torch.logsumexp(logits, -1, keepdim=True).double()
        p_wrong, p_correct = (of.total((of.logits(logits) - total).exp()) for of in (wrong, correct))
        return p_wrong - p_correct

    return Metric("greater_than", "P(wrong) − P(correct)", per_prompt)


def log_odds(pairs: PromptPairs) -> Metric:
    """log P(wrong answers) − log P(correct answers), in nats; below 0 where the model prefers the correct ones."""
    correct, wrong = _Answers(pairs.correct), _Answers(pairs.wrong)

    def per_prompt(logits: torch.Tensor) -> torch.Tensor:
        return wrong.logsumexp(wrong.logits(logits)) - correct.logsumexp(correct.logits(logits))

    return Metric("log_odds", "log P(wrong) − log P(correct), nats", per_prompt)


METRICS: dict[str, Callable[[PromptPairs, torch.Tensor], Metric]] = {
    "kl": lambda _, reference_logits: kl(reference_logits),
    "logit_difference": lambda pairs, _: logit_difference(pairs),
    "greater_than": lambda pairs, _: greater_than(pairs),
    "log_odds": lambda pairs, _: log_odds(pairs),
}
"""By name, made from the pairs and the clean model's logits ``[N, V]``."""


class _Answers:
    """One set of tokens a prompt, as padded indices ``[N, K]``."""

    def __init__(self, sets: tuple[tuple[int, ...], ...]) -> None:
        width = max(map(len, sets))
        self._ids = torch.tensor([(*each, *each[:1] * (width - len(each))) for each in sets])
        self._real = torch.arange(width) < torch.tensor([[len(each)] for each in sets])

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """``[..., N, K]`` float64 of ``[..., N, V]``."""
        return logits.gather(-1, self._ids.to(logits.device).expand(*logits.shape[:-1], -1)).double()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values.where(self._real.to(values.device), 0.0).sum(-1)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.total(values) / self._real.to(values.device).sum(-1)

    def logsumexp(self, values: torch.Tensor) -> torch.Tensor:
        return values.where(self._real.to(values.device), -torch.inf).logsumexp(-1)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    precise = logits if logits.dtype is torch.float64 else logits.float()
    return precise.log_softmax(-1)
