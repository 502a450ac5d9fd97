"""The RPCs of operators: what is in force, and reading it again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from grpc.aio import ServicerContext

from steerserve.engine.engine import Engine
from steerserve.errors import PolicyError, SteerserveError
from steerserve.serving.access import AccessFile, Role
from steerserve.serving.admission import Access
from steerserve.serving.policy_files import PolicyFiles
from steerserve.serving.service import Caller
from steerserve.serving.status import end_call, status_of
from steerserve.steering.policy_set import PolicyChanges
from steerserve.v1 import policy_pb2 as pb
from steerserve.v1 import policy_pb2_grpc

_log = logging.getLogger(__name__)

Context = ServicerContext[Any, Any]


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Answers ``steerserve.v1.PolicyService``, to callers with the role of operators."""

    def __init__(
        self, engine: Engine, files: PolicyFiles, access: Access, authenticate: Callable[[Context], Caller]
    ) -> None:
        self._engine = engine
        self._files = files
        self._access = access
        self._authenticate = authenticate

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: Context) -> pb.ListPoliciesResponse:  # noqa: N802
        try:
            self._require_admin(context)
        except SteerserveError as error:
            await end_call(context, status_of(error, str))
        policies = sorted(self._engine.catalog.policies.values(), key=lambda policy: policy.name)
        return pb.ListPoliciesResponse(
            policies=[
                pb.PolicyInfo(
                    name=policy.name, version=policy.version, description=policy.description, concepts=policy.concepts
                )
                for policy in policies
            ]
        )

    async def ReloadPolicies(  # noqa: N802
        self, request: pb.ReloadPoliciesRequest, context: Context
    ) -> pb.ReloadPoliciesResponse:
        try:
            caller = self._require_admin(context)
            changes, access = await asyncio.to_thread(self._reload)
            self._access.put_in_force(access)
            _log.info("policies reloaded for key %s: %s", caller.key_id or "(none)", changes)
        except PolicyError as error:
            # All of it: a status has room for some.
            _log.error("policies are not reloaded, those in force stay: %s", error)
            await end_call(context, status_of(error, str))
        except SteerserveError as error:
            await end_call(context, status_of(error, str))
        return pb.ReloadPoliciesResponse(added=changes.added, changed=changes.changed, removed=changes.removed)

    def _reload(self) -> tuple[PolicyChanges, AccessFile | None]:
        """Policies change only if the access file goes with them."""
        read: list[AccessFile | None] = []
        changes = self._files.reload(lambda names: read.append(self._access.read(names)))
        return changes, read[0]

    def _require_admin(self, context: Context) -> Caller:
        caller = self._authenticate(context)
        self._access.require(caller, Role.ADMIN)
        return caller
