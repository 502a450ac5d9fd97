"""What a policy is: plain data, and the strict schema of the YAML files it is written in.

A policy binds concepts to actions and says what a request under it may ask for. What a rule comes to on the packs it
names is worked out in ``bound_policies``.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from steerserve.steering.packs import ConceptPack, HeadName, Name
from steerserve.strict_yaml import parse_yaml, read_yaml
from steerserve.types import MAX_REWIND_RETRIES, MAX_REWIND_TOKENS, GuardAction, Op, Phase, Rewind, Unit

MAX_RULES = 16


def _version(value: object) -> object:
    if isinstance(value, float):
        raise ValueError(f"expected a version in quotes: YAML reads {value} as a number, and 1.10 as 1.1")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Action(StrEnum):
    """What a rule does: ``CLAMP`` edits at every position; the others act where the concept's score is high."""

    CLAMP = "clamp"
    FLAG = "flag"
    REWIND = "rewind"
    REDACT = "redact"
    BLOCK = "block"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RuleEdit(_Strict):
    """An edit of the concept's rows, or of attention heads in their place, with the terms of a request's.

    Attributes:
        heads: ``L12H5`` each; scaled or blocked.
    """

    op: Op
    value: float | None = Field(default=None, allow_inf_nan=False)
    unit: Unit = Unit.RAW
    always: bool = False
    heads: Annotated[tuple[HeadName, ...], Field(min_length=1)] | None = None

    @field_validator("op")
    @classmethod
    def _edits(cls, op: Op) -> Op:
        if op is Op.MONITOR:
            raise ValueError("expected an edit; a rule with the action 'flag' reads")
        return op

    @field_validator("heads")
    @classmethod
    def _heads_differ(cls, heads: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if heads is not None and len(set(heads)) < len(heads):
            raise ValueError("expected each head once")
        return heads


class RewindTerms(_Strict):
    """How a rule takes tokens back.

    Attributes:
        edit: in force from there on, its value multiplied by the number of the retry. Left out, the r-th retry
            makes the rule's own edit, or the pack's calibrated one, 1 + r times as strong.
        otherwise: what follows after the last retry.
    """

    tokens: int = Field(default=8, ge=1, le=MAX_REWIND_TOKENS)
    retries: int = Field(default=1, ge=1, le=MAX_REWIND_RETRIES)
    edit: RuleEdit | None = None
    otherwise: GuardAction = GuardAction.BLOCK

    @field_validator("otherwise")
    @classmethod
    def _is_final(cls, action: GuardAction) -> GuardAction:
        if action is GuardAction.REWIND:
            raise ValueError("expected 'flag', 'redact' or 'block'")
        return action


class Rule(_Strict):
    """One concept and what is done about it.

    Attributes:
        concept: left out only by a clamp whose edit names heads.
        name: what events call the rule; the concept's, or the heads', if left out.
        edit: at every position of ``phase``. ``calibrated`` is the pack's own action, and the default of a clamp.
        threshold: score above which the rule acts; the card's if left out.
        phase: what is edited and read; left out, a calibrated edit has the card's and everything else ``all``.
        fail: what follows where the activation cannot be read or edited: ``closed`` ends the response.
    """

    concept: Name | None = None
    action: Action
    name: Name | None = None
    edit: Literal["calibrated"] | RuleEdit | None = None
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    rewind: RewindTerms | None = None
    phase: Phase | None = None
    fail: Literal["closed", "open"] = "closed"

    @property
    def label(self) -> str:
        """What events call the rule."""
        return self.name or self.concept or ", ".join(self._heads)

    @property
    def _heads(self) -> tuple[str, ...]:
        return (isinstance(self.edit, RuleEdit) and self.edit.heads) or ()

    @property
    def guard_action(self) -> GuardAction | None:
        """What follows where the score is high; None for a clamp, which reads no score."""
        return None if self.action is Action.CLAMP else GuardAction(self.action)

    @property
    def applied_edit(self) -> Literal["calibrated"] | RuleEdit | None:
        """``edit``, or what stands for it where a clamp leaves it out."""
        return "calibrated" if self.edit is None and self.action is Action.CLAMP else self.edit

    @property
    def rewind_terms(self) -> RewindTerms | None:
        """``rewind``, or its defaults where a rewind leaves it out."""
        return (self.rewind or RewindTerms()) if self.action is Action.REWIND else None

    @property
    def fail_open(self) -> bool:
        """What cannot be read is passed over."""
        return self.fail == "open"

    @model_validator(mode="after")
    def _terms_fit_the_action(self) -> Self:
        if self.concept is None and not (self._heads and self.action is Action.CLAMP):
            raise ValueError("concept: missing, expected a loaded one, or a clamp with an edit of heads")
        if self.threshold is not None and self.action is Action.CLAMP:
            raise ValueError("threshold: expected none, a clamp edits at every position and reads no score")
        if self.rewind is not None and self.action is not Action.REWIND:
            raise ValueError(f"rewind: expected none, the action is {self.action}")
        return self


class Limits(_Strict):
    """What a request under the policy may ask for; None: no limit.

    Attributes:
        interventions: most of its own, those of its guards' rewinds included; 0: none.
        ops: the operations these may have.
        concepts: they may aim at these alone, and at no feature or direction.
        guards: most of its own; 0: none.
        priority: the smallest and the largest.
    """

    interventions: int | None = Field(default=None, ge=0)
    ops: tuple[Op, ...] | None = None
    concepts: tuple[Name, ...] | None = None
    guards: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1)
    priority: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _range_is_ascending(self) -> Self:
        if self.priority is not None and self.priority[0] > self.priority[1]:
            raise ValueError(f"priority: expected the smallest first, got {list(self.priority)}")
        return self


