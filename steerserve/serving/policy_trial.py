"""A policy tried on texts: which of its rules would have acted, had the model written them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from steerserve.engine.engine import Engine
from steerserve.errors import InvalidRequestError, SteerserveError
from steerserve.steering.packs import ConceptPack
from steerserve.steering.policies import Action, Limits, Policy, Rule
from steerserve.steering.policy_set import PolicySet
from steerserve.types import GenerateRequest, SamplingParams

AT_ONCE = 32
"""Texts that are handed to the engine together."""
FALSE_POSITIVE_RATES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
BELOW_ALL = -1e30
"""A threshold that every score exceeds."""


class LabelledText(BaseModel):
    """A line of the file; other fields are passed over. ``label``: whether the policy is to act."""

    model_config = ConfigDict(frozen=True)

    text: str
    label: bool


@dataclass(frozen=True)
class Reading:
    """What became of one text.

    Attributes:
        scores: the highest score that each rule read, by its label.
        fired: those of the rules that acted.
        error: why the text could not be read; a served response would have ended.
    """

    text: str
    label: bool
    scores: dict[str, float]
    fired: dict[str, float]
    error: str = ""


@dataclass(frozen=True)
class Confusion:
    """How often a rule acted on texts on which it is to act, and on others."""

    rule: str
    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def precision(self) -> float | None:
        """Share of those it acted on that are to be acted on; None if it never acted."""
        return _share(self.true_positives, self.false_positives)

    @property
    def recall(self) -> float | None:
        """Share of those to be acted on that it acted on; None if there are none."""
        return _share(self.true_positives, self.false_negatives)

    @property
    def false_positive_rate(self) -> float | None:
        """Share of the others that it acted on; None if there are none."""
        return _share(self.false_positives, self.true_negatives)


@dataclass(frozen=True)
class Threshold:
    """What a rule would do with a threshold.

    Attributes:
        is_in_force: it is the rule's own, or its card's.
    """

    value: float
    is_in_force: bool
    confusion: Confusion


def read_texts(path: Path) -> list[LabelledText]:
    """Read JSON lines of ``{"text": ..., "label": true or false}``.

    Raises:
        InvalidRequestError: the file is missing or empty, or a line is no such object; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other separators of lines
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError("--texts", str(path), f"a file of JSON lines ({error})") from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            texts.append(LabelledText.model_validate_json(line))
        except ValidationError as error:
            expected = f'{{"text": "...", "label": true or false}} ({error.errors()[0]["msg"]})'
            raise InvalidRequestError(f"{path}:{number}", line, expected) from None
    if not texts:
        raise InvalidRequestError("--texts", str(path), "at least one line")
    return texts


def try_policy(engine: Engine, policy: Policy, texts: Sequence[LabelledText]) -> Iterator[Reading]:
    """Read every text behind the policy's edits; the engine must have nothing else to do.

    Raises:
        InvalidRequestError: no rule of the policy reads, or a text does not fit the model.
        PolicyError: the policy does not fit the engine.
    """
    trial, limits = _flagging(policy), rule_thresholds(policy, engine.catalog.packs)
    engine.replace_policies(PolicySet({trial.name: trial}))
    reading = SamplingParams(max_tokens=0)
    for first in range(0, len(texts), AT_ONCE):
        batch = texts[first : first + AT_ONCE]
        readings: dict[str, Reading] = {}
        for index, item in enumerate(batch):
            try:
                engine.add_request(GenerateRequest(str(index), item.text, reading, policies=(trial.tag,)))
            except SteerserveError as error:
                readings[str(index)] = Reading(item.text, item.label, {}, {}, str(error))
        while engine.has_unfinished():
            for output in engine.step():
                if output.receipt is None:
                    continue
                item = batch[int(output.request_id)]
                scores: dict[str, float] = {}
                for event in output.guard_events:
                    scores[event.label] = max(event.score, scores.get(event.label, event.score))
                fired = {label: score for label, score in scores.items() if score > limits[label]}
                readings[output.request_id] = Reading(item.text, item.label, scores, fired, str(output.error or ""))
        yield from (readings[str(index)] for index in range(len(batch)))


def confusions(policy: Policy, readings: Sequence[Reading]) -> list[Confusion]:
    """A line for each rule that reads; where there are several, one for any of them first."""
    labels = [rule.label for rule in policy.rules if rule.guard_action is not None]
    lines = [_confusion(label, [(r.label, label in r.fired) for r in readings]) for label in labels]
    return lines if len(labels) == 1 else [_confusion("any", [(r.label, bool(r.fired)) for r in readings]), *lines]


def rule_thresholds(policy: Policy, packs: Mapping[str, ConceptPack]) -> dict[str, float]:
    """Those of the rules that read, by label."""
    return {
        rule.label: packs[rule.concept].card.detector.threshold if rule.threshold is None else rule.threshold
        for rule in policy.rules
        if rule.guard_action is not None and rule.concept is not None
    }


def choices(label: str, in_force: float, readings: Sequence[Reading]) -> list[Threshold]:
    """What a rule would do with the threshold in force, and with the smallest that let it act on no more than
    ``FALSE_POSITIVE_RATES`` of the texts on which it is not to act; from the smallest to the largest.
    """
    scored = [(reading.label, reading.scores[label]) for reading in readings if label in reading.scores]
    others = sorted((score for is_to_act, score in scored if not is_to_act), reverse=True)
    values = {_rounded_up(others[math.floor(rate * len(others))]) for rate in FALSE_POSITIVE_RATES if others}
    return [
        Threshold(value, value == in_force, _confusion(label, [(to_act, score > value) for to_act, score in scored]))
        for value in sorted({*values, in_force})
    ]


def as_json(
    policy: Policy,
    lines: Sequence[Confusion],
    thresholds: Mapping[str, Sequence[Threshold]],
    readings: Sequence[Reading],
) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "policy": policy.tag,
        "rules": [_with_rates(line) for line in lines],
        "thresholds": {
            label: [
                {"threshold": choice.value, "is_in_force": choice.is_in_force} | _with_rates(choice.confusion)
                for choice in choices
            ]
            for label, choices in thresholds.items()
        },
        "texts": [vars(reading) for reading in readings],
    }


def _with_rates(line: Confusion) -> dict[str, Any]:
    return vars(line) | {rate: getattr(line, rate) for rate in ("precision", "recall", "false_positive_rate")}


def _rounded_up(score: float) -> float:
    """As it would be written in a file."""
    return math.ceil(score * 1000) / 1000


def _flagging(policy: Policy) -> Policy:
    """The same edits and readings: all are told, none ends or changes a text, and all of it counts as written."""
    if not any(rule.guard_action for rule in policy.rules):
        raise InvalidRequestError("policy", policy.tag, "one with a rule that reads: flag, rewind, redact or block")
    rules = [_as_flag(rule) for rule in policy.rules]
    return policy.model_copy(update={"name": f"{policy.name}-trial", "rules": tuple(rules), "limits": Limits()})


def _as_flag(rule: Rule) -> Rule:
    if rule.action is Action.CLAMP:
        return rule.model_copy(update={"phase": None})
    return rule.model_copy(update={"action": Action.FLAG, "rewind": None, "phase": None, "threshold": BELOW_ALL})


def _confusion(rule: str, answers: Sequence[tuple[bool, bool]]) -> Confusion:
    counts = {key: answers.count(key) for key in ((True, True), (False, True), (True, False), (False, False))}
    return Confusion(rule, *counts.values())


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None
