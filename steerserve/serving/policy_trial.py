"""A policy tried on texts: which of its rules would have acted, had the model written them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from steerserve.engine.engine import Engine
from steerserve.errors import InvalidRequestError, SteerserveError
from steerserve.steering.policies import Action, Limits, Policy, Rule
from steerserve.steering.policy_set import PolicySet
from steerserve.types import GenerateRequest, SamplingParams

AT_ONCE = 32
"""Texts that are handed to the engine together."""


class LabelledText(BaseModel):
    """A line of the file; other fields are passed over. ``label``: whether the policy is to act."""

    model_config = ConfigDict(frozen=True)

    text: str
    label: bool


@dataclass(frozen=True)
class Reading:
    """What became of one text.

    Attributes:
        fired: the highest score of each rule that acted, by its label.
        error: why the text could not be read; a served response would have ended.
    """

    text: str
    label: bool
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


def read_texts(path: Path) -> list[LabelledText]:
    """Read JSON lines of ``{"text": ..., "label": true or false}``.

    Raises:
        InvalidRequestError: the file is missing or empty, or a line is no such object; names the line.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError("--texts", str(path), f"a file of JSON lines ({error})") from error
    texts = []
    for number, line in enumerate(lines, 1):
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
    trial = _flagging(policy)
    engine.replace_policies(PolicySet({trial.name: trial}))
    for first in range(0, len(texts), AT_ONCE):
        batch = texts[first : first + AT_ONCE]
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        readings: dict[str, Reading] = {}
        for index, item in enumerate(batch):
            try:
                engine.add_request(GenerateRequest(str(index), item.text, sampling, policies=(trial.tag,)))
            except SteerserveError as error:
                readings[str(index)] = Reading(item.text, item.label, {}, str(error))
        while engine.has_unfinished():
            for output in engine.step():
                if output.receipt is None:
                    continue
                item = batch[int(output.request_id)]
                fired: dict[str, float] = {}
                for event in output.guard_events:
                    if event.position < output.num_prompt_tokens:
                        fired[event.label] = max(event.score, fired.get(event.label, event.score))
                readings[output.request_id] = Reading(item.text, item.label, fired, str(output.error or ""))
        yield from (readings[str(index)] for index in range(len(batch)))


def confusions(policy: Policy, readings: Sequence[Reading]) -> list[Confusion]:
    """A line for each rule that reads; where there are several, one for any of them first."""
    labels = [rule.label for rule in policy.rules if rule.guard_action is not None]
    lines = [_confusion(label, [(r.label, label in r.fired) for r in readings]) for label in labels]
    return lines if len(labels) == 1 else [_confusion("any", [(r.label, bool(r.fired)) for r in readings]), *lines]


def as_json(policy: Policy, lines: Sequence[Confusion], readings: Sequence[Reading]) -> dict[str, Any]:
    """Everything, for programs."""
    rates = ("precision", "recall", "false_positive_rate")
    return {
        "policy": policy.tag,
        "rules": [vars(line) | {rate: getattr(line, rate) for rate in rates} for line in lines],
        "texts": [vars(reading) for reading in readings],
    }


def _flagging(policy: Policy) -> Policy:
    """The same edits and readings, none of which ends or changes a text; all of a text is as if it were written."""
    if not any(rule.guard_action for rule in policy.rules):
        raise InvalidRequestError("policy", policy.tag, "one with a rule that reads: flag, rewind, redact or block")
    rules = [_as_flag(rule) for rule in policy.rules]
    return policy.model_copy(update={"name": f"{policy.name}-trial", "rules": tuple(rules), "limits": Limits()})


def _as_flag(rule: Rule) -> Rule:
    action = rule.action if rule.action is Action.CLAMP else Action.FLAG
    return rule.model_copy(update={"action": action, "rewind": None, "phase": None})


def _confusion(rule: str, answers: Sequence[tuple[bool, bool]]) -> Confusion:
    counts = {key: answers.count(key) for key in ((True, True), (False, True), (True, False), (False, False))}
    return Confusion(rule, *counts.values())


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None
