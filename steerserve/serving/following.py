"""What a server has read follows the files it was read from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from steerserve.errors import SteerserveError

_log = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int] | None, ...]


async def follow(paths: Sequence[Path], reload: Callable[[], object], what: str, every_s: float) -> None:
    """Call ``reload`` whenever a file has changed, until cancelled; what it raises goes to the log, once, and it is
    called again until it raises no more: files that belong together do not change at the same instant.
    """
    seen, said = _signature(paths), ""
    while True:
        await asyncio.sleep(every_s)
        now = _signature(paths)
        if now == seen:
            continue
        try:
            reload()
        except SteerserveError as error:
            if str(error) != said:
                _log.error("%s is not reloaded, what is in force stays: %s", what, error)
            said = str(error)
        else:
            seen, said = now, ""
            _log.info("%s reloaded", what)


def _signature(paths: Sequence[Path]) -> Signature:
    """Changes whenever one of the files does; a file that is not there has none."""
    return tuple(_signature_of(path) for path in paths)


def _signature_of(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
