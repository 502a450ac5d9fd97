"""The files of one log: opened behind whatever a crash left, appended to, rotated.

The log is a directory of ``audit-<first sequence number>.jsonl``, whose names sort as the records do. The chain goes
on from file to file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steerserve.errors import AssetError
from steerserve.serving.audit.chain import GENESIS, BrokenLineError, Line, line_hash, parse, seal
from steerserve.serving.audit.heads import Head
from steerserve.serving.audit.keys import AuditKey

_LOCK = ".lock"
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Tail:
    """Where the log stands: its last record, and the hash of that."""

    seq: int = 0
    hash: str = GENESIS


@dataclass(frozen=True)
class Position:
    """A place in the log between two records."""

    path: Path
    size: int
    tail: Tail


def log_files(directory: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted(directory.glob("audit-*.jsonl"))


def now() -> str:
    """UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class LogFiles:
    """A log that this process alone writes.

    Attributes:
        tail: what was written last.
        torn: what a crash left of an unfinished line, and where it was put; None if there was none.

    Raises:
        AssetError: another process has it, it cannot be written, or its end is no end of a log made with this key.
    """

    def __init__(self, directory: Path, key: AuditKey, max_bytes: int, rotate_daily: bool) -> None:
        self._directory = directory
        self._key = key
        self._max_bytes = max_bytes
        self._rotate_daily = rotate_daily
        self.tail = Tail()
        self.torn: dict[str, Any] | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FileLock(directory / _LOCK)
            self._lock.acquire(timeout=0)
            self._open()
        except Timeout:
            raise AssetError(f"{directory}: another server writes this log") from None
        except OSError as error:
            raise AssetError(f"{directory}: {error.strerror}") from error

    @property
    def file_name(self) -> str:
        """Where the last record is."""
        return self._path.name

    def check_against(self, head: Head) -> None:
        """Refuse to go on with a log that lacks what was exported.

        Raises:
            AssetError: it ends before the head, or differently there.
        """
        if self.tail.seq < head.seq or (self.tail.seq == head.seq and self.tail.hash != head.hash):
            raise AssetError(
                f"{self._directory}: it ends with record {self.tail.seq}, and head {head.number} was exported at "
                f"record {head.seq}: the log was cut or changed; see `steerserve audit verify`, and start a new one"
            )

    def rotate_if_due(self) -> bool:
        """Go on in a new file if the last one is full or of another day; what was written is on disk then."""
        is_old = self._rotate_daily and self._size > 0 and self._day != now()[:10]
        if self._size < self._max_bytes and not is_old:
            return False
        self.sync()
        self._go_on_in_new_file()
        return True

    def append(self, bodies: Sequence[dict[str, Any]]) -> None:
        """Write records in their order; none of them if this raises.

        Raises:
            OSError: the disk does not take them.
        """
        seq, prev = self.tail.seq, self.tail.hash
        lines = []
        for body in bodies:
            seq += 1
            lines.append(seal(seq, prev, body, self._key))
            prev = line_hash(lines[-1])
        data = memoryview(b"".join(line + b"\n" for line in lines))
        size = len(data)
        while data:
            data = data[os.write(self._file, data) :]
        self._size += size
        self.tail = Tail(seq, prev)

    def sync(self) -> None:
        """Wait until the disk has what was written.

        Raises:
            OSError: it may have lost any of it since the last call.
        """
        os.fsync(self._file)

    def position(self) -> Position:
        """To ``take_back`` what follows."""
        return Position(self._path, self._size, self.tail)

    def take_back(self, position: Position) -> None:
        """Undo the appends since ``position``, as far as the disk allows, and go on in a new file.

        A file on which a write or an fsync has failed is not written again: what of it is on disk is not known.

        Raises:
            OSError: not now.
        """
        size = position.size if position.path == self._path else 0
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        self._size, self.tail = size, position.tail
        if size:
            self._go_on_in_new_file()

    def close(self) -> None:
        """Let another process have the log."""
        os.close(self._file)
        self._lock.release()

    def _open(self) -> None:
        paths = log_files(self._directory)
        for path in reversed(paths):
            last = self._recover(path)
            if last is not None:
                self.tail = Tail(last.seq, last.hash)
                break
        if not paths:
            self._create()
            return
        self._path = paths[-1]
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._file).st_size
        self._day = datetime.fromtimestamp(os.fstat(self._file).st_mtime, UTC).date().isoformat()

    def _go_on_in_new_file(self) -> None:
        full = self._file
        self._create()
        os.close(full)

    def _create(self) -> None:
        path = self._directory / f"audit-{self.tail.seq + 1:012d}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._path, self._size, self._day = path, 0, now()[:10]
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)  # or a crash may lose the file with its name
        finally:
            os.close(directory)

    def _recover(self, path: Path) -> Line | None:
        """The last record of a file; what follows it is set aside."""
        with path.open("rb+") as file:
            end = _end_of_last_line(file.fileno(), os.fstat(file.fileno()).st_size)
            file.seek(end)
            torn = file.read()
            if torn:
                aside = path.with_name(f"{path.name}.torn-{now().replace(':', '')}")
                aside.write_bytes(torn)
                self.torn = {"file": aside.name, "bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
                file.truncate(end)
                os.fsync(file.fileno())
            if end == 0:
                return None
            start = _end_of_last_line(file.fileno(), end - 1)
            file.seek(start)
            data = file.read(end - 1 - start)
        try:
            line = parse(data)
        except BrokenLineError as error:
            raise AssetError(f"{path}: its last line is {error}; see `steerserve audit verify`") from None
        if line.key_id == self._key.id and not line.is_authentic(self._key):
            raise AssetError(f"{path}: its last line was changed; see `steerserve audit verify`")
        return line


def _end_of_last_line(file: int, size: int) -> int:
    """Behind the last line feed of the first ``size`` bytes; 0 if there is none."""
    end = size
    while end > 0:
        begin = max(0, end - _BLOCK)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
