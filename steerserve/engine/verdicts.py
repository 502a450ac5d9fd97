"""What the guardrails decided about one response, from its receipt and what its guards did: data in, data out.

A policy gets ALLOW or MODIFIED only on proof: the kernel reported that it ran on every token in the scope of every
policy edit and reading. One line of the receipt short of that leaves all policies of the response UNPROVEN, as an edit
that several of them make alike is made once, and counted for the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from steerserve.types import GuardAction, GuardEvent, InterventionReceipt, Receipt, Verdict, VerdictKind

REQUEST = "request"

_KINDS = {
    GuardAction.FLAG: VerdictKind.FLAGGED,
    GuardAction.REWIND: VerdictKind.REWOUND,
    GuardAction.REDACT: VerdictKind.REDACTED,
    GuardAction.BLOCK: VerdictKind.BLOCKED,
}

Thresholds = Mapping[tuple[str, int], float]
"""Of each guard, by ``GuardEvent.source`` and ``GuardEvent.guard``."""


def verdicts_of(receipt: Receipt, events: Sequence[GuardEvent], thresholds: Thresholds) -> tuple[Verdict, ...]:
    """The verdicts on one response: those of its policies in their order, then those of the request's own guards.

    Every policy has at least one. The request has none for what went as it asked: neither ALLOW nor MODIFIED.
    """
    of_policies = [entry for entry in receipt.interventions if entry.source != REQUEST]
    verdicts: list[Verdict] = []
    for tag in receipt.policies:
        source = f"policy:{tag}"
        own = [entry for entry in of_policies if entry.source == source] or of_policies
        decided = [*_unproven(source, own, of_policies), *_by_guards(source, events, thresholds)]
        if not any(verdict.kind is VerdictKind.UNPROVEN for verdict in decided):
            decided += _modified(source, own)
        verdicts += decided or [Verdict(VerdictKind.ALLOW, source)]
    own = [entry for entry in receipt.interventions if entry.source == REQUEST]
    return (*verdicts, *(_unproven(REQUEST, own, own) if own else ()), *_by_guards(REQUEST, events, thresholds))


def _unproven(
    source: str, own: Sequence[InterventionReceipt], all_that_must_run: Sequence[InterventionReceipt]
) -> Iterator[Verdict]:
    """One for each line that missed a token in its scope; one for a source that ran on no token at all."""
    missing = [entry for entry in all_that_must_run if entry.tokens_covered < entry.tokens_in_scope]
    for label in dict.fromkeys(entry.label for entry in missing):
        yield Verdict(VerdictKind.UNPROVEN, source, label)
    if not missing and not any(entry.tokens_in_scope for entry in own):
        yield Verdict(VerdictKind.UNPROVEN, source)


def _modified(source: str, own: Sequence[InterventionReceipt]) -> Iterator[Verdict]:
    edited = (entry.label for entry in own if entry.source == source and entry.tokens_edited)
    for label in dict.fromkeys(edited):
        yield Verdict(VerdictKind.MODIFIED, source, label)


def _by_guards(source: str, events: Sequence[GuardEvent], thresholds: Thresholds) -> Iterator[Verdict]:
    """One for each guard and what followed; a guard that could not read and failed open proves nothing there."""
    groups: dict[tuple[int, VerdictKind], list[GuardEvent]] = {}
    for event in events:
        if event.source == source:
            kind = _KINDS[event.action] if math.isfinite(event.score) else VerdictKind.UNPROVEN
            groups.setdefault((event.guard, kind), []).append(event)
    for (guard, kind), group in groups.items():
        yield Verdict(
            kind,
            source,
            group[0].label,
            positions=tuple(event.position for event in group),
            scores=tuple(event.score for event in group),
            threshold=thresholds.get((source, guard)),
        )
