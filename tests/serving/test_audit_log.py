"""The log on disk: whatever is done to its lines is found up to the last exported head, and a crash loses nothing."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from steerserve.config import AuditConfig
from steerserve.errors import AssetError, ServiceError
from steerserve.serving.audit import files as audit_files
from steerserve.serving.audit.chain import parse, seal
from steerserve.serving.audit.commands import app
from steerserve.serving.audit.files import LogFiles, log_files
from steerserve.serving.audit.keys import AuditKey, create_keys, load_public_key
from steerserve.serving.audit.verify import Report, verify_log
from steerserve.serving.audit.writer import AuditWriter

NUM_HEADED, NUM_LATER = 12, 3


@dataclass(frozen=True)
class Place:
    """Where everything of one log lies."""

    root: Path

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def heads(self) -> Path:
        return self.root / "far" / "heads.jsonl"

    @property
    def key(self) -> AuditKey:
        return AuditKey.load(self.root / "keys" / "audit.key")

    def config(self, **changes: object) -> AuditConfig:
        keys = self.root / "keys"
        values = {
            "directory": str(self.log),
            "key": str(keys / "audit.key"),
            "heads": str(self.heads),
            "signing_key": str(keys / "heads.key"),
            "head_interval_s": 1000.0,
        }
        return AuditConfig.model_validate(values | changes)

    def verify(self, with_key: bool = True, with_heads: bool = True) -> Report:
        public = load_public_key(self.root / "keys" / "heads.pub") if with_heads else None
        return verify_log(self.log, [self.key] if with_key else [], self.heads if with_heads else None, public)

    def lines(self) -> list[bytes]:
        return [line for path in log_files(self.log) for line in path.read_bytes().splitlines(keepends=True)]

    def kinds(self) -> list[str]:
        return [parse(line[:-1]).body["kind"] for line in self.lines()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    create_keys(tmp_path / "keys")
    return Place(tmp_path)


def body(number: int) -> dict[str, Any]:
    return {"kind": "exchange", "number": number, "text": "é\ud800", "score": 0.1 + number}


def write(
    place: Place, count: int, closes: bool = True, each: Callable[[int], None] = lambda n: None, **changes
) -> None:
    """Have records written one after the other; a log that is not closed is left as a crash leaves it."""

    async def run() -> None:
        writer = AuditWriter(place.config(**changes), place.key, {}, lambda is_good: None)
        for number in range(count):
            each(number)
            await writer.write(body(number))
        if closes:
            await writer.close()
        else:
            writer._files.close()

    asyncio.run(run())


@pytest.fixture
def written(place) -> Place:
    """A head at record 12, three later records, and several files."""
    write(place, NUM_HEADED - 2, max_file_bytes=1 << 12)
    files = LogFiles(place.log, place.key, 1 << 12, rotate_daily=False)
    files.append([body(100 + number) for number in range(NUM_LATER)])
    files.close()
    return place


def test_a_log_that_nobody_touched_is_sound_and_says_how_far(written) -> None:
    report = written.verify()
    assert report.is_sound
    assert report.num_records == report.last_seq == NUM_HEADED + NUM_LATER
    assert report.proved_by is not None
    assert report.proved_by.seq == NUM_HEADED
    assert "records 1–12 are proved by head" in report.guarantee()
    assert "3 later ones carry valid MACs and are chained, but could still be cut" in report.guarantee()
    assert "no head proves any record" in written.verify(with_heads=False).guarantee()


def test_the_chain_goes_on_across_files(place) -> None:
    write(place, 60, max_file_bytes=1 << 12)
    assert len(log_files(place.log)) > 2
    assert place.verify().is_sound


def test_another_day_has_another_file(place, monkeypatch) -> None:
    def now() -> str:
        return f"{day}T23:59:59.000000Z"

    monkeypatch.setattr(audit_files, "now", now)
    for rotates in (True, False):
        day = "2026-12-01"
        files = LogFiles(place.log / str(rotates), place.key, 1 << 20, rotates)
        files.append([body(1)])
        assert not files.rotate_if_due()
        day = "2026-12-02"
        assert files.rotate_if_due() is rotates
        assert not files.rotate_if_due()
        files.append([body(2)])
        files.close()
        names = [path.name for path in log_files(place.log / str(rotates))]
        assert names == ["audit-000000000001.jsonl", "audit-000000000002.jsonl"][: 1 + rotates]
        assert verify_log(place.log / str(rotates), [place.key]).is_sound


def test_a_head_goes_to_the_servers_own_log_if_that_is_asked(place, caplog) -> None:
    with caplog.at_level(logging.INFO):
        write(place, 2, heads_to_log=True, head_records=1)
    told = [record.getMessage().removeprefix("audit head: ") for record in caplog.records]
    assert told == place.heads.read_text().splitlines()
    assert len(told) >= 2


edits = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, NUM_HEADED - 1), st.integers(0, 10_000)),
    st.tuples(st.just("swap"), st.integers(0, NUM_HEADED - 1), st.integers(0, NUM_HEADED - 1)),
    st.tuples(st.just("repeat"), st.integers(0, NUM_HEADED - 1), st.integers(0, NUM_HEADED - 1)),
    st.tuples(st.just("drop"), st.integers(0, NUM_HEADED - 1), st.integers(1, 4)),
    st.tuples(st.just("cut"), st.integers(0, NUM_HEADED - 1), st.just(0)),
    st.tuples(st.just("reseal"), st.integers(0, NUM_HEADED - 1), st.just(0)),
)


def edited(lines: list[bytes], key: AuditKey, kind: str, at: int, by: int) -> list[bytes]:
    lines = list(lines)
    match kind:
        case "flip":
            line = bytearray(lines[at])
            line[by % (len(line) - 1)] ^= 1
            lines[at] = bytes(line)
        case "swap":
            lines[at], lines[by] = lines[by], lines[at]
        case "repeat":
            lines.insert(by, lines[at])
        case "drop":
            del lines[at : at + by]
        case "cut":
            del lines[at:]
        case "reseal":  # who has stolen the key writes everything from there on anew
            old = [parse(line[:-1]) for line in lines]
            prev = old[at].prev
            for index in range(at, len(lines)):
                lines[index] = seal(index + 1, prev, {"kind": "forged"}, key) + b"\n"
                prev = parse(lines[index][:-1]).hash
    return lines


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edit=edits)
def test_whatever_is_done_up_to_the_last_head_is_found(edit, written) -> None:
    original = written.lines()
    changed = edited(original, written.key, *edit)
    copy = Place(written.root.parent / "copy")
    shutil.rmtree(copy.root, ignore_errors=True)
    shutil.copytree(written.root, copy.root)
    for path in log_files(copy.log):
        path.unlink()
    (copy.log / "audit-000000000001.jsonl").write_bytes(b"".join(changed))
    for with_key in (False, True):
        report = copy.verify(with_key)
        assert report.is_sound is (changed == original)
        if changed != original:
            first = next(
                (i for i, pair in enumerate(zip(changed, original, strict=False)) if pair[0] != pair[1]), len(changed)
            )
            assert report.proved_by is None or report.proved_by.seq <= first


def test_the_key_finds_edits_behind_the_last_head(written) -> None:
    path = log_files(written.log)[-1]
    path.write_bytes(path.read_bytes().replace(b'"number":102', b'"number":999'))
    assert written.verify(with_key=False).is_sound
    assert "its MAC does not fit" in written.verify().problems[0]


def test_heads_that_were_taken_away_or_forged_are_found(place, tmp_path) -> None:
    write(place, 6, head_records=1)
    heads = place.heads.read_bytes().splitlines(keepends=True)
    place.heads.write_bytes(b"".join(heads[:2] + heads[3:]))
    assert "is missing or moved" in place.verify().problems[0]
    place.heads.write_bytes(b"".join(heads).replace(b'"seq":3', b'"seq":4'))
    assert "is not signed" in place.verify().problems[0]


def test_a_line_that_a_crash_cut_short_is_set_aside_and_told(place) -> None:
    write(place, 4, closes=False)
    path = log_files(place.log)[-1]
    with path.open("ab") as file:
        file.write(b'{"seq":99,"pre')
    assert place.verify().unfinished_bytes == 14
    write(place, 1)
    assert place.verify().is_sound
    told = next(found for line in place.lines()[1:] if (found := parse(line[:-1]).body.get("recovered")))
    assert (place.log / told["file"]).read_bytes() == b'{"seq":99,"pre'


ENDLESS = """
import asyncio, sys
from pathlib import Path
from steerserve.config import AuditConfig
from steerserve.serving.audit.keys import AuditKey
from steerserve.serving.audit.writer import AuditWriter

