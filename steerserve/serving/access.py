"""Who may ask what: the file that says so, as plain data.

A *tenant* has policies and quotas; a *key* belongs to a tenant and has roles. Keys are random and long, so that one
round of SHA-256 hides them: there is nothing to guess that a slow hash would protect. See ``keys``.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from steerserve.steering.packs import Name
from steerserve.strict_yaml import read_yaml


def _is_hash(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value
    # Not what was given: it may be the key.
    raise ValueError("expected 64 hexadecimal digits, as `steerserve keys create` prints them; not the key")


KeyHash = Annotated[str, BeforeValidator(_is_hash)]
PolicyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?$")]


class Role(StrEnum):
    """What a key is for."""

    USER = "user"
    """May generate and score."""
    ADMIN = "admin"
    """May call ``PolicyService``."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TenantPolicies(_Strict):
    """Policies as ``name`` or ``name@version``.

    Attributes:
        required: on every request of the tenant, whatever it names.
        default: on requests that name none.
        allowed: what requests may name besides; None: every one that is loaded.
    """

    required: tuple[PolicyName, ...] = ()
    default: tuple[PolicyName, ...] = ()
    allowed: tuple[PolicyName, ...] | None = None


class Quotas(_Strict):
    """None: no limit.

    Attributes:
        tokens_per_minute: of prompts and responses together.
        concurrent: requests in flight.
    """

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent: int | None = Field(default=None, ge=1)


class Tenant(_Strict):
    """Whose requests have what in common.

    Attributes:
        may_steer: requests may have interventions and guards of their own.
        first_priority: the smallest priority that requests can have, as smaller is served first; others are raised.
    """

    policies: TenantPolicies = TenantPolicies()
    quotas: Quotas = Quotas()
    may_steer: bool = True
    first_priority: int = 0


class Key(_Strict):
    """One key, without the key.

    Attributes:
        id: names it in logs, metrics and the audit log.
        sha256: of the key.
        certificate: a name of a client certificate that stands for the key under mutual TLS: its common name, or a
            DNS name or URI among its alternative names.
        quotas: of this key, within those of its tenant.
        expires: with its offset from UTC.
    """

    id: Name
    tenant: Name
    roles: tuple[Role, ...] = (Role.USER,)
    sha256: KeyHash | None = None
    certificate: str | None = None
    quotas: Quotas = Quotas()
    expires: datetime | None = None

    @model_validator(mode="after")
    def _can_be_shown(self) -> Self:
        if self.sha256 is None and self.certificate is None:
            raise ValueError("sha256: missing, expected it or a certificate")
        if self.expires is not None and self.expires.tzinfo is None:
            raise ValueError(f"expires: got {self.expires}, expected an offset from UTC too, e.g. 2027-01-01T00:00:00Z")
        return self


class AccessFile(_Strict):
    """Everything of one file."""

    format: Literal["steerserve.access/1"]
    tenants: dict[Name, Tenant]
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for index, key in enumerate(self.keys):
            if key.tenant not in self.tenants:
                known = ", ".join(sorted(self.tenants)) or "none is there"
                raise ValueError(f"keys[{index}].tenant: got {key.tenant!r}, expected a tenant of this file: {known}")
            for field in ("id", "sha256", "certificate"):
                value = getattr(key, field)
                if value is not None and any(getattr(other, field) == value for other in self.keys[:index]):
                    raise ValueError(f"keys[{index}].{field}: {value!r} is another key's, expected one of its own")
        return self


def read_access(path: Path) -> AccessFile:
    """Read the file.

    Raises:
        PolicyError: what is wrong with it, by line.
    """
    return read_yaml(path, AccessFile)
