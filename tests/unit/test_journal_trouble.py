"""A journal in trouble: disks and clocks that fail, files that are gone, others that want it."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import JournalError, RecordCorruptError, StoreFullError
from deferred_sessions.memory import recovery
from deferred_sessions.memory.logs import LOGS, Descriptor
from deferred_sessions.memory.store import HostStore
from tests.unit import records
from tests.unit.hosts import MIB, Host, second_process, swapped
from tests.unit.records import POLICY, key, save

NOW = time.time()
FORK = multiprocessing.get_context("fork")


def put(store: HostStore, key: str, *, payload: bytes = b"{}", clean: bool = False) -> None:
    records.put(store, key, at=NOW, payload=payload, clean=clean)


# Files


def test_a_process_without_descriptors_left_writes_into_no_other_file(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it opens later may get a number that the log had."""
    put(host.store, key(1))
    swapped(second_process(host))
    real, calls = Descriptor.__init__, itertools.count()

    def too_many(self: Descriptor, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        self.number = -1
        if next(calls) == 0:
            raise JournalError("Too many open files")
        real(self, path, flags)

    monkeypatch.setattr(Descriptor, "__init__", too_many)
    with pytest.raises(StoreFullError):
        put(host.store, key(2))
    uploads = [(tmp_path / f"upload{number}").open("wb", buffering=0) for number in range(3)]
    put(host.store, key(3))
    for upload in uploads:
        upload.write(b"what a visitor uploads " * 20)
        upload.close()
    host.journal.sync(NOW)
    host.lose_power()
    assert {path.stat().st_size for path in tmp_path.glob("upload*")} == {460}
    assert set(host.records()) == {key(1), key(3)}


def test_threads_that_open_the_logs_at_once(host: Host) -> None:
    """After each swap by another process the saver and the agent do; no descriptor is closed."""
    other, failures, is_over = second_process(host), list[Exception](), threading.Event()

    def work(do: Callable[[], object]) -> None:
        while not is_over.is_set():
            try:
                do()
            except Exception as error:  # noqa: BLE001 - any is one too many
                failures.append(error)

    threads = [
        threading.Thread(target=work, args=[do])
        for do in (
            partial(put, host.store, key(1)),
            partial(host.journal.sync, NOW),
            partial(host.journal.sync, NOW),
        )
    ]
    for thread in threads:
        thread.start()
    for _ in range(60):
        host.store.reset_journal(other.generation())
        header = other.prepare()
        host.store.swap_journal(header, NOW)
    is_over.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_sync_that_outlasts_two_swaps(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of the log that is there now: who waits for that one waits on."""
    for number in range(20):
        put(host.store, key(number), payload=b"x" * 1000)
    other, real = second_process(host), os.fdatasync

    def slow(descriptor: int) -> None:
        real(descriptor)
        monkeypatch.setattr(os, "fdatasync", real)
        swapped(other)
        other.reset(other.generation())
        swapped(other)

    monkeypatch.setattr(os, "fdatasync", slow)
    host.journal.sync(time.time())
    put(host.store, key(30))
    assert host.journal.unsynced() > 0


def test_what_a_log_cannot_have_is_given_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a log that is half made fills the disk that the other one needs."""
    put(host.store, key(1))
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset + len(data) > MIB // 2:
            real(descriptor, data[: MIB // 2 - offset], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    resting = host.logs / LOGS[(host.journal.generation() + 1) & 1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(JournalError, match="cannot be made .* No space left"):
            host.journal.prepare()
        assert resting.stat().st_size == 0
        with pytest.raises(JournalError):
            host.journal.restart(9, [], NOW)
    assert not (host.logs / "log.new").exists()
    host.lose_power()
    assert set(host.records()) == {key(1)}


def test_records_of_a_later_release_are_kept(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who goes back to it, by hand, has them."""
    put(host.store, key(1))

    def too_new(*_: object) -> int:
        raise RecordCorruptError("A record of layout 5.")

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "version_of", too_new)
        host.lose_power()
    assert host.records() == {}
    assert "1 records of the journal are of another release" in caplog.text
    host.store.close()
    (aside,) = host.logs.glob("log.*.unreadable-*")
    shutil.rmtree(host.place / "store")
    (host.logs / LOGS[0]).unlink(missing_ok=True)
    (host.logs / LOGS[1]).unlink(missing_ok=True)
    aside.rename(host.logs / LOGS[1])
    host.store = host._start()
    assert set(host.records()) == {key(1)}


def test_a_header_that_is_damaged(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Its records cannot be told from forged ones; they are kept, and that is said."""
    put(host.store, key(1))
    log = host.active()
    with log.open("r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    host.lose_power()
    assert host.records() == {}
    assert "has records, but its header is damaged. It is left alone" in caplog.text
    assert len(list(host.logs.glob("log.*.rejected-*"))) == 1


# Disks


def refuse(*_: object) -> int:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_full_journal_holds_no_flusher_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only to be due later stays due; what is written becomes clean."""
    for number in range(3):
        put(host.store, key(number))
    later = {key(n): partial(_due_later) for n in range(3)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        host.store.update_many(later)
        assert host.store.status().dirty == 3
        assert {record.due_at for record in host.store.scan()} == {NOW + POLICY.interval}
        assert len(host.store.due(NOW + 100, limit=9)) == 3
        with pytest.raises(StoreFullError, match="Read-only"):
            save(host.store, key(1), b"x", at=NOW)
        assert host.store.clean_many(host.store.due(NOW + 100, limit=9), NOW) == []
    assert host.store.status().dirty == 0


def test_a_session_saved_past_memory_and_a_broken_disk(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is right whatever the journal takes: what others changed outdoes what was written."""
    for number in range(2):
        put(host.store, key(number))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        host.store.give_up(key(0), lambda _: None)
        host.store.give_up(key(1), lambda record: record and record._replace(version=9))
    assert {record.key: record.version for record in host.store.scan()} == {key(1): 9}
    host.lose_power()  # the journal has what it was told; PostgreSQL is asked for what is later
    assert set(host.records()) == {key(0), key(1)}


def test_a_recovery_tells_why_it_finds_less(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """What was saved past memory is in PostgreSQL; nobody need look for it in the journal."""
    for number in range(3):
        put(host.store, key(number))
    for number in range(2):
        host.store.give_up(key(number), lambda _: None)
    host.lose_power()
    assert set(host.records()) == {key(2)}
    assert "Recovered 1 sessions from 5 records" in caplog.text
    assert "2 only said that PostgreSQL has a session" in caplog.text


def _due_later(record: records.SessionRecord | None) -> records.SessionRecord | None:
    return record and lifecycle.due_again(record, due_at=NOW + 1000)


def test_a_sync_that_fails_is_no_failed_save(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has synced for long, so the saver does; its change is in memory all the same."""
    put(host.store, key(1))
    host.journal.sync(NOW - 100)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    for _ in range(3):
        put(host.store, key(2))
    assert caplog.text.count("A save is not on disk.") == 1
    assert host.journal.unsynced() > 0


def test_a_clock_that_was_set_back_and_no_agent(host: Host) -> None:
    """The saver syncs, as if nobody had for long."""
    host.journal.sync(NOW + 3600)
    put(host.store, key(1))
    assert host.journal.unsynced() == 0


def test_when_nobody_has_synced_for_long(host: Host) -> None:
    """Twice the interval and a second; what others do counts, at the latest after that."""
    mine, other = host.journal, second_process(host)
    mine.sync(NOW)
    assert not mine.is_behind(NOW + 1.1)
    assert mine.is_behind(NOW + 1.3)
    other.sync(NOW + 10)
    assert not mine.is_behind(NOW + 11.1)
    assert mine.is_behind(NOW + 11.3)
    assert not mine.is_behind(NOW + 10)
    assert mine.is_behind(NOW + 8.7)  # a clock that was set back
    other.sync(NOW + 8.7)
    assert not mine.is_behind(NOW + 8.7)
