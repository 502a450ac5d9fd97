"""On which addresses a server listens, and under which credentials."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path
from typing import Any

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


def server_credentials(access: AccessConfig) -> grpc.ServerCredentials | None:
    """What gRPC shows, and asks of clients; None without TLS.

    Raises:
        AssetError: a file cannot be read, or the key is not the certificate's.
    """
    if access.certificate is None or access.private_key is None:
        return None
    _check_pair(access.certificate, access.private_key)
    return grpc.ssl_server_credentials(
        [(_read(access.private_key), _read(access.certificate))],
        root_certificates=None if access.client_ca is None else _read(access.client_ca),
        require_client_auth=access.client_ca is not None,
    )


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


def common_names(context: Any) -> list[str]:
    """Of the client certificate that a call came with."""
    return [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", ())]


def is_loopback(host: str) -> bool:
    """No other machine can be at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_pair(certificate: str, private_key: str) -> None:
    """gRPC itself would only fail every handshake."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key)
    except (OSError, ssl.SSLError) as error:
        raise AssetError(f"{certificate} and {private_key}: not a certificate and its key: {error}") from error


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error
