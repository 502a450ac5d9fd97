"""What policies say about a text of another model's traffic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from steerserve.serving.reading import TextReader
from steerserve.serving.service import Caller, Interface, Service
from steerserve.serving.text_rules import VERDICTS, TextRule, text_rules
from steerserve.types import REDACTED_TEXT, GuardAction, Phase, VerdictKind


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
        return VERDICTS[self.action]


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
        if not text or not rules:
            return []
        reading = await self._reader.read(text, [rule.watched for rule in rules], caller, Interface.ENVOY)
        return [
            Mark(rules[sighting.watched].action, *_whole_words(text, sighting.start, sighting.end))
            for sighting in reading.sightings
        ]

    def _rules(self, phase: Phase) -> list[TextRule]:
        """As they are now: policies may have been loaded anew since the last text."""
        catalog = self._engine.catalog
        policies = [catalog.policy(name, "envoy.policies") for name in self._policies]
        return text_rules(policies, phase, catalog, "envoy.policies")


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
