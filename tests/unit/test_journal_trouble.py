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
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import JournalError, RecordCorruptError, StoreFullError
from deferred_sessions.memory import recovery
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.log_file import Header
from deferred_sessions.memory.logs import LOGS, Descriptor
from deferred_sessions.memory.store import HostStore
from tests.unit import records
from tests.unit.hosts import MIB, Host
from tests.unit.records import POLICY, key, save

NOW = time.time()
FORK = multiprocessing.get_context("fork")


def put(store: HostStore, key: str, *, payload: bytes = b"{}", clean: bool = False) -> None:
    records.put(store, key, at=NOW, payload=payload, clean=clean)


def second_process(host: Host, *, sync_interval: float = 0.1) -> Journal:
    """Return the journal as another process of the host has it."""
    return Journal(
        host.logs,
        store=host.place / "store",
        size=MIB,
        sync_interval=sync_interval,
        identity=host.identity,
    )


def swapped(journal: Journal) -> None:
    journal.prepare()
    journal.swap(NOW)


# Files


def test_a_process_without_descriptors_left_writes_into_no_other_file(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it opens later may get a number that the log had."""
    put(host.store, key(1))
    swapped(second_process(host))
    real, calls = Descriptor.__init__, itertools.count()

    def too_many(self: Descriptor, path: Path) -> None:
        self.number = -1
        if next(calls) == 0:
            raise JournalError("Too many open files")
        real(self, path)

    monkeypatch.setattr(Descriptor, "__init__", too_many)
    with pytest.raises(JournalError):
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
        other.reset()
        other.prepare()
        host.store._write(lambda *_: other.swap(NOW))
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
        other.reset()
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
        if len(data) > MIB // 2:
            real(descriptor, data[: MIB // 2], offset)
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


# Whose it is


def another_store(place: Path) -> HostStore:
    """A container that starts while the one before it ends: same volume, its own memory."""
    journal = Journal(
        place / "journal", store=place / "new", size=MIB, sync_interval=0.1, identity="tests"
    )
    return HostStore(place / "new", size=8 * MIB, identity="tests", journal=journal)


def in_another_process(work: Callable[[], object]) -> int | None:
    process = FORK.Process(target=work)
    process.start()
    process.join(30)
    return process.exitcode


def test_one_journal_belongs_to_one_store(host: Host, tmp_path: Path) -> None:
    """The other one is told so, and gets it, with what is in it, when the first has ended."""
    put(host.store, key(1))
    new = another_store(tmp_path)
    with pytest.raises(JournalError, match="in use by processes with another session store"):
        new.open()
    put(host.store, key(2))
    host.journal.sync(NOW)
    host.store.close()
    assert {record.key for record in new.scan()} == {key(1), key(2)}
    with pytest.raises(JournalError, match="in use by processes"):
        put(host.store, key(3))
    put(new, key(4))
    new.close()
    put(host.store, key(5))
    host.lose_power()
    assert set(host.records()) == {key(1), key(2), key(4), key(5)}


def test_a_fork_keeps_no_journal_for_itself(host: Host, tmp_path: Path) -> None:
    """A child that lives on holds up no other store once its parent has ended."""
    put(host.store, key(1))
    ready, over = FORK.Event(), FORK.Event()

    def idle(ready: Event, over: Event) -> None:
        ready.set()
        over.wait(30)

    child = FORK.Process(target=idle, args=(ready, over))
    child.start()
    assert ready.wait(30)
    host.store.close()
    new = another_store(tmp_path)
    assert {record.key for record in new.scan()} == {key(1)}
    new.close()
    over.set()
    child.join(30)


def test_the_directory_is_removed_while_a_process_lives(tmp_path: Path) -> None:
    """Who comes later waits for its end, and finds what it saved; a fork changes nothing."""
    host = Host(tmp_path)
    put(host.store, key(1))
    shutil.rmtree(tmp_path / "store")
    assert in_another_process(partial(_is_refused, tmp_path)) == 0
    put(host.store, key(2))
    host.journal.sync(NOW)
    host.store.close()
    assert set(host.records()) == {key(1), key(2)}
    host.store.close()


def _is_refused(place: Path) -> None:
    try:
        Host(place)
    except JournalError:
        os._exit(0)
    os._exit(1)


def test_a_store_without_its_journal_for_a_while(host: Host) -> None:
    """What happened meanwhile is in the journal when it is back."""
    put(host.store, key(1), payload=b"old")
    put(host.store, key(3))
    host.store.close()
    plain = HostStore(host.place / "store", size=8 * MIB, identity="tests")
    save(plain, key(1), b"newer", at=NOW)
    put(plain, key(2))
    plain.bury(key(3), lambda r: r and lifecycle.deleted(r, r.key, now=NOW, policy=POLICY))
    plain.close()
    host.store = host._start()
    put(host.store, key(4))
    host.journal.sync(NOW)
    host.lose_power()
    found = {k: (r.payload, r.is_tombstone) for k, r in host.records().items()}
    assert found == {
        key(1): (b"newer", False),
        key(2): (b"{}", False),
        key(3): (b"", True),
        key(4): (b"{}", False),
    }


def test_it_comes_back_while_others_save(host: Host) -> None:
    """Processes that had the journal all the time go on in the new log."""
    ready, go = FORK.Event(), FORK.Event()

    def live() -> None:
        put(host.store, key(1))
        ready.set()
        go.wait(30)
        put(host.store, key(4))
        host.journal.sync(NOW)

    process = FORK.Process(target=live)
    process.start()
    assert ready.wait(30)
    plain = HostStore(host.place / "store", size=8 * MIB, identity="tests")
    assert in_another_process(lambda: put(plain, key(2))) == 0
    assert in_another_process(lambda: put(host._start(), key(3))) == 0
    go.set()
    process.join(30)
    host.lose_power()
    assert set(host.records()) == {key(1), key(2), key(3), key(4)}


def test_a_log_that_is_exchanged_under_a_process(host: Host) -> None:
    """Nothing goes into a log that this store has not begun."""
    put(host.store, key(1))
    header = Header.new(host.journal.generation(), host.identity).encode()
    host.active().write_bytes(header.ljust(MIB, b"\0"))
    host.journal._logs = None
    with pytest.raises(JournalError, match="was exchanged while it was in use"):
        put(host.store, key(2))


def test_a_later_lease_counts_more_than_a_later_version(host: Host) -> None:
    """What memory has was refused: another node had gone on from before, and gave it back."""
    mine = records.put(host.store, key(1), at=NOW)._replace(version=9, fence=1)
    theirs = mine._replace(version=5, fence=3, payload=b"gone on from")
    host.store.update(key(1), lambda _: theirs)
    host.journal.sync(NOW)
    host.store.close()
    shutil.rmtree(host.place / "store")
    plain = HostStore(host.place / "store", size=8 * MIB, identity="tests")
    plain.update(key(1), lambda _: mine)
    plain.close()
    host.store = host._start()
    assert host.records()[key(1)].payload == b"gone on from"


@pytest.mark.parametrize("what", ["moved", "removed"])
def test_the_logs_are_gone(host: Host, tmp_path: Path, what: str) -> None:
    """A site that is started again writes down what memory has."""
    put(host.store, key(1))
    host.store.close()
    if what == "moved":
        host.logs.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(host.logs)
    host.store = host._start()
    put(host.store, key(2))
    host.journal.sync(NOW)
    host.lose_power()
    assert set(host.records()) == {key(1), key(2)}
