"""Signed statements of how far the log had come, kept where whoever can change the log can not.

A head is a line of canonical JSON: ``head`` its own number, ``seq`` and ``hash`` of the log's last line, ``file``,
``time``, ``prev`` the hash of the head before, and ``signature``, Ed25519 over all bytes before ``,"signature":``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from steerserve.errors import AssetError
from steerserve.serving.audit.chain import GENESIS, canonical, line_hash
from steerserve.serving.audit.keys import is_signed

_SIGNATURE_FIELD = b',"signature":"'


@dataclass(frozen=True)
class Head:
    """The log's line ``seq`` had this ``hash``, and all before it were as they were."""

    number: int
    seq: int
    hash: str
    file: str
    time: str
    prev: str
    data: bytes = b""

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The head as a line, without its line feed."""
        content = self._content()
        return content + _SIGNATURE_FIELD + key.sign(content).hex().encode() + b'"}'

    def is_signed(self, key: Ed25519PublicKey) -> bool:
        """By the owner of ``key``, just as it stands."""
        content, _, signature = self.data.partition(_SIGNATURE_FIELD)
        try:
            return content == self._content() and is_signed(key, bytes.fromhex(signature[:-2].decode()), content)
        except ValueError:
            return False

    def _content(self) -> bytes:
        fields = {"head": self.number, "seq": self.seq, "hash": self.hash, "file": self.file, "time": self.time}
        return canonical(fields | {"prev": self.prev}, sort_keys=False)[:-1]


def parse_head(data: bytes) -> Head:
    """Read a head without its line feed.

    Raises:
        ValueError: it is none.
    """
    try:
        fields = json.loads(data)
        number, seq, hash, file, time, prev = (fields[name] for name in ("head", "seq", "hash", "file", "time", "prev"))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not JSON with the fields of a head") from error
    if type(number) is not int or type(seq) is not int:
        raise ValueError("its numbers are none")
    return Head(number, seq, hash, file, time, prev, data)


def read_heads(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of heads with their numbers, one at a time; one that is not complete is left out.

    Raises:
        AssetError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if data.endswith(b"\n"):
                    yield number, data[:-1]
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error


class HeadFile:
    """The second place: a file that heads are added to.

    Attributes:
        last: the newest head in it.

    Raises:
        AssetError: it cannot be written, or its last line is no head that the key has signed.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.last: Head | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise AssetError(f"{path}: {error.strerror}") from error
        size = 0
        last = b""
        for _, last in read_heads(path):
            size += len(last) + 1
        if last:
            try:
                self.last = parse_head(last)
            except ValueError:
                self.last = None
            if self.last is None or not self.last.is_signed(key.public_key()):
                raise AssetError(f"{path}: its last line is no head that this signing key has signed")
        os.ftruncate(self._file, size)  # a head that a crash cut short

    def add(self, seq: int, hash: str, file: str, time: str) -> bytes:
        """Sign and write a head, and wait until the disk has it; the line.

        Raises:
            OSError: the disk has it not.
        """
        number, prev = (self.last.number + 1, line_hash(self.last.data)) if self.last else (1, GENESIS)
        data = Head(number, seq, hash, file, time, prev).sign(self._key)
        size = os.fstat(self._file).st_size
        try:
            _write_all(self._file, data + b"\n")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.last = parse_head(data)
        return data

    def close(self) -> None:
        """No more heads follow."""
        os.close(self._file)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
