"""Keys and certificates on real sockets."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from steerserve import cli
from steerserve.client import TLS, SteerserveClient
from steerserve.config import AccessConfig
from steerserve.errors import AssetError, InvalidRequestError, ServiceError
from steerserve.serving import app
from steerserve.serving.certificates import Certificates
from steerserve.serving.keys import key_hash, new_key
from steerserve.serving.listening import check_exposed

KEY = new_key()


class Authority:
    """Signs certificates and writes them, with their keys, as PEM files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.ca = self._write("ca.pem", self._sign(self._name, self._key, is_ca=True))

    def issue(self, common_name: str, *others: x509.GeneralName, file: str = "") -> tuple[str, str]:
        """A certificate and its key, both files called ``file`` or like the common name."""
        key = ec.generate_private_key(ec.SECP256R1())
        name, file = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]), file or common_name
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        certificate = self._write(f"{file}.pem", self._sign(name, key, *others))
        return certificate, self._write(f"{file}.key", private)

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *others: x509.GeneralName, is_ca: bool = False
    ) -> bytes:
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), *others]
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> str:
        path = self._directory / name
        path.write_bytes(data)
        return str(path)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def access_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("access") / "access.yaml"
    path.write_text(
        "format: steerserve.access/1\n"
        "tenants:\n"
        "  app: {policies: {required: [mood], allowed: []}}\n"
        "keys:\n"
        f"  - {{id: app-1, tenant: app, sha256: {key_hash(KEY)}}}\n"
        "  - {id: app-2, tenant: app, certificate: app-client}\n"
        "  - {id: app-3, tenant: app, certificate: worker.app.example}\n"
        "  - {id: app-4, tenant: app, certificate: 'spiffe://example/app'}\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def guarded(start_server, tiny, access_file: str) -> Iterator[str]:
    with start_server(tiny.config(access=AccessConfig(file=access_file)), max_model_len=256) as server:
        yield server.address


def test_every_call_needs_a_key(guarded: str) -> None:
    with SteerserveClient(guarded, api_key="") as client:
        for call in (lambda: client.generate("x"), client.get_model_info, client.get_server_info):
            with pytest.raises(ServiceError, match="Bearer KEY") as raised:
                call()
            assert raised.value.code == "UNAUTHENTICATED"
        with pytest.raises(ServiceError):
            next(client.generate_stream("x"))


def test_a_key_brings_the_policies_of_its_tenant(
    guarded: str, tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    with SteerserveClient(guarded, api_key=KEY) as client:
        reply = client.generate("x", max_tokens=2)
        assert reply.receipt.policies == ("mood@1",)
        assert reply.token_ids[1] == tiny.policy_token
        with pytest.raises(ServiceError, match="tenant app may name: mood") as raised:
            client.generate("x", policies=["other"])
    assert raised.value.code == "PERMISSION_DENIED"
    assert KEY not in caplog.text
    assert key_hash(KEY) not in caplog.text
    monkeypatch.setenv("STEERSERVE_API_KEY", KEY)
    with SteerserveClient(guarded) as client:
        assert client.get_server_info().max_num_seqs > 0


def test_health_asks_for_no_key(guarded: str) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(guarded) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def mutual(start_server, tiny, authority: Authority, access_file: str) -> Iterator[str]:
    """The address of a server that asks for certificates."""
    certificate, private_key = authority.issue("server")
    access = AccessConfig(file=access_file, certificate=certificate, private_key=private_key, client_ca=authority.ca)
    with start_server(tiny.config(access=access), max_model_len=256) as server:
        yield server.address


def test_tls_with_client_certificates(mutual: str, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = TLS(authority.ca, *authority.issue("app-client"))
    with SteerserveClient(mutual, tls=ours) as client:
        assert client.generate("x", max_tokens=1).receipt.policies == ("mood@1",)
    monkeypatch.setenv("STEERSERVE_TLS_CA", authority.ca)
    monkeypatch.setenv("STEERSERVE_TLS_CERTIFICATE", str(ours.certificate))
    with pytest.raises(InvalidRequestError, match="expected a certificate and its key"):
        SteerserveClient(mutual)
    monkeypatch.setenv("STEERSERVE_TLS_PRIVATE_KEY", str(ours.private_key))
    assert CliRunner().invoke(cli.app, ["health", "--target", mutual]).exit_code == 0
    stranger = TLS(authority.ca, *authority.issue("stranger"))
    with SteerserveClient(mutual, tls=stranger) as client, pytest.raises(ServiceError) as raised:
        client.generate("x", max_tokens=1)
    assert raised.value.code == "UNAUTHENTICATED"
    for name in ("CA", "CERTIFICATE", "PRIVATE_KEY"):
        monkeypatch.delenv(f"STEERSERVE_TLS_{name}")
    for channel in (TLS(authority.ca), None):  # no certificate; no TLS
        with SteerserveClient(mutual, tls=channel) as client, pytest.raises(ServiceError) as raised:
            client.generate("x", max_tokens=1, timeout=10)
        assert raised.value.code == "UNAVAILABLE"


def test_a_certificate_and_a_key_that_do_not_belong_together(authority: Authority) -> None:
    (one, _), (_, other) = authority.issue("one"), authority.issue("other")
    with pytest.raises(AssetError, match="not a certificate and its key"):
        Certificates(AccessConfig(certificate=one, private_key=other))
    with pytest.raises(AssetError, match=r"missing\.pem: No such file"):
        Certificates(AccessConfig(certificate="missing.pem", private_key=other))
    with pytest.raises(AssetError, match=r"other\.key: no certificates of authorities"):
        Certificates(AccessConfig(certificate=authority.issue("one")[0], private_key=one[:-3] + "key", client_ca=other))


@pytest.mark.parametrize(
    ("common_name", "others", "is_known"),
    [
        ("anything", [x509.DNSName("worker.app.example")], True),
        ("anything", [x509.DNSName("elsewhere"), x509.UniformResourceIdentifier("spiffe://example/app")], True),
        ("anything", [x509.DNSName("x.worker.app.example"), x509.UniformResourceIdentifier("spiffe://other")], False),
        ("spiffe://example/app", [], False),  # no authority checks a URI in that place
    ],
)
def test_alternative_names_stand_for_keys(mutual: str, authority: Authority, common_name, others, is_known) -> None:
    tls = TLS(authority.ca, *authority.issue(common_name, *others, file="alternative"))
    with SteerserveClient(mutual, tls=tls) as client:
        if is_known:
            assert client.generate("x", max_tokens=1).receipt.policies == ("mood@1",)
        else:
            with pytest.raises(ServiceError) as raised:
                client.generate("x", max_tokens=1)
            assert raised.value.code == "UNAUTHENTICATED"


def shown_by(address: str, authority: Authority, own: tuple[str, str] | None = None) -> bytes:
    """The certificate that a server shows; one that refuses ours ends the connection at our first word."""
    context = ssl.create_default_context(cafile=authority.ca)
    context.set_alpn_protocols(["h2", "http/1.1"])
    if own is not None:
        context.load_cert_chain(*own)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        if shown is None or not connection.recv(1):
            raise ConnectionError("refused")
    return shown


def is_let_in(address: str, authority: Authority, own: tuple[str, str]) -> bool:
    try:
        return bool(shown_by(address, authority, own))
    except (ssl.SSLError, ConnectionError):
        return False


def test_a_renewed_certificate_is_in_force_without_a_restart(
    start_server, tiny, tmp_path: Path, access_file: str, monkeypatch: pytest.MonkeyPatch, wait_until, caplog
) -> None:
    monkeypatch.setattr(app, "_LOOK_AT_FILES_S", 0.05)
    authority = Authority(tmp_path)
    certificate, private_key = authority.issue("server")
    clients = tmp_path / "clients.pem"
    clients.write_bytes(Path(authority.ca).read_bytes())
    access = AccessConfig(
        file=access_file, certificate=certificate, private_key=private_key, client_ca=str(clients), admin_port=0
    )
    config = tiny.config(access=access, http={"port": 0})
    with start_server(config, max_model_len=256) as server:
        own = authority.issue("app-client")
        addresses = (server.address, server.admin_address, server.http_address)

        def shown() -> set[bytes]:
            return {shown_by(address, authority, own) for address in addresses}

        (first,) = shown()
        with SteerserveClient(server.address, tls=TLS(authority.ca, *own)) as client:
            stream = client.generate_stream("x", max_tokens=200, ignore_eos=True)
            next(stream)
            # A key without its certificate is told of, and changes nothing.
            os.replace(authority.issue("other")[1], private_key)
            wait_until(lambda: "the certificate is not reloaded" in caplog.text)
            assert shown() == {first}
            authority.issue("server")
            wait_until(lambda: first not in shown())
            assert len(shown()) == 1
            assert list(stream)[-1].receipt is not None
        # So are authorities of clients: those of another one are strangers from now on.
        (tmp_path / "another").mkdir()
        clients.write_bytes(Path(Authority(tmp_path / "another").ca).read_bytes())
        for address in addresses:
            wait_until(lambda address=address: not is_let_in(address, authority, own))


def test_http_asks_for_a_client_certificate_too(start_server, tiny, authority: Authority, access_file: str) -> None:
    certificate, private_key = authority.issue("server")
    access = AccessConfig(file=access_file, certificate=certificate, private_key=private_key, client_ca=authority.ca)
    with start_server(tiny.config(access=access, http={"port": 0}), max_model_len=256) as server:
        assert shown_by(server.http_address, authority, authority.issue("anyone"))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shown_by(server.http_address, authority)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.com"])
def test_nobody_listens_beyond_loopback_by_accident(host: str) -> None:
    files = {"certificate": "c", "private_key": "k"}
    with pytest.raises(InvalidRequestError, match="or keys"):
        check_exposed("--host", host, AccessConfig(**files))
    with pytest.raises(InvalidRequestError, match="or TLS"):
        check_exposed("--host", host, AccessConfig(file="f"))
    check_exposed("--host", host, AccessConfig(file="f", **files))
    check_exposed("--host", host, AccessConfig(insecure_bind=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_is_free(host: str) -> None:
    check_exposed("--host", host, AccessConfig())


def test_ipv6(start_server, tiny) -> None:
    with start_server(tiny.config(host="::1"), max_model_len=256) as server:
        assert server.address.startswith("[::1]:")
        with SteerserveClient(server.address) as client:
            assert client.generate("x", max_tokens=1).text


def test_a_key_is_not_sent_in_the_clear(authority: Authority) -> None:
    with pytest.raises(InvalidRequestError, match="the key would be sent in the clear"):
        SteerserveClient("example.com:50051", api_key=KEY)
    SteerserveClient("example.com:50051", api_key=KEY, tls=TLS(authority.ca)).close()
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1"):
        SteerserveClient(target, api_key=KEY).close()


def test_a_key_from_a_file(guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    with SteerserveClient(guarded, api_key_file=str(file)) as client:
        assert client.get_server_info().max_num_seqs
    monkeypatch.setenv("STEERSERVE_API_KEY_FILE", str(file))
    with SteerserveClient(guarded) as client:
        assert client.get_server_info().max_num_seqs
    with SteerserveClient(guarded, api_key="") as client, pytest.raises(ServiceError):
        client.get_server_info()
    monkeypatch.setenv("STEERSERVE_API_KEY", "wrong")
    with SteerserveClient(guarded, api_key_file=str(file)) as client:  # what is said counts before what is around
        assert client.get_server_info().max_num_seqs


@pytest.mark.parametrize("content", ["", "\n", "two words", f"{KEY}\n{KEY}", "x" * 600, "schlüssel"])
def test_a_file_that_is_no_key_is_not_repeated(tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(InvalidRequestError, match="expected a file with one key, and nothing else") as raised:
        SteerserveClient(api_key_file=str(file))
    assert not content.strip() or content not in str(raised.value)
    with pytest.raises(AssetError, match="missing: No such file"):
        SteerserveClient(api_key_file=str(tmp_path / "missing"))