async def run(config):
    writer = AuditWriter(config, AuditKey.load(Path(config.key)), {}, lambda is_good: None)

    async def write(first):
        for number in range(first, 10**9, 32):
            await writer.write({"kind": "exchange", "number": number, "text": "x" * 50_000})
            print(number, flush=True)

    await asyncio.gather(*(write(first) for first in range(32)))

asyncio.run(run(AuditConfig.model_validate_json(sys.argv[1])))
"""


@pytest.mark.parametrize("seconds", [0.0, 0.11, 0.23])
def test_kill_9_in_the_middle_of_writing_loses_nothing_that_was_answered(place, seconds) -> None:
    config = place.config(head_records=50, fsync="never").model_dump_json()
    with subprocess.Popen([sys.executable, "-c", ENDLESS, config], stdout=subprocess.PIPE, text=True) as writing:
        assert writing.stdout is not None
        answered = [writing.stdout.readline() for _ in range(40)]
        threading.Timer(seconds, writing.kill).start()
        answered += list(writing.stdout)
    assert writing.returncode == -9
    report = place.verify()
    assert report.is_sound
    assert report.proved_by is not None
    write(place, 1)  # the next run goes on where this one stopped
    after = place.verify()
    assert (after.is_sound, after.unfinished_bytes) == (True, 0)
    bodies = [parse(line[:-1]).body for line in place.lines()]
    assert {int(number) for number in answered if number.endswith("\n")} <= {each.get("number") for each in bodies}
    (restart,) = [each for each in bodies[1:] if each["kind"] == "start"]
    assert (restart["recovered"] or {"bytes": 0})["bytes"] == report.unfinished_bytes


def test_a_server_does_not_go_on_with_a_log_that_was_cut(written) -> None:
    path = log_files(written.log)[0]
    lines = written.lines()
    for other in log_files(written.log)[1:]:
        other.unlink()
    path.write_bytes(b"".join(lines[: NUM_HEADED - 2]))
    with pytest.raises(AssetError, match="the log was cut or changed"):
        write(written, 1)


def test_two_servers_can_not_write_one_log(place) -> None:
    files = LogFiles(place.log, place.key, 1 << 20, rotate_daily=False)
    with pytest.raises(AssetError, match="another server"):
        LogFiles(place.log, place.key, 1 << 20, rotate_daily=False)
    files.close()


def test_a_key_that_others_may_read_is_refused(place) -> None:
    (place.root / "keys" / "audit.key").chmod(0o644)
    with pytest.raises(AssetError, match="0600"):
        _ = place.key


def test_many_records_share_an_fsync(place, monkeypatch) -> None:
    num_syncs = 0
    real = os.fsync

    def fsync(file: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        real(file)

    async def run() -> None:
        writer = AuditWriter(place.config(heads=None, signing_key=None), place.key, {}, lambda is_good: None)
        monkeypatch.setattr(audit_files.os, "fsync", fsync)
        await asyncio.gather(*(writer.write(body(number)) for number in range(200)))
        monkeypatch.undo()
        await writer.close()

    asyncio.run(run())
    assert 0 < num_syncs < 50
    assert place.verify(with_heads=False).num_records == 202


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fails_stops_the_answers_and_the_log_goes_on_afterwards(call, place, monkeypatch) -> None:
    health: list[bool] = []

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def run() -> None:
        writer = AuditWriter(place.config(), place.key, {}, health.append)
        await writer.write(body(1))
        with monkeypatch.context() as broken:
            broken.setattr(audit_files.os, call, fail)
            with pytest.raises(ServiceError, match="audit log"):
                await writer.write(body(2))
            with pytest.raises(ServiceError):
                writer.check()
        while writer.is_failing:
            await asyncio.sleep(0.02)
        await writer.write(body(3))
        await writer.close()

    asyncio.run(run())
    assert health == [False, True]
    assert place.verify().is_sound
    assert place.kinds() == ["start", "exchange", "resume", "exchange", "stop"]


def test_a_disk_that_fails_may_be_served_without(place, monkeypatch) -> None:
    async def run() -> None:
        writer = AuditWriter(place.config(on_failure="serve"), place.key, {}, lambda is_good: None)
        with monkeypatch.context() as broken:
            broken.setattr(audit_files.os, "write", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
            await writer.write(body(1))
            writer.check()
        await writer.write(body(2))
        await writer.close()

    asyncio.run(run())
    resumed = [parse(line[:-1]).body for line in place.lines()][1]
    assert (resumed["kind"], resumed["records_lost"]) == ("resume", 1)
    assert place.verify().is_sound


def run_command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout


def test_the_command_says_what_it_found_by_its_exit_code(written) -> None:
    keys = written.root / "keys"
    arguments = ("verify", written.log, "--heads", written.heads, "--public-key", keys / "heads.pub")
    code, text = run_command(*arguments, "--key", keys / "audit.key")
    assert (code, text.split(":")[0]) == (0, "sound")
    for path in log_files(written.log):
        path.write_bytes(path.read_bytes().replace(b'"number":5', b'"number":6'))
    code, text = run_command(*arguments)
    assert code == 1
    assert "NOT SOUND" in text
    assert "CHANGED  audit-" in text
