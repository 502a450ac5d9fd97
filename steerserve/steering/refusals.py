"""What several edits may not do together; every refusal names the field of the later one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.steering.edits import REQUEST, Edit
from steerserve.steering.plan import Stage
from steerserve.steering.targets import Identity
from steerserve.types import Op, Site

MAX_FEATURES = 8192
"""Of one plan: it is compiled in one piece while others wait."""


def refuse_double_edits(edits: Iterable[Edit]) -> None:
    """Edits of one stage all read the same f: two of one feature have no defined result."""
    edited: dict[tuple[Site, Identity], str] = {}
    for edit in edits:
        if edit.op is Op.MONITOR:
            continue
        for identity in edit.target.identities:
            key = (edit.target.site, identity)
            if key in edited:
                field = edit.field if edit.stage is Stage.POLICY else f"{edit.field}.target"
                expected = f"a feature that {edited[key]} does not already edit"
                raise InvalidRequestError(field, f"{edit.target.label}: feature {identity[1]}", expected)
            edited[key] = edit.field


def refuse_edits_behind_policies(edits: Iterable[Edit], policies: Sequence[Edit]) -> None:
    """A policy sees what a request did at or before its site; behind it, a request could undo what it does.

    A policy of several sites counts as acting at its first: that a later site of it would see the
    request's edit does not bring back what the first one did.
    """
    for edit in edits:
        if edit.op is Op.MONITOR:
            continue
        before = [policy for policy in policies if policy.target.site < edit.target.site]
        if before:
            first = min(before, key=lambda policy: policy.target.site)
            expected = f"a site not behind {first.target.site}, where {first.source} acts, or no such policy"
            raise InvalidRequestError(f"{edit.field}.target", str(edit.target.site), expected)


def refuse_other_sites(edits: Iterable[Edit], sites: Set[Site] | None) -> None:
    """``sites`` are those that can be steered; None: all."""
    for edit in edits:
        if sites is not None and edit.target.site not in sites:
            field = f"{edit.field}.target" if edit.source == REQUEST else edit.field
            expected = f"a site that this server steers: {', '.join(map(str, sorted(sites))) or 'none'}"
            raise IncompatibleError(field, str(edit.target.site), expected)


def refuse_large_plan(edits: Iterable[Edit]) -> None:
    """Entries count, not different features."""
    num_features = sum(len(edit.target.keys) for edit in edits)
    if num_features > MAX_FEATURES:
        expected = f"at most {MAX_FEATURES} in all, each feature of a concept counted for each time it is named"
        raise InvalidRequestError("steering", f"{num_features} features", expected)
