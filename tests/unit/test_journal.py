"""The journal: what a host that loses its memory gets back, byte by byte."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import JournalError, StoreFullError, StoreUnavailableError
from deferred_sessions.memory import log_file, logs, recovery
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.log_file import HEADER_SIZE, Header
from deferred_sessions.memory.logs import LOGS
from deferred_sessions.memory.store import HostStore
from deferred_sessions.record import SessionRecord
from tests.unit import records
from tests.unit.hosts import MIB, Host
from tests.unit.records import POLICY, key, save

logger = logging.getLogger(__name__)  # its figures: pytest --log-cli-level=INFO

NOW = time.time()
FORK = multiprocessing.get_context("fork")
SALT = b"s" * 16


def put(store: HostStore, key: str, *, at: float = NOW, **options: Any) -> SessionRecord:
    return records.put(store, key, at=at, **options)


# The log


def log_of(*records: tuple[bytes, bytes]) -> bytes:
    log = Header(1, SALT, b"i" * 32).encode()
    for name, data in records:
        log += log_file.encode(name, data, len(log), crc32(SALT))
    return log


def read(log: bytes) -> list[tuple[bytes, bytes]]:
    found = log_file.frames(memoryview(log), crc32(SALT))
    return [(name, log[start:stop]) for name, start, stop in found]


def test_d09_a_log_is_read_as_it_was_written() -> None:
    records = [(b"a" * 32, b"x"), (b"b" * 8, b""), (b"c" * 40, os.urandom(5000))]
    assert read(log_of(*records)) == records
    assert read(log_of(*records) + b"\0" * 100) == records


def test_d09_a_log_cut_anywhere_ends_with_the_last_whole_record() -> None:
    """D09: at every byte offset."""
    records = [(b"a" * 32, b"first"), (b"b" * 32, b"second" * 9), (b"c" * 32, b"third")]
    whole = log_of(*records)
    ends = [len(log_of(*records[:count])) for count in range(4)]
    for cut in range(HEADER_SIZE, len(whole)):
        expected = records[: max(n for n, end in enumerate(ends) if end <= cut)]
        assert read(whole[:cut]) == expected
        assert read(whole[:cut].ljust(len(whole) + 64, b"\0")) == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7), st.integers(1, 20))
def test_d09_a_flipped_bit_is_found(place: int, bit: int, count: int) -> None:
    """Everything before it is read, nothing wrong is."""
    records = [(f"key{number:029}".encode(), b"data" * number) for number in range(count)]
    log = bytearray(log_of(*records))
    place = HEADER_SIZE + place % (len(log) - HEADER_SIZE)
    log[place] ^= 1 << bit
    found = read(bytes(log))
    assert found == records[: len(found)]
    assert len(log_of(*records[: len(found)])) <= place
    assert place < len(log_of(*records[: len(found) + 1]))


def test_a_frame_within_a_session_is_not_one() -> None:
    """A visitor who knows the format does not know the salt."""
    at = HEADER_SIZE + 40
    forged = log_file.encode(b"v" * 32, b"forged", at, crc32(b"guess" * 3 + b"x"))
    log = log_of((b"a" * 32, forged))
    assert read(log[:HEADER_SIZE] + log[at:]) == []
    assert [name for name, _ in read(log)] == [b"a" * 32]


@pytest.mark.parametrize("data", [b"", b"\0" * 128, b"\0" * 10])
def test_a_log_that_was_reset_has_no_header(data: bytes) -> None:
    assert Header.decode(data, Path("log")) is None


def test_a_torn_header_is_no_header() -> None:
    header = Header.new(7, "tests").encode()
    for cut in range(1, 66):
        assert Header.decode(header[:cut].ljust(HEADER_SIZE, b"\0"), Path("log")) is None
    assert Header.decode(header, Path("log")) is not None


# Recovery


def test_d01_memory_is_rebuilt_from_the_log(host: Host) -> None:
    """D01: what was saved is there again, dirty and due; what PostgreSQL had is not needed."""
    new = put(host.store, key(1), payload=b"one", at=NOW)
    put(host.store, key(2), clean=True)
    changed = save(host.store, key(2), b"two", at=NOW + 1)
    put(host.store, key(3), clean=True)
    assert changed is not None
    host.journal.sync(NOW)
    host.lose_power()

    found = host.records()
    assert set(found) == {key(1), key(2)}
    assert found[key(1)].payload == b"one"
    assert (found[key(2)].payload, found[key(2)].version) == (b"two", changed.version)
    assert found[key(1)].stored_version == new.stored_version == 0
    assert found[key(2)].stored_version == 1
    assert all(record.is_dirty for record in found.values())
    assert [dirty.key for dirty in host.store.due(2**40, limit=9)] == [key(1), key(2)]


def test_the_last_state_counts(host: Host) -> None:
    put(host.store, key(1))
    for number in range(50):
        save(host.store, key(1), f"{number}".encode(), at=NOW)
    host.lose_power()
    assert host.records()[key(1)].payload == b"49"


def test_a_deleted_session_stays_deleted(host: Host) -> None:
    """Also if the host was away for longer than a deletion is remembered otherwise."""
    put(host.store, key(1), clean=True, at=NOW)
    save(host.store, key(1), b"x", at=NOW)
    host.store.bury(key(1), lambda r: r and lifecycle.deleted(r, r.key, now=NOW, policy=POLICY))
    host.lose_power()
    record = host.records()[key(1)]
    assert record.is_tombstone
    assert record.is_dirty


def test_what_seems_to_have_expired_is_recovered(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was just started may have any time; the next start would find no log."""
    put(host.store, key(1))
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 10 * 365 * 86_400)
        host.lose_power()
    host.lose_power()
    assert set(host.records()) == {key(1)}


