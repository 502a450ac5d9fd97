"""Who a caller is, and what becomes of the caller's request before the engine sees it.

Policies that a tenant must have are added here, behind every interface: no request can leave them out. Quotas are
taken before the engine has any work, and settled when the exchange ends, however it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from steerserve.errors import PolicyError, ServiceError
from steerserve.serving.access import AccessFile, Quotas, Role, Tenant, read_access
from steerserve.serving.following import follow
from steerserve.serving.keys import caller_of, utc_now
from steerserve.serving.quotas import Reservation, Usage, reserve
from steerserve.serving.service import Caller, Exchange
from steerserve.types import GenerateRequest, GuardAction, Op, SteeringSpec, StepOutput


class Access:
    """The access file in force, and what its tenants and keys have used.

    Args:
        path: None: there are no keys, and everyone may ask everything.
        loaded_policies: names and ``name@version`` of all that are in force now.

    Raises:
        PolicyError: the file is wrong.
    """

    def __init__(
        self,
        path: Path | None,
        loaded_policies: Callable[[], frozenset[str]],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._path = path
        self._loaded_policies = loaded_policies
        self._clock = clock
        self._now = now
        self._usage: dict[str, Usage] = {}
        self._reservations: dict[int, Reservation] = {}
        self._file: AccessFile | None = None
        self.reload()

    def reload(self) -> None:
        """Read the file again; what tenants and keys have used still counts.

        Raises:
            PolicyError: it is wrong, or requires a policy that is not in force. The file in force stays.
        """
        self.put_in_force(self.read(self._loaded_policies()))

    def read(self, loaded_policies: frozenset[str]) -> AccessFile | None:
        """The file as it is now, checked against policies that are in force or about to be; None without one.

        Raises:
            PolicyError: as ``reload``.
        """
        if self._path is None:
            return None
        file = read_access(self._path)
        self._check_policies(file, loaded_policies)
        return file

    def put_in_force(self, file: AccessFile | None) -> None:
        """Have it decide from now on."""
        if file is None:
            return
        for name, tenant in file.tenants.items():
            self._allow(f"tenant {name}", tenant.quotas)
        for key in file.keys:
            self._allow(f"key {key.id}", key.quotas)
        self._file = file

    async def watch(self, every_s: float) -> None:
        """Reload whenever the file has changed, until cancelled; what is wrong goes to the log, once."""
        # What is wrong may be mended by a policy that is being changed with it: it is tried again.
        await follow([] if self._path is None else [self._path], self.reload, "access", every_s)

    def authenticate(self, authorization: str | None, certified: Iterable[str] = ()) -> Caller:
        """Who shows this ``Authorization`` header, or else a client certificate with one of these names.

        Raises:
            ServiceError: UNAUTHENTICATED.
        """
        if self._file is None:
            return Caller(roles=frozenset(Role))
        return caller_of(self._file.keys, authorization, certified, self._now())

    def require(self, caller: Caller, role: Role) -> None:
        """Refuse a caller without a role.

        Raises:
            ServiceError: PERMISSION_DENIED.
        """
        if role not in caller.roles:
            raise ServiceError("PERMISSION_DENIED", f"key {caller.key_id} has not the role {role}, which this needs")

    def admit(self, exchange: Exchange) -> GenerateRequest:
        """The request with the policies that its tenant must have, or none of it.

        Raises:
            ServiceError: PERMISSION_DENIED; UNAVAILABLE where a policy it must have is not in force.
            CapacityError: a quota is used up; says for how long.
            InvalidRequestError: more tokens than the tenant or the key ever has.
        """
        if self._file is None:
            return exchange.request
        caller = exchange.caller
        self.require(caller, Role.USER)
        tenant = self._file.tenants.get(caller.tenant)
        if tenant is None:
            raise ServiceError("PERMISSION_DENIED", f"tenant {caller.tenant} is no more")
        _check_freedoms(tenant, caller.tenant, exchange.request)
        asked = exchange.request.policies
        policies = asked if exchange.is_reading else self._policies(tenant, caller.tenant, asked)
        usages = [self._usage[owner] for owner in (f"tenant {caller.tenant}", f"key {caller.key_id}")]
        self._reservations[exchange.number] = reserve(usages, exchange.request)
        # What one tenant has in the prefix cache must not tell another what its prompts are.
        salt = f"{len(caller.tenant)}:{caller.tenant}:{exchange.request.cache_salt}"
        priority = max(exchange.request.priority, tenant.first_priority)
        return replace(exchange.request, policies=policies, cache_salt=salt, priority=priority)

    async def admitted(self, exchange: Exchange) -> None:
        """From here on it is charged, however it ends."""
        reservation = self._reservations.get(exchange.number)
        if reservation is not None:
            reservation.is_admitted = True

    async def produced(self, exchange: Exchange, output: StepOutput) -> None:
        """Count what it has used."""
        reservation = self._reservations.get(exchange.number)
        if reservation is not None:
            reservation.generated += len(output.token_ids)
            if output.num_prompt_tokens:  # only a last output knows
                reservation.count_prompt(output.num_prompt_tokens)

    async def ended(self, exchange: Exchange, error: BaseException | None) -> None:
        """Settle it."""
        reservation = self._reservations.pop(exchange.number, None)
        if reservation is not None:
            reservation.settle()

    def _allow(self, owner: str, quotas: Quotas) -> None:
        if owner in self._usage:
            self._usage[owner].change(quotas)
        else:
            self._usage[owner] = Usage(owner, quotas, self._clock)

    def _policies(self, tenant: Tenant, name: str, asked: Sequence[str]) -> tuple[str, ...]:
        rules, loaded = tenant.policies, self._loaded_policies()
        missing = next((policy for policy in rules.required if policy not in loaded), None)
        if missing is not None:
            raise ServiceError("UNAVAILABLE", f"policy {missing}, which tenant {name} must have, is not in force")
        if rules.allowed is not None:
            own = {*rules.allowed, *rules.required, *rules.default}
            for index, policy in enumerate(asked):
                if policy not in own and _bare(policy) not in own:
                    allowed = ", ".join(sorted(own)) or "none"
                    message = (
                        f"policies[{index}]: got {policy!r:.120}, expected one that tenant {name} may name: {allowed}"
                    )
                    raise ServiceError("PERMISSION_DENIED", message)
        chosen = asked or rules.default
        required = {_bare(policy): policy for policy in rules.required}
        # The tenant's word stands where a request names another version of what it must have.
        return (*(policy for policy in chosen if _bare(policy) not in required), *rules.required)

    def _check_policies(self, file: AccessFile, loaded: frozenset[str]) -> None:
        problems = [
            f"{self._path}: tenants.{name}.policies.{kind}: got {policy!r}, expected a policy that is in force: "
            f"{', '.join(sorted(loaded)) or 'none is'}"
            for name, tenant in file.tenants.items()
            for kind in ("required", "default")
            for policy in getattr(tenant.policies, kind)
            if policy not in loaded
        ]
        if problems:
            raise PolicyError(problems)


def _check_freedoms(tenant: Tenant, name: str, request: GenerateRequest) -> None:
    if not tenant.may_steer and not _only_reads(request.steering):
        expected = "expected policies, and interventions and guards that only monitor and flag"
        raise ServiceError("PERMISSION_DENIED", f"steering: tenant {name} may not steer; {expected}")


def _only_reads(steering: SteeringSpec) -> bool:
    edits = any(intervention.op is not Op.MONITOR for intervention in steering.interventions)
    return not edits and all(guard.action is GuardAction.FLAG for guard in steering.guards)


def _bare(policy: str) -> str:
    return policy.partition("@")[0]
