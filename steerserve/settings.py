"""The configuration of a server from a file, the environment and the command line, each before the one ahead of it.

The file is YAML with two sections, ``server`` and ``engine``: the fields of ``ServerConfig`` and ``EngineConfig``. In
the environment ``server.http.port`` is ``STEERSERVE_SERVER__HTTP__PORT``; lists and sections are JSON there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from steerserve.config import EngineConfig, ServerConfig
from steerserve.errors import AssetError, InvalidRequestError

Values = Mapping[str, Any]
"""Nested by section."""

DEFAULT = "default"
COMMAND_LINE = "command line"
OPTIONS = {
    "server.packs": "--pack",
    "server.saes": "--sae",
    "server.policies.directory": "--policy-dir",
    "server.access.file": "--access",
    "server.audit.directory": "--audit-dir",
    "server.envoy.policies": "--envoy-policy",
    "engine.sites": "--site",
}
"""Those that are not named as their setting; of ``access`` and ``telemetry`` the section is left out."""


class Settings(BaseSettings):
    """Everything ``steerserve serve`` can be told."""

    model_config = SettingsConfigDict(
        env_prefix="STEERSERVE_", env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=False
    )

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The layers are merged before they come here."""
        return (init_settings,)


class Layers:
    """What each source says.

    Raises:
        AssetError: the file cannot be read.
        InvalidRequestError: it is not YAML, or not a mapping.
    """

    def __init__(self, file: Path | None, flags: Values) -> None:
        try:
            environment = EnvSettingsSource(Settings)()
        except SettingsError as error:
            raise InvalidRequestError("environment", str(error), "JSON in variables of lists and sections") from None
        self._layers: list[tuple[str, Values]] = [
            (COMMAND_LINE, flags),
            ("environment", environment),
            (str(file), {} if file is None else _read(file)),
        ]

    def settings(self) -> Settings:
        """All of it.

        Raises:
            InvalidRequestError: an unknown name, or a value that is not valid; names both.
        """
        merged: dict[str, Any] = {}
        for _, values in reversed(self._layers):
            merged = _merged(merged, values)
        try:
            return Settings(**merged)
        except ValidationError as error:
            raise self._typed(error) from None

    def source(self, path: tuple[str, ...]) -> str:
        """Where the value at ``path`` is from."""
        return next((name for name, values in self._layers if _has(values, path)), DEFAULT)

    def described(self) -> str:
        """The settings in force as a file that would give them, each with its source."""
        dumped = self.settings().model_dump(mode="json")
        return "\n".join(self._lines(dumped, ())) + "\n"

    def _lines(self, values: Values, path: tuple[str, ...]) -> Iterator[str]:
        for name, value in values.items():
            here = (*path, name)
            indent = "  " * len(path)
            if isinstance(value, Mapping):
                yield f"{indent}{name}:"
                yield from self._lines(value, here)
            else:
                shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
                yield f"{indent}{name}: {shown}  # {self.source(here)}"

    def _typed(self, error: ValidationError) -> InvalidRequestError:
        problem = error.errors()[0]
        path = tuple(str(part) for part in problem["loc"])
        field = ".".join(path)
        if problem["type"] == "extra_forbidden":
            known = _fields(path[:-1])
            nearest = difflib.get_close_matches(path[-1], known, n=3, cutoff=0.0)
            return InvalidRequestError(field, problem["input"], f"no such setting; nearest: {', '.join(nearest)}")
        message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        source = self.source(path)
        name = _option(path) if source == COMMAND_LINE else f"{field} ({source})"
        return InvalidRequestError(name, problem["input"], message)


def _option(path: tuple[str, ...]) -> str:
    setting = ".".join(part for part in path if not part.isdigit())
    section, *names = [part for part in setting.split(".") if part not in ("access", "telemetry")]
    return OPTIONS.get(setting) or "--" + "-".join(names or [section]).replace("_", "-")


def _read(file: Path) -> Values:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AssetError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequestError("--config", str(file), f"YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("--config", str(file), "the sections 'server' and 'engine'")
    return content


def _merged(below: Values, above: Values) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        merged[name] = _merged(under or {}, value) if both else value
    return merged


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _fields(path: tuple[str, ...]) -> list[str]:
    model: Any = Settings
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
