"""Texts from files, and the split that keeps what is tuned apart from what is reported.

A text's split follows from its own hash: it is the same in every run, on every machine, in
whatever file or order the text arrives, and a text that occurs twice falls on one side.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from steerserve.errors import AssetError


class Split(StrEnum):
    """90 % of texts are for training and selection, 5 % for tuning, 5 % for reported figures."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"

    @classmethod
    def of(cls, text: str) -> Split:
        """The split that ``text`` belongs to."""
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        return cls.TRAIN if bucket < 0.9 else cls.VALIDATION if bucket < 0.95 else cls.TEST


@dataclass(frozen=True)
class Document:
    """One text; ``label`` is empty where the file has none."""

    text: str
    label: str = ""


def read_documents(paths: Iterable[Path], split: Split) -> list[Document]:
    """All documents of ``split``, in an order that depends on nothing but their number.

    Files are JSON lines with ``text`` and optionally ``label`` (``.jsonl``, ``.jsonl.gz``), or plain
    text with one document per line (``.txt``).

    Raises:
        AssetError: a file is missing, of another kind, damaged, or has a line without text.
    """
    documents = [doc for path in paths for doc in _read(path) if Split.of(doc.text) is split]
    random.Random(0).shuffle(documents)
    return documents


def _read(path: Path) -> Iterator[Document]:
    if not path.is_file():
        raise AssetError(f"{path} does not exist")
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("jsonl", "txt"):
        raise AssetError(f"{path}: expected a .jsonl, .jsonl.gz or .txt file")
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(line.strip()) if kind == "txt" else _parse(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise AssetError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _parse(path: Path, number: int, line: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise AssetError(f"{path}:{number}: expected a JSON object with a 'text' field")
    return Document(record["text"], str(record.get("label", "")))
