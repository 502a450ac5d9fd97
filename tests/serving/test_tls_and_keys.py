"""Keys and certificates on real sockets."""

from __future__ import annotations

import datetime
import ipaddress
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from steerserve.client import TLS, SteerserveClient
from steerserve.config import AccessConfig
from steerserve.errors import AssetError, InvalidRequestError, ServiceError
from steerserve.serving.keys import key_hash, new_key
from steerserve.serving.listening import check_exposed, server_credentials
from steerserve.v1 import policy_pb2, policy_pb2_grpc

KEY, ADMIN_KEY = new_key(), new_key()


class Authority:
    """Signs certificates and writes them, with their keys, as PEM files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.ca = self._write("ca.pem", self._sign(self._name, self._key, is_ca=True))

    def issue(self, common_name: str) -> tuple[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        certificate = self._write(f"{common_name}.pem", self._sign(name, key, is_ca=False))
        return certificate, self._write(f"{common_name}.key", private)

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, is_ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
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
        f"  - {{id: root, tenant: app, roles: [admin], sha256: {key_hash(ADMIN_KEY)}}}\n"
        "  - {id: app-2, tenant: app, certificate: app-client}\n"
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


def test_tls_with_client_certificates(start_server, tiny, authority: Authority, access_file: str) -> None:
    certificate, private_key = authority.issue("server")
    config = AccessConfig(file=access_file, certificate=certificate, private_key=private_key, client_ca=authority.ca)
    with start_server(tiny.config(access=config), max_model_len=256) as server:
        ours = TLS(authority.ca, *authority.issue("app-client"))
        with SteerserveClient(server.address, tls=ours) as client:
            assert client.generate("x", max_tokens=1).receipt.policies == ("mood@1",)
        stranger = TLS(authority.ca, *authority.issue("stranger"))
        with SteerserveClient(server.address, tls=stranger) as client, pytest.raises(ServiceError) as raised:
            client.generate("x", max_tokens=1)
        assert raised.value.code == "UNAUTHENTICATED"
        for channel in (TLS(authority.ca), None):  # no certificate; no TLS
            with SteerserveClient(server.address, tls=channel) as client, pytest.raises(ServiceError) as raised:
                client.generate("x", max_tokens=1, timeout=10)
            assert raised.value.code == "UNAVAILABLE"


def test_a_certificate_and_a_key_that_do_not_belong_together(authority: Authority) -> None:
    (one, _), (_, other) = authority.issue("one"), authority.issue("other")
    with pytest.raises(AssetError, match="not a certificate and its key"):
        server_credentials(AccessConfig(certificate=one, private_key=other))
    with pytest.raises(AssetError, match=r"missing\.pem"):
        server_credentials(AccessConfig(certificate="missing.pem", private_key=other))


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


def policy_service(channel: grpc.Channel, key: str) -> dict[str, Callable[[], Any]]:
    stub, metadata = policy_pb2_grpc.PolicyServiceStub(channel), [("authorization", f"Bearer {key}")]
    return {
        "list": lambda: stub.ListPolicies(policy_pb2.ListPoliciesRequest(), metadata=metadata),
        "reload": lambda: stub.ReloadPolicies(policy_pb2.ReloadPoliciesRequest(), metadata=metadata),
    }


def test_operators_read_and_reload_policies(start_server, tiny, access_file: str, tmp_path: Path) -> None:
    policy = tmp_path / "watch.yaml"
    text = "format: steerserve.policy/1\nname: watch\nversion: '1'\nrules: [{concept: mood, action: flag}]\n"
    policy.write_text(text)
    config = tiny.config(access=AccessConfig(file=access_file), policies={"directory": str(tmp_path), "watch_s": 0})
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        calls = policy_service(channel, ADMIN_KEY)
        listed = calls["list"]().policies
        assert [(info.name, info.version, list(info.concepts)) for info in listed] == [
            ("mood", "1", ["mood"]),
            ("watch", "1", ["mood"]),
        ]
        policy.write_text(text.replace("'1'", "'2'"))
        assert list(calls["reload"]().changed) == ["watch@2"]
        policy.write_text(text.replace("mood", "moody"))
        with pytest.raises(grpc.RpcError) as raised:
            calls["reload"]()
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "'moody', expected a loaded concept: mood" in raised.value.details()
        assert calls["list"]().policies[1].version == "2"
        for call in policy_service(channel, KEY).values():
            with pytest.raises(grpc.RpcError) as raised:
                call()
            assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_policies_and_access_change_together_or_not_at_all(start_server, tiny, tmp_path: Path) -> None:
    policies, access = tmp_path / "policies", tmp_path / "access.yaml"
    policies.mkdir()
    policy = policies / "watch.yaml"
    text = "format: steerserve.policy/1\nname: watch\nversion: '1'\nrules: [{concept: mood, action: flag}]\n"
    rules = (
        "format: steerserve.access/1\ntenants: {app: {policies: {required: [watch]}}}\n"
        f"keys: [{{id: root, tenant: app, roles: [admin], sha256: {key_hash(ADMIN_KEY)}}}]\n"
    )
    policy.write_text(text)
    access.write_text(rules)
    config = tiny.config(access=AccessConfig(file=str(access)), policies={"directory": str(policies), "watch_s": 0})
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        calls = policy_service(channel, ADMIN_KEY)
        policy.write_text(text.replace("name: watch", "name: look"))
        with pytest.raises(grpc.RpcError, match="required: got 'watch', expected a policy that is in force"):
            calls["reload"]()
        assert [info.name for info in calls["list"]().policies] == ["mood", "watch"]
        access.write_text(rules.replace("[watch]", "[look]"))
        assert list(calls["reload"]().added) == ["look@1"]


def test_a_key_is_not_sent_in_the_clear(authority: Authority) -> None:
    with pytest.raises(InvalidRequestError, match="the key would be sent in the clear"):
        SteerserveClient("example.com:50051", api_key=KEY)
    SteerserveClient("example.com:50051", api_key=KEY, tls=TLS(authority.ca)).close()
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1"):
        SteerserveClient(target, api_key=KEY).close()