def test_the_last_record_counts_whatever_its_version(host: Host) -> None:
    """One that was taken over, refused and forgotten was ahead of what others went on from."""
    taken_over = put(host.store, key(1), payload=b"refused")._replace(version=9, fence=1)
    host.store.update(key(1), lambda _: taken_over)
    host.store.update(key(1), lambda _: None)
    back = records.put(host.store, key(1), clean=True, at=NOW)._replace(version=4, fence=3)
    host.store.update(key(1), lambda _: back._replace(stored_version=4))
    save(host.store, key(1), b"acknowledged", at=NOW + 1)
    host.lose_power()
    assert host.records()[key(1)].payload == b"acknowledged"


def test_power_is_lost_again_and_again(host: Host) -> None:
    """Replayed twice, the result is the same; and what came in between is there, too."""
    put(host.store, key(1), payload=b"one")
    host.lose_power()
    first = host.records()
    host.lose_power()
    assert {k: r.payload for k, r in host.records().items()} == {
        k: r.payload for k, r in first.items()
    }
    put(host.store, key(2), payload=b"two")
    host.lose_power()
    host.lose_power()
    assert {k: r.payload for k, r in host.records().items()} == {key(1): b"one", key(2): b"two"}


def test_a_log_cut_at_every_offset_of_its_last_records(host: Host, tmp_path: Path) -> None:
    """Each session is at a state that was saved, at least at the last one synced."""
    put(host.store, key(1))
    for number in range(3):
        save(host.store, key(1), f"state {number}".encode(), at=NOW)
    host.journal.sync(NOW)
    synced = host.journal.size()
    for number in range(3, 6):
        save(host.store, key(1), f"state {number}".encode(), at=NOW)
    path, end = host.active(), host.journal.size()
    whole = path.read_bytes()
    states = [f"state {number}".encode() for number in range(6)]
    for cut in range(synced, end + 1):
        found = recovery.read(_journal_of(tmp_path / str(cut), path.name, whole[:cut]))
        (name,) = found.newest
        data = bytes(found.data(name))
        # The last one synced is number 2; what the cut left whole of the rest is there.
        assert any(data.endswith(state) for state in states[2:])
    assert data.endswith(b"state 5")
    logger.info("cut at %d offsets: what was synced is there, nothing is torn", end + 1 - synced)


def _journal_of(place: Path, name: str, log: bytes) -> Journal:
    (place / "journal").mkdir(parents=True)
    (place / "journal" / name).write_bytes(log)
    return Journal(
        place / "journal", store=place / "store", size=MIB, sync_interval=0.1, identity="tests"
    )


