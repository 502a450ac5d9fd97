"""Who may import whom: the layers of the design, held on the source text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import steerserve

PACKAGE = Path(steerserve.__file__).parent
ROOTS = {"__init__", "__main__", "cli"}
"""Modules that put the layers together; they may import any of them."""

PLAIN = {"types", "errors", "config", "strict_yaml"}
"""Plain data; everyone may import it."""

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "config": {"errors"},
    "settings": {"config", "errors"},
    "strict_yaml": {"errors"},
    "kernels": PLAIN,
    "sae": PLAIN | {"kernels"},
    "models": PLAIN | {"sae", "kernels"},
    "steering": PLAIN | {"sae"},
    "engine": PLAIN | {"models", "steering", "kernels"},
    "circuits": PLAIN | {"models", "sae", "steering"},
    "lab": PLAIN | {"models", "sae", "steering"},
    "serving": PLAIN | {"engine", "steering", "v1"},
    "client": PLAIN | {"serving", "v1"},
    "display": PLAIN,
    "demo": PLAIN | {"client", "display", "lab", "models"},
}

CIRCUIT_COMMANDS = (
    "discover",
    "edges",
    "faithfulness",
    "features",
    "geometry",
    "lens",
    "monitor_plan",
    "monitors",
    "options",
    "pairs",
    "patch",
    "probe",
    "progress",
    "roles",
    "stability",
)

EXCEPTIONS: dict[str, set[str]] = {
    # A card must measure the path that serves.
    "lab.concept_eval.continuations": {"engine"},
    # Commands of both read the same texts and take the same options.
    **{f"circuits.commands.{name}": {"lab"} for name in CIRCUIT_COMMANDS},
    # A monitor is fitted and judged as a concept's detector is, on the same texts.
    **{f"circuits.monitoring.{name}": {"lab"} for name in ("examples", "probes", "reads")},
    "lab.concept_eval.teacher_forced": {"kernels"},
    "lab.evaluation.splice": {"kernels"},  # the figures are of the kernels that serve
    "serving.app": {"models", "sae"},  # loads what it serves
    "serving.policy_commands": {"client"},  # `policy reload` asks a server as its users do
    "steering.compiler": {"kernels"},  # a plan carries the kernel's op codes
}

WIRE = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google"}
"""Packages of the wire; only its two ends may know them."""
ENDS_OF_THE_WIRE = {"serving", "client"}


def python_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "v1")


def module_of(path: Path) -> str:
    """Dotted name below the package: ``lab.concepts``, ``cli``; a package is its ``__init__``'s directory."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(module: str, imported: str) -> bool:
    layer = module.split(".")[0]
    package, *rest = imported.split(".")
    if package in WIRE:
        return layer not in ENDS_OF_THE_WIRE
    if package != "steerserve" or layer in ROOTS:
        return False
    return rest[0] not in {layer} | ALLOWED[layer] | EXCEPTIONS.get(module, set())


def test_every_layer_has_a_rule() -> None:
    layers = {module_of(path).split(".")[0] for path in python_files()}
    assert layers - ROOTS == ALLOWED.keys()


def test_every_directory_with_code_is_a_package() -> None:
    """A directory without ``__init__.py`` works from the checkout and is missing from the wheel."""
    assert [path for path in python_files() if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", python_files(), ids=module_of)
def test_imports_stay_within_the_layers(path: Path) -> None:
    module = module_of(path)
    assert [imported for imported in imports_of(path) if forbidden(module, imported)] == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("types", "steerserve.config.EngineConfig"),
        ("kernels.steer_delta", "steerserve.sae.model"),
        ("sae.model", "steerserve.models.loading"),
        ("steering.compiler", "steerserve.engine.engine"),
        ("engine.engine", "grpc"),
        ("engine.engine", "steerserve.serving.servicer"),
        ("lab.training", "steerserve.engine.engine"),
        ("cli", "grpc"),
    ],
)
def test_the_rules_can_fail(module: str, imported: str) -> None:
    assert forbidden(module, imported)
