"""Keys and TLS mean over HTTP what they mean over gRPC."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
from pathlib import Path

import httpx2
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from openai import OpenAI

from steerserve.serving.keys import key_hash

CHAT = [{"role": "user", "content": "Hello"}]
YEAR = datetime.timedelta(days=365)
KEY = "sk-steer-of-this-test"


def write_certificate(directory: Path) -> dict[str, str]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "steerserve")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + YEAR)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return {"certificate": str(directory / "server.pem"), "private_key": str(directory / "server.key")}


@pytest.fixture(scope="module")
def access(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("access")
    file = {
        "format": "steerserve.access/1",
        "tenants": {"acme": {"policies": {"required": ["mood"]}, "may_steer": False}},
        "keys": [{"id": "first", "tenant": "acme", "sha256": key_hash(KEY)}],
    }
    (directory / "access.yaml").write_text(json.dumps(file))
    return {"file": str(directory / "access.yaml")} | write_certificate(directory)


@pytest.fixture(scope="module")
def ask(start_server, tiny, access):
    """A client with a key, of a server with keys and TLS."""
    trusted = ssl.create_default_context(cafile=access["certificate"])
    with start_server(tiny.config(http={"port": 0}, access=access)) as server:

        def with_key(key: str) -> OpenAI:
            return OpenAI(
                base_url=f"https://{server.http_address}/v1", api_key=key, max_retries=0,
                http_client=httpx2.Client(verify=trusted),
            )  # fmt: skip

        yield with_key


def test_a_wrong_key_is_refused_everywhere(ask) -> None:
    with ask("sk-steer-wrong") as client:
        for call in (
            lambda: client.chat.completions.create(model=None, messages=CHAT),
            lambda: client.completions.create(model=None, prompt="x", stream=True),
            lambda: client.moderations.create(input="x"),
            lambda: client.models.list(),
        ):
            with pytest.raises(openai.AuthenticationError) as raised:
                call()
            assert raised.value.response.headers["www-authenticate"] == "Bearer"
            assert raised.value.type == "authentication_error"


def test_a_key_brings_the_policies_of_its_tenant(ask) -> None:
    with ask(KEY) as client:
        reply = client.chat.completions.create(model=None, messages=CHAT, max_tokens=2)
        assert reply.choices[0].steerserve["receipt"]["policies"] == ["mood@1"]
        assert client.moderations.create(model="tiny-llama", input="x").results


def test_what_the_tenant_may_not_is_forbidden(ask) -> None:
    with ask(KEY) as client, pytest.raises(openai.PermissionDeniedError) as raised:
        client.chat.completions.create(model=None, messages=CHAT, extra_body={"steering": ["tiny-sae/1=block"]})
    assert "may not steer" in raised.value.body["message"]