def test_a_recovery_that_is_killed_is_repeated(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its steps, and again; the store is not trusted before it is whole."""
    for number in range(30):
        put(host.store, key(number), payload=f"{number}".encode())
    monkeypatch.setattr(recovery, "PART", 10)
    steps = ["unlink", "rename", "begin", "sync_directory", "put"]
    for step in [*steps, *reversed(steps)]:
        host.store.close()
        shutil.rmtree(host.place / "store")
        with monkeypatch.context() as patch:
            _break(patch, step)
            with pytest.raises(KeyboardInterrupt):
                list(host._start().scan())
        host.store = host._start()
        payloads = {record.payload for record in host.store.scan()}
        assert payloads == {f"{number}".encode() for number in range(30)}


def _break(patch: pytest.MonkeyPatch, step: str) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if step == "put":
        real, calls = recovery.restoring.restore, iter(range(9))

        def restore(*arguments: object) -> None:
            if next(calls) == 1:
                die()
            real(*arguments)  # type: ignore[arg-type]

        patch.setattr(recovery.restoring, "restore", restore)
    elif step in {"begin", "sync_directory"}:
        patch.setattr(logs, step, die)
    else:
        real_step = getattr(Path, step)

        def only_for_logs(path: Path, *arguments: object, **options: object) -> object:
            if path.name.startswith("log."):
                die()
            return real_step(path, *arguments, **options)

        patch.setattr(Path, step, only_for_logs)


def test_a_store_that_gets_a_journal_later(tmp_path: Path) -> None:
    """What is dirty then is logged at once."""
    plain = HostStore(tmp_path / "store", size=8 * MIB, identity="tests")
    put(plain, key(1), payload=b"early")
    plain.close()
    host = Host(tmp_path)
    host.lose_power()
    assert host.records()[key(1)].payload == b"early"
    host.store.close()


def test_a_store_that_gets_a_journal_back(host: Host) -> None:
    """What the old logs have is put where it is later than what memory has, in its place too."""
    for number in (1, 3, 5):
        put(host.store, key(number), payload=b"logged")
    save(host.store, key(3), b"logged later", at=NOW)
    host.store.bury(key(5), lambda r: r and lifecycle.deleted(r, r.key, now=NOW, policy=POLICY))
    host.store.close()
    shutil.rmtree(host.place / "store")
    plain = HostStore(host.place / "store", size=8 * MIB, identity="tests")
    for number in (1, 2, 3, 4, 5):
        put(plain, key(number), payload=b"in memory", clean=number > 2)
    save(plain, key(1), b"in memory, later", at=NOW)
    plain.close()

    host.store = host._start()
    found = {k: (r.payload, r.is_dirty, r.is_tombstone) for k, r in host.records().items()}
    assert found == {
        key(1): (b"in memory, later", True, False),
        key(2): (b"in memory", True, False),
        key(3): (b"logged later", True, False),
        key(4): (b"in memory", False, False),
        key(5): (b"", True, True),
    }
    due = host.store.due(2**40, limit=9)
    assert [dirty.key for dirty in due] == [key(1), key(2), key(3), key(5)]
    assert host.store.clean_many(due, NOW) == []
    assert host.store.status().dirty == 0
    assert host.store.evict(9) == 5
    assert host.store.status().records == 0
    assert host.store.evict(9) == 0


def test_a_journal_that_does_not_fit_into_the_store(tmp_path: Path) -> None:
    """A clear error; with a larger store all is there."""
    host = Host(tmp_path, size=4 * MIB)
    for number in range(3000):
        put(host.store, key(number), payload=b"x" * 1000)
    host.store.close()
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreUnavailableError, match="has 3000 sessions, more than .*STORE_SIZE"):
        host._start(store_size=4 * MIB)
    host.store = host._start()
    assert len(host.records()) == 3000
    host.store.close()


@pytest.mark.parametrize("log", [b"garbage", os.urandom(5000), b"DSESSLOG\xff\xff" + b"x" * 200])
def test_a_log_of_something_else_is_left_alone(
    tmp_path: Path, log: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, kept, and no error for any request."""
    (tmp_path / "journal").mkdir(mode=0o700)
    (tmp_path / "journal" / "log.0").write_bytes(log)
    host = Host(tmp_path)
    put(host.store, key(1))
    assert "It is left alone, as " in caplog.text
    (kept,) = (tmp_path / "journal").glob("log.0.rejected-*")
    assert kept.read_bytes() == log
    host.store.close()


def test_a_log_of_another_project(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    put(host.store, key(1))
    host.store.close()
    shutil.rmtree(host.place / "store")
    other = Host(host.place, identity="another")
    assert other.records() == {}
    assert "belongs to another project" in caplog.text
    other.store.close()


def test_a_log_with_a_hole(host: Host) -> None:
    """All before the hole is recovered."""
    for number in range(10):
        put(host.store, key(number), payload=b"x" * 4000)
    path = host.active()
    with path.open("r+b") as file:
        file.seek(20_000)
        file.write(b"\0" * 4096)
    host.lose_power()
    assert 3 <= len(host.records()) < 6


def test_records_of_another_layout_are_counted(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    put(host.store, key(1))
    host.journal.append(key(2).encode(), b"\xff" * 300)
    host.lose_power()
    assert set(host.records()) == {key(1)}
    assert "1 records could not be read" in caplog.text


# Swap and reset


def test_d04_two_logs_are_swapped(host: Host) -> None:
    """D04, D05: the other log goes on; the retired one gives its space back when told to."""
    put(host.store, key(1), payload=b"one")
    first = host.active()
    host.store.swap_journal(host.journal.prepare(), NOW + 5)
    assert host.active() != first
    assert host.journal.swapped_at() == pytest.approx(NOW + 5)
    assert host.journal.retired() > HEADER_SIZE
    assert host.journal.unsynced() == 0
    put(host.store, key(2), payload=b"two")
    host.lose_power()
    assert set(host.records()) == {key(1), key(2)}

    host.store.swap_journal(host.journal.prepare(), NOW + 6)
    host.store.reset_journal(host.journal.generation())
    assert host.journal.retired() == 0
    resting = host.logs / LOGS[(host.journal.position()[0] + 1) & 1]
    assert resting.stat().st_size == resting.stat().st_blocks == 0


def test_another_process_sees_a_swap(host: Host) -> None:
    """Its files are those of the generation before."""
    put(host.store, key(1))
    ready, swapped = FORK.Event(), FORK.Event()

    def another() -> None:
        put(host.store, key(2))
        ready.set()
        swapped.wait(30)
        put(host.store, key(3))

    process = FORK.Process(target=another)
    process.start()
    assert ready.wait(30)
    host.store.swap_journal(host.journal.prepare(), NOW)
    swapped.set()
    process.join(30)
    assert host.journal.size() > HEADER_SIZE
    host.lose_power()
    assert set(host.records()) == {key(1), key(2), key(3)}


def test_a_full_journal_refuses_and_still_takes_deletions(host: Host) -> None:
    """Four times its size; then saves go straight to PostgreSQL."""
    put(host.store, key(1))
    with pytest.raises(StoreFullError, match="journal is full"):
        for number in range(10_000):
            save(host.store, key(1), f"{number}".encode() * 1000, at=NOW)
    size = host.journal.size()
    assert 3 * MIB < size <= 4 * MIB
    before = host.store.get(key(1))
    host.store.bury(key(1), lambda r: r and lifecycle.deleted(r, r.key, now=NOW, policy=POLICY))
    assert before is not None
    host.lose_power()
    assert host.records()[key(1)].is_tombstone


def test_a_block_that_is_begun_is_written_to_its_end(host: Host) -> None:
    """Else the kernel reads it from the disk first, and all savers of the host wait for that."""
    put(host.store, key(1))
    log = host.journal.directory / LOGS[host.journal.generation() & 1]
    put(host.store, key(2))
    size = host.journal.size()
    save(host.store, key(2), b"x", at=NOW)
    frame = host.journal.size() - size - 1  # what is added to a payload
    for wanted in (3000, 4000, 9000, 10, None, 4096, None, None, 20):
        before = host.journal.size()
        length = -(before + frame) % 4096 if wanted is None else wanted  # to the end of a block
        with log.open("r+b") as file:
            file.truncate(before)
        save(host.store, key(1), b"x" * length, at=NOW)
        end = host.journal.size()
        begins = (before - 1) // 4096 != (end - 1) // 4096
        assert log.stat().st_size == (-(-end // 4096) * 4096 if begins else end)
    host.lose_power()
    assert host.records()[key(1)].payload == b"x" * 20


def test_a_sync_tells_what_a_power_loss_would_take(host: Host) -> None:
    assert host.journal.unsynced() == 0
    put(host.store, key(1))
    assert host.journal.unsynced() > 0
    host.journal.sync(NOW)
    assert host.journal.unsynced() == 0


def test_savers_who_wait_share_a_sync(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes while a sync is under way is covered by the next; one is enough for all."""
    put(host.store, key(0))
    real, calls = os.fdatasync, itertools.count(1)
    begun, may_end = threading.Event(), threading.Event()

    def fdatasync(descriptor: int) -> None:
        number = next(calls)
        begun.set()
        assert number > 1 or may_end.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    savers = [threading.Thread(target=host.journal.wait, args=(NOW,)) for _ in range(9)]
    savers[0].start()
    assert begun.wait(30)
    put(host.store, key(1))
    for saver in savers[1:]:
        saver.start()
    may_end.set()
    for saver in savers:
        saver.join(30)
    assert host.journal.unsynced() == 0
    assert next(calls) == 3


def test_a_saver_who_dies_in_a_sync_holds_nobody_up(host: Host) -> None:
    """kill -9 in the middle of the sync that others wait for: one of them does it."""
    put(host.store, key(1))
    begun = FORK.Event()

    def die_in_a_sync() -> None:
        def fdatasync(_: int) -> None:
            begun.set()
            time.sleep(60)

        os.fdatasync = fdatasync
        host.journal.wait(NOW)

    leader = FORK.Process(target=die_in_a_sync)
    leader.start()
    assert begun.wait(30)
    savers = [threading.Thread(target=host.journal.wait, args=(NOW,)) for _ in range(3)]
    for saver in savers:
        saver.start()
    assert all(saver.is_alive() for saver in savers)
    leader.kill()
    for saver in savers:
        saver.join(30)
    assert not any(saver.is_alive() for saver in savers)
    assert host.journal.unsynced() == 0
    leader.join(30)


def test_a_disk_that_fails_to_sync(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is told; the kernel would take the pages for written, so they are written anew."""
    put(host.store, key(1))
    real, calls, written = os.pwrite, itertools.count(1), []

    def fail_once(_: int) -> None:
        if next(calls) == 1:
            raise OSError(5, "Input/output error")

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        written.append(bytes(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    monkeypatch.setattr(os, "pwrite", pwrite)
    lost = host.journal.unsynced()
    with pytest.raises(JournalError, match=r"cannot be synced: Input/output error"):
        host.journal.wait(NOW)
    assert host.journal.unsynced() == lost == len(written[0])
    host.journal.wait(NOW)
    assert host.journal.unsynced() == 0
    host.lose_power()
    assert set(host.records()) == {key(1)}


def test_a_disk_that_fails_while_others_save_and_sync(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells one of a process's threads only, and forgets what came meanwhile, too."""
    put(host.store, key(1))
    begun, goes_on = threading.Event(), threading.Event()
    inside, written, real = [], [], os.pwrite

    def fail_once(_: int) -> None:
        inside.append(threading.current_thread())
        if len(inside) == 1:
            begun.set()
            assert goes_on.wait(30)
            put(host.store, key(2))
            raise OSError(5, "Input/output error")

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        written.append((offset, offset + len(data)))
        return real(descriptor, data, offset)

    def failing() -> None:
        with pytest.raises(JournalError, match="cannot be synced"):
            host.journal.sync(NOW)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    monkeypatch.setattr(os, "pwrite", pwrite)
    first, second = (threading.Thread(target=w) for w in (failing, lambda: host.journal.sync(NOW)))
    first.start()
    assert begun.wait(30)
    second.start()
    second.join(0.2)  # it has nothing to wait for, if it does not wait for the first
    assert inside == [first]
    assert host.journal.unsynced() > 0
    goes_on.set()
    first.join(30)
    second.join(30)
    assert inside[1:] == [second]
    assert written[-1] == (HEADER_SIZE, host.journal.size())


def test_a_disk_without_room(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset + len(data) > MIB // 2:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalError, match=r"cannot be made in .* Make room"):
        host.journal.prepare()
    put(host.store, key(1))  # the active log has its room


def test_a_disk_that_becomes_read_only(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    put(host.store, key(1))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(StoreFullError, match="Read-only file system"):
        save(host.store, key(1), b"x", at=NOW)
    record = host.store.get(key(1))
    assert record is not None
    assert record.version == 1
