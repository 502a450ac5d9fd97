"""What the rules of policies do about a text that another model wrote.

Nothing can be steered there, and nothing generated again: a rule that clamps flags, above its concept's threshold, and
one that rewinds does what it would do after the last retry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steerserve.serving.reading import Watched
from steerserve.steering.catalog import Catalog
from steerserve.steering.policies import Action, Policy, Rule
from steerserve.types import GuardAction, Phase, VerdictKind

VERDICTS = {
    GuardAction.FLAG: VerdictKind.FLAGGED,
    GuardAction.REDACT: VerdictKind.REDACTED,
    GuardAction.BLOCK: VerdictKind.BLOCKED,
}
"""What the action of a rule makes of a text."""


@dataclass(frozen=True)
class TextRule:
    """A rule that reads texts.

    Attributes:
        concept: what it reads.
        threshold: the score above which it acts; its own, or that of the concept's card.
    """

    policy: Policy
    rule: Rule
    concept: str
    threshold: float

    @property
    def watched(self) -> Watched:
        """What to look for."""
        return Watched(self.concept, self.threshold, self.rule.fail_open)

    @property
    def action(self) -> GuardAction:
        """What it does: flag, redact or block."""
        match self.rule.action:
            case Action.CLAMP:
                return GuardAction.FLAG
            case Action.REWIND:
                assert self.rule.rewind_terms is not None
                return self.rule.rewind_terms.otherwise
            case action:
                return GuardAction(action)


def text_rules(policies: Sequence[Policy], phase: Phase, catalog: Catalog, field: str) -> list[TextRule]:
    """Those of ``phase``: ``PROMPT`` for what a user says, ``GENERATED`` for what a model answers.

    An edit of heads says nothing about what another model writes.

    Raises:
        InvalidRequestError: a concept is not loaded; names ``field``.
    """
    return [
        TextRule(policy, rule, rule.concept, _threshold(rule, rule.concept, catalog, field))
        for policy in policies
        for rule in policy.rules
        if rule.concept is not None and rule.phase in (None, Phase.ALL, phase)
    ]


def _threshold(rule: Rule, concept: str, catalog: Catalog, field: str) -> float:
    card = catalog.concept(concept, field).card
    return card.detector.threshold if rule.threshold is None else rule.threshold
