"""The server's certificate, its key and the authorities of clients': renewed files are in force without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from steerserve.config import AccessConfig
from steerserve.errors import AssetError
from steerserve.serving.following import follow


class Certificates:
    """What handshakes of gRPC and HTTP show, and ask of clients. Connections that stand keep what they began with.

    Raises:
        AssetError: a file cannot be read, or the key is not the certificate's.
        ValueError: ``access`` has no certificate.
    """

    def __init__(self, access: AccessConfig) -> None:
        if access.certificate is None or access.private_key is None:
            raise ValueError("expected a certificate and its key")
        self._certificate, self._private_key, self._client_ca = access.certificate, access.private_key, access.client_ca
        self.reload()

    def reload(self) -> None:
        """Read the files again.

        Raises:
            AssetError: as above; what is in force stays.
        """
        pair = (_read(self._private_key), _read(self._certificate))
        ca = None if self._client_ca is None else _read(self._client_ca)
        self._ssl = self._context()  # which checks them; gRPC itself would only fail every handshake
        self._grpc = grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)

    async def watch(self, every_s: float) -> None:
        """Reload whenever a file has changed, until cancelled; what is wrong goes to the log, once."""
        files = [Path(name) for name in (self._certificate, self._private_key, self._client_ca) if name is not None]
        await follow(files, self.reload, "the certificate", every_s)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a port of gRPC."""
        shown = self._grpc

        def fetch() -> grpc.ServerCertificateConfiguration | None:  # before each handshake, in a thread of gRPC's
            nonlocal shown
            if shown is self._grpc:
                return None
            shown = self._grpc
            return shown

        must_show_one = self._client_ca is not None
        # None says that nothing has changed, which its annotation forgets.
        return grpc.dynamic_ssl_server_credentials(shown, fetch, must_show_one)  # type: ignore[arg-type]

    def ssl_context(self) -> ssl.SSLContext:
        """For a port of HTTP."""
        context = self._context()

        def use_latest(connection: ssl.SSLObject, name: str | None, asked: ssl.SSLContext) -> None:
            connection.context = self._ssl

        context.sni_callback = use_latest  # called for clients that name no server, too
        return context

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self._certificate, self._private_key)
        except (OSError, ssl.SSLError) as error:
            files = f"{self._certificate} and {self._private_key}"
            raise AssetError(f"{files}: not a certificate and its key: {error}") from error
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except (OSError, ssl.SSLError) as error:
                raise AssetError(f"{self._client_ca}: no certificates of authorities: {error}") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def certified_names(context: Any) -> list[str]:
    """Of the client certificate that a call of gRPC came with: its common name, and DNS names and URIs among its
    alternative names. A common name that looks like a URI is none of them: authorities check the one, not the other.
    """
    names = context.auth_context()
    common = [name for name in names.get("x509_common_name", ()) if b"://" not in name]
    return [name.decode(errors="replace") for name in (*common, *names.get("peer_dns", ()), *names.get("peer_uri", ()))]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error
