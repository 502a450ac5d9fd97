"""What policies say about a text of another model's traffic.

Nothing can be steered here, and nothing generated again: a rule that clamps flags, above its concept's threshold, and
one that rewinds does what it would do after the last retry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from steerserve.serving.reading import TextReader, Watched
from steerserve.serving.service import Caller, Interface, Service
from steerserve.steering.policies import Action, Rule
from steerserve.types import REDACTED_TEXT, GuardAction, Phase, VerdictKind

_VERDICTS = {
    GuardAction.FLAG: VerdictKind.FLAGGED,
    GuardAction.REDACT: VerdictKind.REDACTED,
    GuardAction.BLOCK: VerdictKind.BLOCKED,
}


def worst(verdicts: Iterable[VerdictKind]) -> VerdictKind:
    """The gravest; ``ALLOW`` of none."""
    return max(verdicts, key=list(VerdictKind).index, default=VerdictKind.ALLOW)


@dataclass(frozen=True)
class Mark:
    """A place in a text at which a rule acts: whole words, of characters ``[start, end)``."""

    action: GuardAction
    start: int
    end: int

    @property
    def verdict(self) -> VerdictKind:
        """What it makes of the text."""
        return _VERDICTS[self.action]


class Judge:
    """Applies policies to texts.

    Raises:
        InvalidRequestError: a policy is not loaded.
    """

    def __init__(self, service: Service, policies: Sequence[str]) -> None:
        self._reader = TextReader(service)
        self._engine = service.engine_loop.engine
        self._policies = tuple(policies)
        self._rules(Phase.PROMPT)

    async def __call__(self, text: str, phase: Phase, caller: Caller) -> list[Mark]:
        """Where the rules of this phase act.

        Args:
            phase: ``PROMPT`` for what a user says, ``GENERATED`` for what a model answers.

        Raises:
            SteerserveError: the text cannot be judged now.
        """
        rules = self._rules(phase)
        watched = [Watched(concept, self._threshold(rule, concept), rule.fail_open) for rule, concept in rules]
        sightings = await self._reader.read(text, watched, caller, Interface.ENVOY) if text and rules else []
        return [
            Mark(_action_of(rules[sighting.watched][0]), *_whole_words(text, sighting.start, sighting.end))
            for sighting in sightings
        ]

    def _rules(self, phase: Phase) -> list[tuple[Rule, str]]:
        """As they are now, with their concepts: policies may have been loaded anew since the last text.

        An edit of heads says nothing about what another model writes.
        """
        policies = [self._engine.catalog.policy(name, "envoy.policies") for name in self._policies]
        rules = [rule for policy in policies for rule in policy.rules if rule.phase in (None, Phase.ALL, phase)]
        return [(rule, rule.concept) for rule in rules if rule.concept is not None]

    def _threshold(self, rule: Rule, concept: str) -> float:
        card = self._engine.catalog.concept(concept, "envoy.policies").card
        return card.detector.threshold if rule.threshold is None else rule.threshold


def redacted(text: str, marks: Iterable[Mark], start: int = 0, end: int | None = None) -> str:
    """Characters ``[start, end)`` of ``text``, with one sign for each stretch that is redacted, where it begins."""
    spans = sorted(
        (mark.start, mark.end) for mark in marks if mark.action is GuardAction.REDACT and mark.start < mark.end
    )
    merged: list[tuple[int, int]] = []
    for span in spans:
        if merged and span[0] <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], span[1])
        else:
            merged.append(span)
    pieces, at, stop = [], start, len(text) if end is None else end
    for first, last in merged:
        if last <= at or first >= stop:
            continue
        pieces.append(text[at : max(first, at)])
        pieces.append(REDACTED_TEXT if first >= start else "")
        at = min(last, stop)
    return "".join([*pieces, text[at:stop]])


def _action_of(rule: Rule) -> GuardAction:
    match rule.action:
        case Action.CLAMP:
            return GuardAction.FLAG
        case Action.REWIND:
            assert rule.rewind_terms is not None
            return rule.rewind_terms.otherwise
        case action:
            return GuardAction(action)


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """``[start, end)`` without the space around it, and with the rest of the words that it cuts through."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end and _in_word(text[start]):
        while start > 0 and _in_word(text[start - 1]):
            start -= 1
    if start < end and _in_word(text[end - 1]):
        while end < len(text) and _in_word(text[end]):
            end += 1
    return start, end


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