class Policy(_Strict):
    """A named, versioned set of rules."""

    format: Literal["steerserve.policy/1"]
    name: Name
    version: Annotated[Name, BeforeValidator(_version)]
    description: str = ""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=MAX_RULES)]
    limits: Limits = Limits()

    @property
    def tag(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def source(self) -> str:
        """What receipts and events call the policy."""
        return f"policy:{self.tag}"

    @property
    def concepts(self) -> tuple[str, ...]:
        """What its rules name, each once."""
        return tuple(dict.fromkeys(rule.concept for rule in self.rules if rule.concept is not None))

    @model_validator(mode="after")
    def _rules_fit_together(self) -> Self:
        labels = [rule.label for rule in self.rules]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"rules[{index}].name: expected a name that no other rule has, got {label!r}")
        rewinding = [index for index, rule in enumerate(self.rules) if rule.action is Action.REWIND]
        if len(rewinding) > 1:
            raise ValueError(
                f"rules[{rewinding[1]}].action: expected one rule that rewinds, and rules[{rewinding[0]}] does already"
            )
        return self


def policy_of(pack: ConceptPack) -> Policy:
    """A pack's calibrated action, as the policy of its name."""
    return Policy(
        format="steerserve.policy/1",
        name=pack.name,
        version=pack.card.version,
        description=pack.card.description,
        rules=(Rule(concept=pack.name, action=Action.CLAMP),),
    )


def rewind_of(terms: RewindTerms) -> Rewind:
    """The terms as a guard has them; the edits are the compiler's."""
    return Rewind(terms.tokens, (), terms.retries, terms.otherwise)


def read_policy(path: Path) -> Policy:
    """Read one file.

    Raises:
        PolicyError: it cannot be read, or does not follow the schema; says at which lines, and what would be valid.
    """
    return read_yaml(path, Policy)


def parse_policy(data: bytes, origin: str) -> Policy:
    """Read a policy from YAML; ``origin`` is what errors call it.

    Raises:
        PolicyError: as ``read_policy``.
    """
    return parse_yaml(data, origin, Policy)
