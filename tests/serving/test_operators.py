"""What operators do with a running server, over gRPC and from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from typer.testing import CliRunner, Result

from steerserve import SteerserveClient, cli
from steerserve.config import AccessConfig
from steerserve.errors import InvalidRequestError, ServiceError
from steerserve.serving.keys import key_hash, new_key
from steerserve.v1 import policy_pb2, policy_pb2_grpc

KEY, ADMIN_KEY = new_key(), new_key()
WATCH = "format: steerserve.policy/1\nname: watch\nversion: '1'\nrules: [{concept: mood, action: flag}]\n"


@pytest.fixture(scope="module")
def access_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("access") / "access.yaml"
    path.write_text(
        "format: steerserve.access/1\n"
        "tenants: {app: {}}\n"
        "keys:\n"
        f"  - {{id: app-1, tenant: app, sha256: {key_hash(KEY)}}}\n"
        f"  - {{id: root, tenant: app, roles: [admin], sha256: {key_hash(ADMIN_KEY)}}}\n"
    )
    return str(path)


def policy_service(channel: grpc.Channel, key: str) -> dict[str, Callable[[], Any]]:
    stub, metadata = policy_pb2_grpc.PolicyServiceStub(channel), [("authorization", f"Bearer {key}")]
    return {
        "list": lambda: stub.ListPolicies(policy_pb2.ListPoliciesRequest(), metadata=metadata),
        "reload": lambda: stub.ReloadPolicies(policy_pb2.ReloadPoliciesRequest(), metadata=metadata),
    }


def test_operators_read_and_reload_policies(start_server, tiny, access_file: str, tmp_path: Path) -> None:
    policy = tmp_path / "watch.yaml"
    policy.write_text(WATCH)
    config = tiny.config(access=AccessConfig(file=access_file), policies={"directory": str(tmp_path), "watch_s": 0})
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        calls = policy_service(channel, ADMIN_KEY)
        listed = calls["list"]().policies
        assert [(info.name, info.version, list(info.concepts)) for info in listed] == [
            ("mood", "1", ["mood"]),
            ("watch", "1", ["mood"]),
        ]
        policy.write_text(WATCH.replace("'1'", "'2'"))
        assert list(calls["reload"]().changed) == ["watch@2"]
        policy.write_text(WATCH.replace("mood", "moody"))
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
    rules = (
        "format: steerserve.access/1\ntenants: {app: {policies: {required: [watch]}}}\n"
        f"keys: [{{id: root, tenant: app, roles: [admin], sha256: {key_hash(ADMIN_KEY)}}}]\n"
    )
    policy.write_text(WATCH)
    access.write_text(rules)
    config = tiny.config(access=AccessConfig(file=str(access)), policies={"directory": str(policies), "watch_s": 0})
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        calls = policy_service(channel, ADMIN_KEY)
        policy.write_text(WATCH.replace("name: watch", "name: look"))
        with pytest.raises(grpc.RpcError, match="required: got 'watch', expected a policy that is in force"):
            calls["reload"]()
        assert [info.name for info in calls["list"]().policies] == ["mood", "watch"]
        access.write_text(rules.replace("[watch]", "[look]"))
        assert list(calls["reload"]().added) == ["look@1"]


@pytest.fixture
def operated(start_server, tiny, access_file: str, tmp_path: Path) -> Iterator[Any]:
    """A server whose operators have a port of their own, and the policy file it reads."""
    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "watch.yaml").write_text(WATCH)
    access = AccessConfig(file=access_file, admin_port=0)
    with start_server(tiny.config(access=access, policies={"directory": str(policies), "watch_s": 0})) as server:
        yield server


def services(address: str) -> set[str]:
    with grpc.insecure_channel(address) as channel:
        return set(ProtoReflectionDescriptorDatabase(channel).get_services())


def test_operators_have_a_port_of_their_own_and_nobody_else_is_there(operated) -> None:
    with grpc.insecure_channel(operated.address) as channel:
        for call in policy_service(channel, ADMIN_KEY).values():
            with pytest.raises(grpc.RpcError) as raised:
                call()
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with SteerserveClient(operated.admin_address, api_key=KEY) as client:
        for refused, code in ((client.reload_policies, "PERMISSION_DENIED"), (client.get_model_info, "UNIMPLEMENTED")):
            with pytest.raises(ServiceError) as error:
                refused()
            assert error.value.code == code
    ours = {name for name in services(operated.address) if name.startswith("steerserve")}
    assert ours == {"steerserve.v1.GenerationService"}
    assert services(operated.admin_address) == {
        "steerserve.v1.PolicyService",
        reflection.SERVICE_NAME,
    }


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1"])
def test_that_port_is_on_loopback_unless_keys_and_tls_guard_it(tiny, start_server, access_file: str, host: str) -> None:
    access = AccessConfig(file=access_file, admin_port=0, admin_host=host)
    with pytest.raises(InvalidRequestError, match=r"--admin-host: got .*, expected loopback, or TLS"):
        start_server(tiny.config(access=access)).__enter__()


def test_reload_says_what_changed_or_why_nothing_did(operated, tmp_path: Path) -> None:
    file, key, users_key = tmp_path / "policies" / "watch.yaml", tmp_path / "key", tmp_path / "users-key"
    key.write_text(ADMIN_KEY)
    users_key.write_text(KEY)

    def reload(key: Path = key) -> Result:
        arguments = ["policy", "reload", "--target", operated.admin_address, "--api-key-file", str(key)]
        return CliRunner().invoke(cli.app, arguments)

    assert (reload().exit_code, reload().stdout) == (0, "no change\n")
    file.write_text(WATCH.replace("'1'", "'2'"))
    assert reload().stdout == "changed watch@2\n"
    file.write_text(WATCH.replace("flag", "flog").replace("mood", "moody"))
    wrong = reload()
    assert wrong.exit_code == 1
    assert "nothing has changed:\n" in wrong.stderr  # the server, in this process, may log in front of it
    assert "watch.yaml:4: rules[0].action: got 'flog', expected 'clamp', 'flag'" in wrong.stderr
    refused = reload(users_key)
    assert refused.exit_code == 2
    assert "app-1 has not the role admin" in refused.stderr
    nobody = CliRunner().invoke(cli.app, ["policy", "reload", "--target", "127.0.0.1:1"])
    assert nobody.exit_code == 2
    assert "Traceback" not in nobody.stderr
