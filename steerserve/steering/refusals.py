"""What several edits may not do together; every refusal names the field of the later one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.steering.bound_policies import is_same_edit
from steerserve.steering.edits import REQUEST, Edit, Watch
from steerserve.steering.plan import Stage
from steerserve.steering.targets import Identity
from steerserve.types import Op, Phase, Site

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
                part = f": feature {identity[1]}" if edit.target.pack is not None else ""
                raise InvalidRequestError(field, edit.target.label + part, expected)
            edited[key] = edit.field


def refuse_edits_behind_policies(edits: Iterable[Edit], policies: Sequence[Edit]) -> None:
    """A policy sees what a request did at or before its site; behind it, a request could undo what it does.

    A policy of several sites counts as acting at its first: that a later site of it would see the
    request's edit does not bring back what the first one did. What a policy reads, an edit behind it cannot change.
    """
    acting = [policy for policy in policies if policy.op is not Op.MONITOR]
    for edit in edits:
        if edit.op is Op.MONITOR:
            continue
        before = [policy for policy in acting if policy.target.site < edit.target.site]
        if before:
            first = min(before, key=lambda policy: policy.target.site)
            expected = f"a site not behind {first.target.site}, where {first.source} acts, or no such policy"
            raise InvalidRequestError(f"{edit.field}.target", str(edit.target.site), expected)


def refuse_second_rewind(watches: Iterable[Watch]) -> Watch | None:
    """The one guard or rule that may rewind: of two, neither could say what the other's retries are worth."""
    rewinding = [watch for watch in watches if watch.rewind is not None]
    if len(rewinding) > 1:
        first, second = (_rewind_field(watch) for watch in rewinding[:2])
        expected = f"none: a request has one, here {first[1]}"
        raise InvalidRequestError(second[0], f"a second rewind, {second[1]}", expected)
    return rewinding[0] if rewinding else None


def _rewind_field(watch: Watch) -> tuple[str, str]:
    """The field of a rewind, and whose it is."""
    field = watch.monitor.field
    if watch.monitor.source == REQUEST:
        return f"{field}.rewind", f"{field}.rewind"
    return field, f"rule {watch.label} of {watch.monitor.source}"


def refuse_foreign_rewinds(rewound: Iterable[Edit], enforced: Sequence[Edit]) -> None:
    """A policy's rewind may make its own edits stronger, and those that equal them, not those of another policy."""
    for edit in rewound:
        for other in enforced:
            shared = edit.target.site == other.target.site and set(edit.target.identities) & set(
                other.target.identities
            )
            own = other.source == edit.source or is_same_edit(replace(edit, phase=other.phase), other)
            if edit.stage is Stage.POLICY and other.op is not Op.MONITOR and shared and not own:
                expected = f"policies that do not both edit {edit.target.label}: {other.source} does as well"
                raise InvalidRequestError(edit.field, edit.source, expected)


def overriding(edit: Edit, enforced: Iterable[Edit]) -> tuple[str, ...]:
    """Sources of the policies that edit the same concept or features as an edit of the request, behind it."""
    if edit.stage is Stage.POLICY or edit.op is Op.MONITOR:
        return ()
    target, phases = edit.target, {edit.phase, Phase.ALL}
    return tuple(
        dict.fromkeys(
            other.source
            for other in enforced
            if other.op is not Op.MONITOR
            and (edit.phase is Phase.ALL or other.phase in phases)
            and (
                (target.pack is not None and target.pack is other.target.pack)
                or (target.site == other.target.site and not set(target.identities).isdisjoint(other.target.identities))
            )
        )
    )


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
