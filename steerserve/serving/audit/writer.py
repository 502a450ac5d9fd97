"""The thread that writes the log: many records to a write and an fsync, heads when they are due, and what follows when
the disk fails.

The event loop only puts records in line and waits for word of them. Everything that waits is written together, so that
while one fsync runs the records of the next one gather.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerserve.config import AuditConfig
from steerserve.errors import AssetError, ServiceError
from steerserve.serving.audit.files import LogFiles, now
from steerserve.serving.audit.heads import HeadFile
from steerserve.serving.audit.keys import AuditKey, load_signing_key

_log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Between two attempts to write again after a failure."""
_MAX_BATCH = 4096


@dataclass(frozen=True)
class Lag:
    """How far the log is behind what happens.

    Attributes:
        num_waiting: records that it does not have yet.
        seconds: for how long the oldest of them has waited; 0 if there is none.
        num_unproved: records behind the last exported head; all of the log's without heads.
        is_failing: the last attempt to write failed.
    """

    num_waiting: int
    seconds: float
    num_unproved: int
    is_failing: bool


@dataclass(frozen=True, eq=False)
class _Waiting:
    body: dict[str, Any]
    written: asyncio.Future[None]
    since: float


class AuditWriter:
    """Writes records; made in the event loop that calls ``write``.

    Args:
        facts: what the first record of this run says beside the time: versions, weights.
        on_health: called in the event loop with false when the log cannot be written, and with true when it can again.

    Attributes:
        is_failing: the last attempt to write failed.

    Raises:
        AssetError: a key or the log is not what it should be.
    """

    def __init__(
        self, config: AuditConfig, key: AuditKey, facts: dict[str, Any], on_health: Callable[[bool], None]
    ) -> None:
        assert config.directory is not None, "the caller knows whether there is a log"
        self._config = config
        self._on_health = on_health
        self._files = LogFiles(Path(config.directory), key, config.max_file_bytes, config.rotate_daily)
        self._heads: HeadFile | None = None
        if config.heads is not None and config.signing_key is not None:
            self._heads = HeadFile(Path(config.heads), load_signing_key(Path(config.signing_key)))
            if self._heads.last is not None:
                self._files.check_against(self._heads.last)
        self.is_failing = False
        self._position = self._files.position()  # behind what clients were told is written
        self._num_lost = 0
        self._head_seq = self._heads.last.seq if self._heads and self._heads.last else 0
        self._head_time = self._sync_time = time.monotonic()
        self._is_synced = True
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._in_hand: list[_Waiting] = []
        self._stopping = False
        self._event_loop = asyncio.get_running_loop()
        try:
            self._commit([{"kind": "start", "time": now(), **facts, "recovered": self._files.torn}], must_sync=True)
            self._export_head()
        except OSError as error:
            raise AssetError(f"{config.directory}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    async def write(self, body: dict[str, Any]) -> None:
        """Have a record written; returns when the log has it, under ``fsync: always`` when the disk has it.

        Cancelled or not, the record is written.

        Raises:
            ServiceError: it could not be, and the server is not to answer then.
        """
        written: asyncio.Future[None] = self._event_loop.create_future()
        with self._changed:
            self._waiting.append(_Waiting(body, written, time.monotonic()))
            self._changed.notify()
        await written

    def check(self) -> None:
        """Whether a request may begin.

        Raises:
            ServiceError: the log cannot be written, and the server is not to answer then.
        """
        if self.is_failing and self._config.on_failure == "refuse":
            raise _unavailable()

    def lag(self) -> Lag:
        """How far the log is behind; from any thread."""
        with self._changed:
            waiting = [*self._in_hand, *self._waiting]
            seconds = time.monotonic() - waiting[0].since if waiting else 0.0
            return Lag(len(waiting), seconds, self._files.tail.seq - self._head_seq, self.is_failing)

    async def close(self) -> None:
        """Write what waits and a last record, export the last head, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    # In the thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._stopping:
                    self._changed.wait(self._seconds_to_next())
                self._in_hand, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
                stopping = self._stopping and not self._in_hand
            error: Exception | None = None
            try:
                self._turn([each.body for each in self._in_hand], stopping)
            except Exception as raised:  # a bug must not leave requests waiting for ever either
                error = raised
            self._tell([each.written for each in self._in_hand], error)
            with self._changed:
                self._in_hand = []
            if stopping:
                self._files.close()
                if self._heads is not None:
                    self._heads.close()
                return

    def _turn(self, bodies: list[dict[str, Any]], stopping: bool) -> None:
        """Write what has come, and do what is due."""
        if self.is_failing:
            bodies = [{"kind": "resume", "time": now(), "records_lost": self._num_lost}, *bodies]
            self._files.take_back(self._position)
        self._position = self._files.position()
        if stopping:
            bodies = [*bodies, {"kind": "stop", "time": now()}]
        rotated = self._files.rotate_if_due()
        if bodies:
            self._commit(bodies, must_sync=self.is_failing or self._config.fsync == "always")
        elif not self._is_synced and self._config.fsync == "interval":
            self._sync()
        num_new = self._files.tail.seq - self._head_seq
        is_late = time.monotonic() - self._head_time >= self._config.head_interval_s
        if num_new and (rotated or stopping or is_late or num_new >= self._config.head_records):
            self._export_head()

    def _commit(self, bodies: list[dict[str, Any]], must_sync: bool) -> None:
        self._files.append(bodies)
        self._is_synced = False
        is_due = (
            self._config.fsync == "interval" and time.monotonic() - self._sync_time >= self._config.fsync_interval_s
        )
        if must_sync or is_due:
            self._sync()
        self._position = self._files.position()

    def _sync(self) -> None:
        self._files.sync()
        self._is_synced, self._sync_time = True, time.monotonic()

    def _export_head(self) -> None:
        """What a head promises is on disk first, whatever the policy: after a crash, no head is ahead of its log."""
        self._head_time = time.monotonic()
        if self._heads is None:
            return
        if not self._is_synced:
            self._sync()
        tail = self._files.tail
        head = self._heads.add(tail.seq, tail.hash, self._files.file_name, now())
        self._head_seq = tail.seq
        if self._config.heads_to_log:
            _log.info("audit head: %s", head.decode())

    def _seconds_to_next(self) -> float | None:
        if self.is_failing:
            return RETRY_S
        due = []
        if not self._is_synced and self._config.fsync == "interval":
            due.append(self._sync_time + self._config.fsync_interval_s)
        if self._heads is not None and self._files.tail.seq > self._head_seq:
            due.append(self._head_time + self._config.head_interval_s)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _tell(self, written: list[asyncio.Future[None]], error: Exception | None) -> None:
        if error is not None:
            self._num_lost += len(written)
            if not self.is_failing:
                _log.critical("the audit log cannot be written (%s): %s", self._config.on_failure, error)
        elif self.is_failing:
            _log.warning("the audit log is written again; %d records are lost", self._num_lost)
            self._num_lost = 0
        has_changed = self.is_failing is not (error is not None)
        self.is_failing = error is not None
        refusal = _unavailable() if error is not None and self._config.on_failure == "refuse" else None
        if written or has_changed:
            self._event_loop.call_soon_threadsafe(self._resolve, written, refusal, has_changed)

    def _resolve(self, written: list[asyncio.Future[None]], refusal: Exception | None, has_changed: bool) -> None:
        for future in written:
            if future.done():  # its caller was cancelled
                continue
            if refusal is None:
                future.set_result(None)
            else:
                future.set_exception(refusal)
        if has_changed and self._config.on_failure == "refuse":
            self._on_health(not self.is_failing)


def _unavailable() -> ServiceError:
    return ServiceError("UNAVAILABLE", "the audit log cannot be written, and nothing is answered without it")
