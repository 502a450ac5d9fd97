"""On which addresses a server listens."""

from __future__ import annotations

import ipaddress

import grpc
import grpc.aio

from steerserve.config import AccessConfig
from steerserve.errors import AssetError, InvalidRequestError


def check_exposed(field: str, host: str, access: AccessConfig) -> None:
    """Refuse an address that others can reach while they need no key, or while keys would be sent in the clear.

    Raises:
        InvalidRequestError: names the option.
    """
    if is_loopback(host) or access.insecure_bind or (access.file is not None and access.certificate is not None):
        return
    lacks = "keys (--access)" if access.file is None else "TLS (--certificate and --private-key)"
    expected = f"loopback, or {lacks}: others can reach this address; --insecure-bind if that is meant"
    raise InvalidRequestError(field, host, expected)


def bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> str:
    """Bind a port; ``host:port`` as bound.

    Raises:
        AssetError: it cannot be bound.
    """
    shown = f"[{host}]" if ":" in host else host
    try:
        if credentials is None:
            bound = server.add_insecure_port(f"{shown}:{port}")
        else:
            bound = server.add_secure_port(f"{shown}:{port}", credentials)
    except RuntimeError as error:
        raise AssetError(f"cannot listen on {shown}:{port}; is another server using it?") from error
    return f"{shown}:{bound}"


def is_loopback(host: str) -> bool:
    """No other machine can be at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
