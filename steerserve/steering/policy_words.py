"""A policy in words: what it reads and edits where, what follows, and what requests under it may do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from steerserve.steering.packs import ConceptPack
from steerserve.steering.policies import Limits, Policy, RewindTerms, Rule, RuleEdit
from steerserve.steering.targets import edited_rows
from steerserve.types import GuardAction, Op, Phase, Unit

POSITIONS = {Phase.ALL: "every token", Phase.PROMPT: "every prompt token", Phase.GENERATED: "every generated token"}
OPS = {
    Op.CLAMP: "sets features to {} where they are active",
    Op.CLIP: "caps features at {}",
    Op.BLOCK: "removes features",
    Op.SCALE: "multiplies features by {}",
    Op.ADD: "adds {} to features",
    Op.MONITOR: "reads features",
}
HEAD_OPS = {Op.SCALE: "multiplies what heads put out by {:g}", Op.BLOCK: "silences heads"}
FOLLOWS = {
    GuardAction.FLAG: "the response says so",
    GuardAction.REDACT: "the word is not shown",
    GuardAction.BLOCK: "the response ends",
}


def explain(policy: Policy, packs: Mapping[str, ConceptPack]) -> Iterator[str]:
    """The policy's lines; every concept it names is among ``packs``."""
    yield f"{policy.tag}: {policy.description}" if policy.description else policy.tag
    for rule in policy.rules:
        pack = None if rule.concept is None else packs[rule.concept]
        named = f"rule {rule.name}, " if rule.name else ""
        yield named + ("attention heads" if pack is None else f"concept {rule.concept} ({pack.tag})")
        for line in (*_edit_lines(rule, pack), *_reading_lines(rule, pack)):
            yield f"  {line}"
        yield f"  if it cannot be read or edited there: {_failure(rule)}"
    yield "requests under it"
    for line in _limit_lines(policy.limits):
        yield f"  {line}"


def _edit_lines(rule: Rule, pack: ConceptPack | None) -> Iterator[str]:
    edit = rule.applied_edit
    if isinstance(edit, RuleEdit) and edit.heads is not None:
        words, positions = HEAD_OPS[edit.op].format(edit.value), POSITIONS[rule.phase or Phase.ALL]
        yield f"edit: {words} ({', '.join(edit.heads)}), at {positions}"
    elif edit is not None and pack is not None:
        where = ", ".join(f"{len(target.keys)} at {target.site}" for target in edited_rows(pack)) or pack.detector_site
        phase = rule.phase or (pack.card.policy.phase if edit == "calibrated" else Phase.ALL)
        yield f"edit: {_edit_words(edit, pack)} ({where}), at {POSITIONS[phase]}"


def _reading_lines(rule: Rule, pack: ConceptPack | None) -> Iterator[str]:
    if rule.guard_action is not None and pack is not None:
        threshold = pack.card.detector.threshold if rule.threshold is None else rule.threshold
        source = "the card's" if rule.threshold is None else "this policy's"
        reading = f"the {pack.card.detector.kind} at {pack.card.detector.site}"
        yield f"read: {reading}, at {POSITIONS[rule.phase or Phase.ALL]}"
        terms = rule.rewind_terms
        follows = FOLLOWS[rule.guard_action] if terms is None else _rewind_words(terms)
        yield f"above {threshold:g} ({source} threshold): {follows}"
        yield from _detection_lines(pack)
        if rule.guard_action is GuardAction.REDACT and rule.phase is not Phase.GENERATED:
            yield "in the prompt, where there is nothing to hide: the response says so"


def _detection_lines(pack: ConceptPack) -> Iterator[str]:
    """What is known of the card's threshold; evaluations are free-form."""
    told = pack.card.evaluation.get("detection")
    names = ("positive_texts", "negative_texts", "true_positive_rate", "false_positive_rate")
    if isinstance(told, dict) and all(isinstance(told.get(name), int | float) for name in names):
        positive, negative, found, wrong = (told[name] for name in names)
        texts = f"of {positive} held-out texts that show it {found:.1%} exceed"
        yield f"{texts} the card's {pack.card.detector.threshold:g}, of {negative} others {wrong:.1%}"
    yield "`steerserve policy test` shows what other thresholds would find in your texts"


def _edit_words(edit: RuleEdit | str, pack: ConceptPack) -> str:
    if not isinstance(edit, RuleEdit):
        action = pack.card.policy
        return OPS[action.op].format("the pack's calibrated values") + (" or not" if action.always else "")
    value = "" if edit.value is None else f"{edit.value:g}"
    value += " times their recorded maximum" if edit.unit is Unit.MAX_ACTIVATION else ""
    return OPS[edit.op].format(value) + (" or not" if edit.always else "")


def _rewind_words(terms: RewindTerms) -> str:
    stronger = "that edit grows with each retry" if terms.edit else "the edit is made stronger with each retry"
    times = "once" if terms.retries == 1 else f"up to {terms.retries} times"
    otherwise = FOLLOWS[terms.otherwise]
    again = f"the last {terms.tokens} tokens are written again, {times}; {stronger}"
    return f"{again}. After that, or in the prompt: {otherwise}"


def _failure(rule: Rule) -> str:
    return "the response goes on" if rule.fail_open else "the response ends with an error"


def _limit_lines(limits: Limits) -> Iterator[str]:
    if limits.interventions == 0:
        yield "may not edit or read by themselves"
    else:
        most = "any number of" if limits.interventions is None else f"at most {limits.interventions}"
        ops = "" if limits.ops is None else f" ({', '.join(limits.ops) or 'none'} alone)"
        concepts = "" if limits.concepts is None else f" on the concepts {', '.join(limits.concepts) or '(none)'} alone"
        yield f"may make {most} interventions of their own{ops}{concepts}; where both edit the same, the policy wins"
    guards = "any number of" if limits.guards is None else "no" if limits.guards == 0 else f"at most {limits.guards}"
    yield f"may bring {guards} guards of their own"
    for name, limit in (("tokens", limits.max_tokens), ("responses", limits.n)):
        if limit is not None:
            yield f"may ask for at most {limit} {name}"
    if limits.priority is not None:
        yield f"may have a priority from {limits.priority[0]} to {limits.priority[1]}"
