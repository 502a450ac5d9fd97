"""Texts from files and Hugging Face datasets, and the split that keeps what is tuned apart from what is reported.

A text's split follows from its own hash: it is the same in every run, on every machine, in
whatever file or order the text arrives, and a text that occurs twice falls on one side.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from steerserve.errors import AssetError

SHUFFLED_CHARACTERS = 2**26
"""Texts are shuffled in blocks of this many characters; one block is in memory at a time."""


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
    """One text; its ``label``, or where it has none its ``source``, or nothing."""

    text: str
    label: str = ""


@dataclass(frozen=True)
class TextFile:
    """``.jsonl`` with a text in ``text_field`` of each line, or ``.txt`` with a text per line; also with ``.gz``."""

    path: Path
    text_field: str = "text"

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub, streamed, or a local directory: of data files, or from ``save_to_disk``.

    Attributes:
        name: ``org/name`` or ``org/name:config``, or the directory.
        split: the dataset's own split; a ``Split`` is taken from within it.
    """

    name: str
    split: str = "train"
    text_field: str = "text"

    def __str__(self) -> str:
        return f"dataset {self.name}"


Source = TextFile | HubDataset

_Sized = Iterator[tuple[Document, int]]
"""Documents, each with the bytes of a file that were read for it."""


class TextStream:
    """The texts of one split, streamed: iterating again starts again, with the same texts in the same order.

    The order is shuffled, and depends on nothing but what the sources hold.
    """

    def __init__(self, sources: Sequence[Source], split: Split) -> None:
        self._sources = sources
        self._split = split
        self._num_bytes_done = 0

    def __iter__(self) -> Iterator[str]:
        """Yield texts.

        Raises:
            AssetError: a source is missing, of another kind, damaged or empty, or has an entry without text; or no
                text falls into the split.
        """
        self._num_bytes_done, empty = 0, True
        for document, num_bytes in _shuffled(_of_split(self._sources, self._split)):
            self._num_bytes_done += num_bytes
            empty = False
            yield document.text
        if empty:
            raise AssetError(f"{', '.join(map(str, self._sources))}: no text falls into the {self._split} split")

    @property
    def share_done(self) -> float | None:
        """Share of the files' bytes that lie behind; None with a dataset, whose size is not known."""
        sizes = [source.path.stat().st_size for source in self._sources if isinstance(source, TextFile)]
        return self._num_bytes_done / sum(sizes) if len(sizes) == len(self._sources) else None


def read_documents(paths: Iterable[Path], split: Split) -> list[Document]:
    """All documents of ``split``, in the order of ``TextStream``; fields are ``text`` and ``label``, else ``source``.

    Raises:
        AssetError: as ``TextStream``, but a split may be empty.
    """
    sources = [TextFile(path) for path in paths]
    return [document for document, _ in _shuffled(_of_split(sources, split))]


def _of_split(sources: Iterable[Source], split: Split) -> _Sized:
    num_bytes = 0
    for source in sources:
        empty = True
        for document, size in _read_file(source) if isinstance(source, TextFile) else _read_dataset(source):
            empty = False
            num_bytes += size
            if Split.of(document.text) is split:
                yield document, num_bytes
                num_bytes = 0
        if empty:
            raise AssetError(f"{source} holds no text")


def _shuffled(documents: _Sized) -> _Sized:
    rng = random.Random(0)
    block: list[tuple[Document, int]] = []
    num_characters = 0
    for document, size in documents:
        block.append((document, size))
        num_characters += len(document.text)
        if num_characters >= SHUFFLED_CHARACTERS:
            rng.shuffle(block)
            yield from block
            block, num_characters = [], 0
    rng.shuffle(block)
    yield from block


def _read_file(source: TextFile) -> _Sized:
    path = source.path
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if not path.exists():
        raise AssetError(f"{path} does not exist")
    if kind not in ("jsonl", "txt"):
        raise AssetError(f"{path}: expected a .jsonl, .jsonl.gz, .txt or .txt.gz file")
    try:
        with path.open("rb") as file:
            yield from _read_lines(source, file, gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file, kind)
    except (OSError, EOFError, zlib.error) as error:
        raise AssetError(f"{path} cannot be read: {error}") from error


def _read_lines(source: TextFile, file: IO[bytes], lines: Iterable[bytes], kind: str) -> _Sized:
    """``lines`` are those of ``file``, or of what it holds compressed; sizes are counted in ``file`` itself."""
    position = 0
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            document = Document(text) if kind == "txt" else _document(json.loads(text), source.text_field)
        except UnicodeDecodeError as error:
            raise AssetError(
                f"{source}:{number}: expected UTF-8, but byte {error.start} is {line[error.start]:#x}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise AssetError(f"{source}:{number}: not valid JSON text: {error}") from None
        if document is None:
            raise AssetError(
                f"{source}:{number}: expected a JSON object with a {source.text_field!r} field that is a string"
            )
        if document.text.strip():
            yield document, file.tell() - position
            position = file.tell()


def _read_dataset(source: HubDataset) -> _Sized:
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(_rows(source)):
            document = _document(row, source.text_field)
            if document is None:
                expected = f"a string in field {source.text_field!r}; its fields are {', '.join(map(str, row))}"
                raise AssetError(f"{source}, split {source.split}, row {number}: expected {expected}")
            if document.text.strip():
                yield document, 0
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise AssetError(f"{source}, split {source.split}: {reason or type(error).__name__}") from error


def _rows(source: HubDataset) -> Any:
    import datasets

    directory = Path(source.name)
    if (directory / "state.json").is_file() or (directory / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(directory))
        splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        if source.split not in splits:
            raise AssetError(f"{source} has no split {source.split}; it has {', '.join(splits)}")
        return splits[source.split]
    name, _, config = (source.name, "", "") if directory.is_dir() else source.name.partition(":")
    return datasets.load_dataset(name, config or None, split=source.split, streaming=True)


def _document(record: Any, text_field: str) -> Document | None:
    """None without a text; raises ValueError for one that no UTF-8 can hold, as a lone surrogate in JSON."""
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        return None
    record[text_field].encode()
    labels = [record[name] for name in ("label", "source") if record.get(name) is not None]
    return Document(record[text_field], str(labels[0]) if labels else "")
