"""The configuration from a file, the environment and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from steerserve.config import EngineConfig, ServerConfig
from steerserve.errors import AssetError, InvalidRequestError
from steerserve.settings import Layers, Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text("server:\n  port: 1\n  http: {port: 2, host: localhost}\nengine:\n  dtype: float32\n")
    return path


def test_nothing_said_is_the_default() -> None:
    assert Layers(None, {}).settings() == Settings(server=ServerConfig(), engine=EngineConfig())


def test_each_layer_before_the_one_ahead_of_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_SERVER__HTTP__PORT", "3")
    monkeypatch.setenv("STEERSERVE_SERVER__PORT", "4")
    monkeypatch.setenv("STEERSERVE_ENGINE__SITES", '["blocks.1.hook_resid_post"]')
    layers = Layers(file, {"server": {"port": 5}})
    settings = layers.settings()
    assert (settings.server.port, settings.server.http.port, settings.server.http.host) == (5, 3, "localhost")
    assert (settings.engine.dtype, settings.engine.sites) == ("float32", ("blocks.1.hook_resid_post",))
    described = layers.described()
    assert "port: 5  # command line" in described
    assert "port: 3  # environment" in described
    assert f"host: localhost  # {file}" in described
    assert "packs: null  # default" in described


def test_what_is_printed_is_a_file_that_says_the_same(file: Path, tmp_path: Path) -> None:
    layers = Layers(file, {"server": {"envoy": {"policies": ["a", "b@2"]}}})
    again = tmp_path / "again.yaml"
    again.write_text(layers.described())
    assert Layers(again, {}).settings() == layers.settings()
    assert yaml.safe_load(layers.described())["server"]["envoy"]["policies"] == ["a", "b@2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("server: {prot: 7}", r"server\.prot: got 7, expected no such setting; nearest: port"),
        ("sever: {}", "sever: got .*, expected no such setting; nearest: server"),
        ("engine: {max_num_seqs: 0}", r"engine\.max_num_seqs \(.*server\.yaml\): got 0, expected greater than"),
        ("server: {access: {certificate: a.pem}}", "private_key and certificate: expected both or neither"),
        ("3", "the sections 'server' and 'engine'"),
        ("a: b: c", "YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_source(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=problem):
        Layers(file, {}).settings()


def test_variables_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_SERVER__PRT", "1")
    with pytest.raises(InvalidRequestError, match=r"server\.prt: .*nearest: port"):
        Layers(None, {}).settings()
    monkeypatch.delenv("STEERSERVE_SERVER__PRT")
    monkeypatch.setenv("STEERSERVE_ENGINE__SITES", "blocks.1")
    with pytest.raises(InvalidRequestError, match=r"engine\.sites \(environment\): got 'blocks\.1'"):
        Layers(None, {}).settings()
    monkeypatch.setenv("STEERSERVE_ENGINE", "x")
    with pytest.raises(InvalidRequestError, match="JSON in variables of lists"):
        Layers(None, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"missing\.yaml: No such file"):
        Layers(tmp_path / "missing.yaml", {})
