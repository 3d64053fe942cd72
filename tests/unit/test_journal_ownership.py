"""Whose a journal is: one store's, through restarts, reboots, forks and other containers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import lmdb
import pytest

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import (
    JournalError,
    RecordCorruptError,
    StoreFullError,
    StoreUnavailableError,
)
from deferred_sessions.memory import logs, recovery
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.log_file import Header
from deferred_sessions.memory.ownership import Ownership
from deferred_sessions.memory.store import HostStore
from tests.unit import records
from tests.unit.hosts import MIB, Host, second_process, swapped
from tests.unit.records import POLICY, key, save

NOW = time.time()
FORK = multiprocessing.get_context("fork")


def put(store: HostStore, key: str, *, payload: bytes = b"{}", clean: bool = False) -> None:
    records.put(store, key, at=NOW, payload=payload, clean=clean)


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
    with pytest.raises(StoreFullError, match="was exchanged while it was in use"):
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


# Its state outlives its store


@pytest.mark.parametrize("what", ["rebooted", "map removed"])
def test_a_store_on_a_disk_that_is_made_anew(host: Host, what: str) -> None:
    """What it knew of its logs is still there; what was in it is not."""
    put(host.store, key(1))
    host.journal.sync(NOW)
    host.store.close()
    if what == "rebooted":
        (host.place / "store" / "boot").write_text("an earlier boot")
    else:
        (host.place / "store" / "data.mdb").unlink()
    host.store = host._start()
    assert set(host.records()) == {key(1)}


# Others begin it anew, or swap, meanwhile

PLAIN = "HostStore(place / 'store', size=8 * MIB, identity='tests').open()"
RESTART = "Host(place)"
KILLED = "logs.sync_directory = lambda path: os._exit(9); Host(place)"


def elsewhere(host: Host, what: str) -> int:
    """Do it in a process that is not forked from this one, whose store stays open."""
    code = f"""
import os
from pathlib import Path
from deferred_sessions.memory import logs
from deferred_sessions.memory.store import HostStore
from tests.unit.hosts import MIB, Host
place = Path({str(host.place)!r})
{what}
"""
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode


def once(patch: pytest.MonkeyPatch, owner: Any, name: str, first: Callable[[], object]) -> None:
    """Have `first` done just before the next call."""
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        patch.setattr(owner, name, real)
        first()
        return real(*arguments, **options)

    patch.setattr(owner, name, call)


def test_the_keeper_prepares_a_log_while_it_is_begun_anew(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it prepared is not used."""
    put(host.store, key(1))
    assert elsewhere(host, PLAIN) == 0
    once(monkeypatch, logs, "begin", lambda: elsewhere(host, RESTART))
    header = host.journal.prepare()
    put(host.store, key(2))
    host.store.swap_journal(header, NOW)
    put(host.store, key(3))
    host.journal.sync(NOW)
    host.lose_power()
    assert set(host.records()) == {key(1), key(2), key(3)}


def test_the_keeper_resets_a_log_while_it_is_begun_anew(host: Host) -> None:
    """What it meant to reset may be the active one by now."""
    put(host.store, key(1))
    host.store.swap_journal(host.journal.prepare(), NOW)
    put(host.store, key(2))
    generation = host.journal.generation()
    assert elsewhere(host, PLAIN) == 0
    assert elsewhere(host, RESTART) == 0
    host.store.reset_journal(generation)
    put(host.store, key(3))
    host.journal.sync(NOW)
    host.lose_power()
    assert set(host.records()) == {key(1), key(2), key(3)}


def test_who_begins_it_anew_is_killed(host: Host) -> None:
    """Others go on in a log that is still there."""
    put(host.store, key(1))
    assert elsewhere(host, PLAIN) == 0
    assert elsewhere(host, KILLED) == 9
    put(host.store, key(2))
    host.journal.sync(NOW)
    host.lose_power()
    assert set(host.records()) == {key(1), key(2)}


def test_a_process_starts_in_the_moment_of_a_swap(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks again, and does not take the journal for another store's."""
    put(host.store, key(1))
    other = second_process(host)
    other.ownership.take()
    host.store.close()

    def swap() -> None:
        swapped(other)
        other.reset(other.generation())

    once(monkeypatch, Path, "open", swap)
    put(host.store, key(2))
    assert set(host.records()) == {key(1), key(2)}


def test_the_journal_is_held_while_a_process_opens_its_store_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each fork makes it do; another store must not come in between."""
    put(host.store, key(1))
    host.store._file.close()
    refused: list[int] = []
    taken = """
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.ownership import Ownership
store = place / "new"
journal = Journal(place / "journal", store=store, size=MIB, sync_interval=1, identity="tests")
HostStore(store, size=8 * MIB, identity="tests", journal=journal).open()
"""
    once(monkeypatch, Ownership, "take", lambda: refused.append(elsewhere(host, taken)))
    put(host.store, key(2))
    assert refused == [1]


# Names, and disks that are read-only


def test_workers_that_start_together_agree_on_the_name(tmp_path: Path) -> None:
    """Whoever is first."""
    for turn in range(4):
        place = tmp_path / str(turn)
        place.mkdir()
        Host(place).store.close()
        barrier, names = FORK.Barrier(4), FORK.SimpleQueue()

        def ask(number: int, place: Path = place) -> None:
            journal = second_process(Host(place))
            barrier.wait()  # noqa: B023 - it is over before the next turn
            names.put(journal.ownership.node(f"name{number}"))  # noqa: B023

        workers = [FORK.Process(target=ask, args=[number]) for number in range(4)]
        for worker in workers:
            worker.start()
        found = {names.get() for _ in workers}
        for worker in workers:
            worker.join(30)
        assert len(found) == 1
        assert found <= {f"name{number}" for number in range(4)}


@pytest.mark.parametrize("how", ["after a swap", "after a fork"])
def test_a_disk_that_is_mounted_read_only(
    host: Host, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Logs that must be opened again are as good as full: saves go past memory."""
    put(host.store, key(1))
    if how == "after a swap":
        swapped(second_process(host))
    else:
        host.store._file.close()
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if str(path).startswith(str(host.logs)) and flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(StoreFullError, match="Read-only"):
            put(host.store, key(2))
        assert host.journal.ownership.node("name") == "name"
    put(host.store, key(3))
    assert set(host.records()) == {key(1), key(3)}


def test_a_recovery_that_fails_is_tried_again_at_once(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was set aside by the first try does not hide what is wrong."""
    put(host.store, key(1))
    host.store.close()
    shutil.rmtree(host.place / "store")

    def too_new(*_: object) -> int:
        raise RecordCorruptError("A record of layout 5.")

    def full(*_: object) -> None:
        raise lmdb.MapFullError("full")

    monkeypatch.setattr(recovery, "version_of", too_new)
    monkeypatch.setattr(recovery, "put", full)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="STORE_SIZE"):
            host._start()
    assert len(list(host.logs.glob("*.unreadable-*"))) == 1


def test_no_room_to_begin_a_journal_anew(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear error, and the old one stays as it is."""
    put(host.store, key(1))
    assert elsewhere(host, PLAIN) == 0

    def full(*_: object) -> None:
        raise lmdb.MapFullError("full")

    host.store.close()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "restart", full)
        with pytest.raises(StoreUnavailableError, match="The journal has 1 sessions, .*STORE_SIZE"):
            host.store.open()
    put(host.store, key(2))
    host.lose_power()
    assert set(host.records()) == {key(1), key(2)}
