"""Whether a log is what the server wrote: every line is looked at once, and nothing of it is kept.

With the key of the MACs, each line is checked by itself. With the public key, exported heads are: a head that fits
proves its line and, through the chain of hashes, all before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from steerserve.errors import AssetError
from steerserve.serving.audit.chain import GENESIS, BrokenLineError, line_hash, parse
from steerserve.serving.audit.files import log_files
from steerserve.serving.audit.heads import Head, parse_head, read_heads
from steerserve.serving.audit.keys import AuditKey

MAX_PROBLEMS = 20
"""That are told one by one."""


@dataclass
class Report:
    """What was found.

    Attributes:
        problems: where the log or the heads are not as the server wrote them; the first ones.
        num_problems: how many there are.
        num_records: lines of the log.
        last_seq: sequence number of the last one.
        proved_by: the last head that fits, with nothing wrong before it; None if there is none.
        macs_checked: each line was checked with the key it names.
        unfinished_bytes: behind the last line: one that is being written, or was when the server crashed.
    """

    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    num_records: int = 0
    last_seq: int = 0
    proved_by: Head | None = None
    macs_checked: bool = False
    unfinished_bytes: int = 0

    @property
    def is_sound(self) -> bool:
        """Nothing was found."""
        return self.num_problems == 0

    def add(self, problem: str) -> None:
        """Something is wrong."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def guarantee(self) -> str:
        """How far the proof reaches, in a sentence or two."""
        proved = 0 if self.proved_by is None else self.proved_by.seq
        sentences = []
        if self.proved_by is not None:
            head = self.proved_by
            sentences.append(f"records 1–{proved:,} are proved by head {head.number} of {head.time}: none is missing, "
                             "changed, moved or added")  # fmt: skip
        else:
            sentences.append("no head proves any record")
        later = self.last_seq - proved
        if later > 0 and self.is_sound:
            by_mac = "carry valid MACs and " if self.macs_checked else ""
            weak = "be cut from the end" if self.macs_checked else "be cut, or written anew from there"
            name = f"the {later:,} later ones" if proved else f"all {later:,} records"
            sentences.append(f"{name} {by_mac}are chained, but could still {weak}")
        if not self.is_sound:
            sentences.append("nothing is said of the records behind, as the log was changed")
        return "; ".join(sentences)


def verify_log(
    log: Path,
    keys: Sequence[AuditKey] = (),
    heads: Path | None = None,
    public_key: Ed25519PublicKey | None = None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Report:
    """Read a log from its first line to its last.

    Args:
        log: its directory.
        keys: those that its lines were made with; none: MACs are not checked.
        heads: the file of exported heads; needs ``public_key``.
        on_progress: called with the bytes read since the last call.

    Raises:
        AssetError: something cannot be read, or there is no log.
    """
    paths = log_files(log)
    if not paths:
        raise AssetError(f"{log}: expected the directory of a log, with files audit-*.jsonl")
    report = Report(macs_checked=bool(keys))
    exported = _Exported(heads, public_key, report)
    _follow(_lines(paths, report, on_progress), {key.id: key for key in keys}, exported, report)
    exported.finish()
    return report


def _follow(
    lines: Iterator[tuple[str, bytes]], keys: Mapping[str, AuditKey], exported: _Exported, report: Report
) -> None:
    seq, prev = 0, GENESIS
    for place, data in lines:
        report.num_records += 1
        try:
            line = parse(data)
        except BrokenLineError as error:
            report.add(f"{place}: {error}")
            seq, prev = seq + 1, ""
            continue
        if line.seq != seq + 1:
            what = "one or more are missing" if line.seq > seq + 1 else "one was repeated or moved"
            report.add(f"{place}: record {line.seq} stands where {seq + 1} should: {what}")
        elif prev and line.prev != prev:
            report.add(f"{place}: record {line.seq} does not follow the one before, which was changed or replaced")
        if keys and line.key_id not in keys:
            report.add(f"{place}: record {line.seq} was made with key {line.key_id}, which was not given")
        elif keys and not line.is_authentic(keys[line.key_id]):
            report.add(f"{place}: record {line.seq} was changed: its MAC does not fit")
        seq, prev = line.seq, line.hash
        report.last_seq = max(report.last_seq, seq)
        exported.compare(seq, prev, place)


class _Exported:
    """The heads, read beside the log."""

    def __init__(self, path: Path | None, key: Ed25519PublicKey | None, report: Report) -> None:
        self._report = report
        self._heads = iter(()) if path is None else _heads(path, key, report)
        self._next = next(self._heads, None)

    def compare(self, seq: int, written: str, place: str) -> None:
        """Hold the log's line against the heads that were exported there."""
        while self._next is not None and self._next.seq <= seq:
            head, self._next = self._next, next(self._heads, None)
            if head.seq < seq:
                self._report.add(f"{place}: head {head.number} was exported at record {head.seq}, which is not there")
            elif head.hash != written:
                self._report.add(f"{place}: record {seq} is not the one that head {head.number} was exported for")
            elif self._report.is_sound:
                self._report.proved_by = head

    def finish(self) -> None:
        """The log is at its end: what heads say of more was cut."""
        if self._next is None:
            return
        (last,) = deque(chain([self._next], self._heads), maxlen=1)
        self._report.add(f"the log was cut: it ends with record {self._report.last_seq}, and head {last.number} of "
                         f"{last.time} was exported at record {last.seq}")  # fmt: skip


def _heads(path: Path, key: Ed25519PublicKey | None, report: Report) -> Iterator[Head]:
    assert key is not None, "heads come with the key that proves them"
    number, seq, prev = 0, 0, GENESIS
    for line_number, data in read_heads(path):
        place = f"{path.name}:{line_number}"
        try:
            head = parse_head(data)
        except ValueError as error:
            report.add(f"{place}: no head: {error}")
            continue
        if not head.is_signed(key):
            report.add(f"{place}: head {head.number} is not signed with the key")
            continue
        if head.number != number + 1 or head.prev != prev or head.seq < seq:
            report.add(f"{place}: head {head.number} does not follow head {number}: one is missing or moved")
        number, seq, prev = head.number, max(seq, head.seq), line_hash(data)
        yield head


def _lines(paths: Sequence[Path], report: Report, on_progress: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
    """All lines of all files with their places; one that is not complete is a problem but at the very end."""
    for path in paths:
        try:
            with path.open("rb") as file:
                for number, data in enumerate(file, start=1):
                    on_progress(len(data))
                    place = f"{path.name}:{number}"
                    if data.endswith(b"\n"):
                        yield place, data[:-1]
                    elif path == paths[-1]:
                        report.unfinished_bytes = len(data)
                    else:
                        report.add(f"{place}: a line without an end")
        except OSError as error:
            raise AssetError(f"{path}: {error.strerror}") from error
