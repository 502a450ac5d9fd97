"""YAML files with a schema, read so that whatever is wrong is told with its line, and nothing is guessed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from steerserve.errors import PolicyError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16

_FORMS = {r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits, '.', '_' and '-', a letter or digit first"}
"""Patterns of the schemas in words."""

_KINDS = {type(None): "nothing", list: "a list", int: "a number", float: "a number", bool: "true or false"}
"""What a file may be in place of named fields, in words."""

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_yaml(path: Path, model: type[ModelT]) -> ModelT:
    """Read one file.

    Raises:
        PolicyError: it cannot be read, or does not follow the schema; says at which lines, and what would be valid.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PolicyError([f"{path}: {error.strerror}"]) from error
    if len(data) > MAX_FILE_BYTES:
        raise PolicyError([f"{path}: expected at most {MAX_FILE_BYTES} bytes"])
    return parse_yaml(data, str(path), model)


def parse_yaml(data: bytes, origin: str, model: type[ModelT]) -> ModelT:
    """Read YAML; ``origin`` is what errors call it.

    Raises:
        PolicyError: as ``read_yaml``.
    """
    try:
        text = data.decode()
        _refuse_deep(text, origin)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        problems = [f"{origin}:{line}: {problem}" for line, problem in _ambiguities(root)]
        content = None if problems else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PolicyError([f"{origin}:{line}: not YAML: {error.problem}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PolicyError([f"{origin}: not YAML: {error}"]) from error
    if problems:
        raise PolicyError(problems)
    if not isinstance(content, dict):
        raise PolicyError([f"{origin}:1: got {_KINDS.get(type(content), 'text')}, expected named fields"])
    try:
        return model.model_validate(content)
    except ValidationError as error:
        errors = [(each, _choices(content, each["loc"])) for each in error.errors()]
        told = [(_line_of(root, e), _words(e, choices, model)) for e, choices in errors if _says_more(e, choices)]
        raise PolicyError([f"{origin}:{line}: {words}" for line, words in told]) from None


def located(path: Path, problem: str) -> str:
    """A problem that begins with its field, behind the file and the field's line, as far as the file can be read."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return f"{path}: {problem}"
    return f"{path}:{_line(root, _path_of(problem))}: {problem}"


def _refuse_deep(text: str, origin: str) -> None:
    """What is nested deeply takes the square of its length to read, and the interpreter's stack to build."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise PolicyError([f"{origin}:{line}: nested too deeply, expected at most {MAX_DEPTH} levels"])


def _ambiguities(node: yaml.Node | None, seen: set[int] | None = None) -> Iterator[tuple[int, str]]:
    """What YAML allows and a reader would get wrong: keys given twice, of which the last counts, and aliases."""
    seen = set() if seen is None else seen
    if node is None or isinstance(node, yaml.ScalarNode):
        return
    if id(node) in seen:
        yield node.start_mark.line + 1, "an alias, expected everything written out"
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                yield key.start_mark.line + 1, "a list or a mapping as a key, expected a word"
            elif key.value in keys:
                yield key.start_mark.line + 1, f"{key.value}: given twice, expected each field once"
            else:
                keys.add(key.value)
            yield from _ambiguities(value, seen)
    else:
        for item in node.value:
            yield from _ambiguities(item, seen)


def _line_of(root: yaml.Node | None, error: Any) -> int:
    """Where one of pydantic's errors is: what fits together wrongly is told of a whole, and says itself which part."""
    own = _path_of(error["msg"].removeprefix("Value error, ")) if error["type"] == "value_error" else ()
    return _line(root, (*error["loc"], *own))


def _path_of(problem: str) -> tuple[int | str, ...]:
    """``("rules", 1, "name")`` of ``rules[1].name: ...``; empty where it names no field."""
    field, colon, _ = problem.partition(": ")
    if not colon or not re.fullmatch(r"[\w.\[\]-]+", field):
        return ()
    return tuple(int(index) if index else name for index, name in re.findall(r"\[(\d+)\]|([\w-]+)", field))


def _line(node: yaml.Node | None, path: Sequence[int | str]) -> int:
    """Where the field at ``path`` is, or the deepest part of it that is there."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                continue  # pydantic names a choice between models too
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _choices(content: Any, path: Sequence[int | str]) -> frozenset[int]:
    """Which parts of an error's path name one of several models or literals: a class, or ``literal[...]``.

    What an author wrote can look like these; it is found in the content.
    """
    choices = set()
    for index, part in enumerate(path):
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            if isinstance(part, str) and (part[:1].isupper() or "[" in part):
                choices.add(index)
    return frozenset(choices)


def _says_more(error: Any, choices: frozenset[int]) -> bool:
    """False for what pydantic adds to an error that it reports as well."""
    if error["type"] == "too_short":
        return not error["input"]  # else its items are wrong, and were left out before they were counted
    last = len(error["loc"]) - 1
    branch = str(error["loc"][last]) if last in choices else ""
    if branch[:1].isupper():
        return not isinstance(error["input"], str)
    return not branch.startswith("literal[") or not isinstance(error["input"], dict)


def _words(error: Any, choices: frozenset[int], model: type[BaseModel]) -> str:
    """One of pydantic's errors as ours: field, value, what would be valid."""
    parts = [part for index, part in enumerate(error["loc"]) if index not in choices]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        nearest = difflib.get_close_matches(str(parts[-1]), known, n=1)
        return f"{field}: unknown, expected {nearest[0] if nearest else 'only ' + ', '.join(known)}"
    if error["type"] == "missing":
        return f"{field}: missing, expected a value"
    if error["type"] == "string_pattern_mismatch":
        message = _FORMS.get(error["ctx"]["pattern"], f"text of the form {error['ctx']['pattern']}")
    if error["type"] in ("tuple_type", "list_type"):
        message = "a list"
    if error["type"] in ("model_type", "dict_type"):
        message = "named fields"
    if error["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: got {error['input']!r:.80}, expected {message}"


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """What a mapping of the schema may have."""
    models = [model]
    for part in path:
        inside = [each.model_fields[part].annotation for each in models if part in each.model_fields]
        models = [found for annotation in inside for found in _models_in(annotation)] or models
    return list(dict.fromkeys(name for each in models for name in each.model_fields))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
