"""What policies let a request ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from steerserve.errors import InvalidRequestError
from steerserve.steering.policies import Policy
from steerserve.types import ConceptTarget, GenerateRequest, Intervention

Asked = tuple[str, Intervention]
"""One intervention of a request, and the path of its field."""


def check_limits(request: GenerateRequest, policies: Sequence[Policy]) -> None:
    """Refuse a request that asks for more than each of its policies allows.

    Raises:
        InvalidRequestError: names the field, the policy and its limit.
    """
    for policy in policies:
        limits = policy.limits
        for field, value, most in (
            ("steering.interventions", len(list(_asked(request))), limits.interventions),
            ("steering.guards", len(request.steering.guards), limits.guards),
            ("sampling.max_tokens", request.sampling.max_tokens, limits.max_tokens),
            ("sampling.n", request.sampling.n, limits.n),
        ):
            if most is not None and value > most:
                raise InvalidRequestError(field, value, f"at most {most}, the limit of policy {policy.tag}")
        if limits.priority is not None and not limits.priority[0] <= request.priority <= limits.priority[1]:
            low, high = limits.priority
            raise InvalidRequestError("priority", request.priority, f"{low} to {high}, as policy {policy.tag} allows")
        for path, intervention in _asked(request):
            _check_intervention(path, intervention, policy)


def _asked(request: GenerateRequest) -> Iterator[Asked]:
    for index, intervention in enumerate(request.steering.interventions):
        yield f"steering.interventions[{index}]", intervention
    for place, guard in enumerate(request.steering.guards):
        for index, edit in enumerate(guard.rewind.edits if guard.rewind else ()):
            yield f"steering.guards[{place}].rewind.edits[{index}]", edit


def _check_intervention(path: str, intervention: Intervention, policy: Policy) -> None:
    limits, target = policy.limits, intervention.target
    if limits.ops is not None and intervention.op not in limits.ops:
        expected = f"{', '.join(limits.ops) or 'none'}: policy {policy.tag} allows no other"
        raise InvalidRequestError(f"{path}.op", str(intervention.op), expected)
    if limits.concepts is not None and not (isinstance(target, ConceptTarget) and target.concept in limits.concepts):
        named = target.concept if isinstance(target, ConceptTarget) else type(target).__name__
        expected = f"one of the concepts {', '.join(limits.concepts) or '(none)'}: policy {policy.tag} allows no other"
        raise InvalidRequestError(f"{path}.target", named, expected)
