"""API keys: made once, shown once, and known to the server by their hash alone."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime

from steerserve.errors import ServiceError
from steerserve.serving.access import Key
from steerserve.serving.service import Caller

PREFIX = "sk-steer-"
"""Makes a key that leaked into a repository easy to find."""
_NUM_BYTES = 32
_MAX_HEADER = 512


def new_key() -> str:
    """256 random bits."""
    return PREFIX + secrets.token_urlsafe(_NUM_BYTES)


def key_hash(key: str) -> str:
    """What the access file has of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def caller_of(keys: Iterable[Key], authorization: str | None, certified: Iterable[str], now: datetime) -> Caller:
    """Who shows this ``Authorization`` header, or a certificate with one of these names.

    A header counts before a certificate. Every key is compared, in a time that does not depend on where they differ.

    Raises:
        ServiceError: UNAUTHENTICATED; the message does not tell whether the key exists.
    """
    if authorization is not None:
        found = _by_header(keys, authorization)
    else:
        names = set(certified)
        found = next((key for key in keys if key.certificate is not None and key.certificate in names), None)
    if found is None:
        raise ServiceError("UNAUTHENTICATED", "expected 'authorization: Bearer KEY' with a key of this server")
    if found.expires is not None and now >= found.expires:
        raise ServiceError("UNAUTHENTICATED", f"key {found.id} has expired; expected one that is in force")
    return Caller(found.tenant, found.id, frozenset(found.roles))


def _by_header(keys: Iterable[Key], authorization: str) -> Key | None:
    scheme, _, key = authorization[:_MAX_HEADER].partition(" ")
    shown = key_hash(key.strip()) if scheme.lower() == "bearer" else ""
    found = None
    for candidate in keys:
        if candidate.sha256 is not None and hmac.compare_digest(candidate.sha256, shown):
            found = candidate
    return found


def utc_now() -> datetime:
    """The time with its offset."""
    return datetime.now(UTC)
