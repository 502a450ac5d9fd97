"""How a client reaches a server: over TLS or not, and with which key."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.serving.listening import is_loopback

DEFAULT_TARGET = "127.0.0.1:50051"
API_KEY_VARIABLE = "STEERSERVE_API_KEY"
API_KEY_FILE_VARIABLE = "STEERSERVE_API_KEY_FILE"
TLS_VARIABLES = {
    "ca": "STEERSERVE_TLS_CA",
    "certificate": "STEERSERVE_TLS_CERTIFICATE",
    "private_key": "STEERSERVE_TLS_PRIVATE_KEY",
}
MAX_RECEIVED_BYTES = 64 << 20
"""Scores of every intervention at every position take more than gRPC's 4 MiB."""
_MAX_KEY_BYTES = 512


@dataclass(frozen=True)
class TLS:
    """Files, in PEM, of a connection that is encrypted.

    Attributes:
        ca: authorities of the server's certificate; None: those of the system.
        certificate, private_key: the client's own, where the server asks for one.
    """

    ca: str | None = None
    certificate: str | None = None
    private_key: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them.

        Raises:
            AssetError: a file cannot be read.
            InvalidRequestError: a certificate without its key, or the reverse.
        """
        if (self.certificate is None) is not (self.private_key is None):
            raise InvalidRequestError("tls", self.certificate or self.private_key, "a certificate and its key")
        ca, key, certificate = (
            None if path is None else _read(path) for path in (self.ca, self.private_key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


def api_key(given: str | None, file: str | None) -> str | None:
    """The key that is given, or else that in ``file``, or else what the environment has; None if nobody says one.

    Raises:
        AssetError: the file cannot be read.
        InvalidRequestError: it is not one line.
    """
    if given is None and file is None:
        given, file = os.environ.get(API_KEY_VARIABLE), os.environ.get(API_KEY_FILE_VARIABLE)
    return given if given is not None or not file else _key_in(file)


def channel_to(target: str, key: str | None, tls: TLS | None) -> tuple[grpc.Channel, grpc.Channel]:
    """A channel to ``host:port``, and the same one that shows ``key`` with every call.

    Args:
        tls: None: if the environment variables STEERSERVE_TLS_CA, _CERTIFICATE and _PRIVATE_KEY name files.

    Raises:
        InvalidRequestError: a key for a server elsewhere, without TLS.
    """
    tls = tls or _tls_of_environment()
    if key and tls is None and not is_loopback(target.rpartition(":")[0].strip("[]")):
        expected = f"TLS: {target} is not on this machine, and the key would be sent in the clear"
        raise InvalidRequestError("api_key", "a key without TLS", expected)
    options = [("grpc.max_receive_message_length", MAX_RECEIVED_BYTES)]
    if tls is None:
        channel = grpc.insecure_channel(target, options)
    else:
        channel = grpc.secure_channel(target, tls.credentials(), options)
    return channel, grpc.intercept_channel(channel, _WithKey(key)) if key else channel


def _tls_of_environment() -> TLS | None:
    named = {name: os.environ[variable] for name, variable in TLS_VARIABLES.items() if os.environ.get(variable)}
    return TLS(**named) if named else None


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the ``authorization`` header to every call."""

    def __init__(self, key: str) -> None:
        self._header = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), self._header])


def _key_in(file: str) -> str:
    key = _read(file).strip()
    if not key or len(key.split()) > 1 or len(key) > _MAX_KEY_BYTES or not key.isascii():
        # Not what it holds: it may be another secret.
        raise InvalidRequestError("api_key_file", file, "a file with one key, and nothing else")
    return key.decode()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error
