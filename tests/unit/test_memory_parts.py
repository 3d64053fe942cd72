"""The process cache, the counters, the locks and the fork hooks, each by itself."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from deferred_sessions.memory import forks
from deferred_sessions.memory.cache import Entry, SessionCache
from deferred_sessions.memory.counters import SLOT_WORDS, SLOTS, Counter, Counters
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.store import HostStore


def in_child(work: Callable[[], object]) -> None:
    """Do `work` in a forked child; fail if it failed there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# Cache


class Snapshot(NamedTuple):
    """All that the cache wants to know of a snapshot."""

    payload: bytes


def entry(version: int, payload: bytes = b"session", entered_at: float = 7.0) -> Entry[Snapshot]:
    return Entry(version, entered_at, Snapshot(payload))


def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    cache: SessionCache[Snapshot] = SessionCache(3)
    for number in range(4):
        cache.put(str(number), entry(1))
    cache.put("1", entry(2))
    cache.put("4", entry(1))

    found = [cache.get(str(n)) for n in (0, 2, 3, 4)]
    assert found == [None, None, entry(1), entry(1)]
    assert cache.get("1") == entry(2)


def test_the_cache_is_bounded_in_bytes_too() -> None:
    """Ten thousand large sessions are more than a process may take."""
    cache: SessionCache[Snapshot] = SessionCache(100, max_bytes=100_000)
    for number in range(4):
        cache.put(str(number), entry(1, b"x" * 40_000))
    assert [cache.get(str(n)) is not None for n in range(4)] == [False, False, True, True]

    cache.put("3", entry(2, b"x" * 10))
    cache.put("another", entry(1, b"x" * 50_000))
    assert cache.get("2") is not None

    cache.put("huge", entry(1, b"x" * 100_001))
    assert cache.get("huge") is None


def test_the_cache_forgets_what_it_is_told_to() -> None:
    cache: SessionCache[Snapshot] = SessionCache(3, max_bytes=100_000)
    cache.put("key", entry(1, b"x" * 90_000))
    cache.drop("key")
    cache.drop("key")
    assert cache.get("key") is None

    cache.put("one", entry(1, b"x" * 50_000))
    cache.put("two", entry(1, b"x" * 50_000))
    assert cache.get("one") is not None


def test_a_cache_of_nothing_keeps_nothing() -> None:
    cache: SessionCache[Snapshot] = SessionCache(0)
    cache.put("key", entry(1))

    assert cache.get("key") is None


def test_the_cache_can_be_cleared() -> None:
    cache: SessionCache[Snapshot] = SessionCache(3)
    cache.put("key", entry(1))
    cache.clear()

    assert cache.get("key") is None


# Counters


def test_counters_add_up(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "store")
    counters.add(Counter.REQUESTS)
    counters.add(Counter.REQUESTS, 4)
    counters.add(Counter.UPDATES)

    assert counters.totals()[Counter.REQUESTS] == 5
    assert counters.totals()[Counter.UPDATES] == 1
    assert counters.totals()[Counter.LOADS] == 0
    counters.close()


def test_counts_outlive_the_process(tmp_path: Path) -> None:
    first = Counters(tmp_path / "store")
    first.add(Counter.REQUESTS, 3)
    first.close()

    second = Counters(tmp_path / "store")
    second.add(Counter.REQUESTS)

    assert second.totals()[Counter.REQUESTS] == 4
    second.clear()
    assert second.totals()[Counter.REQUESTS] == 0
    second.close()


def test_every_process_has_a_slot_of_its_own(tmp_path: Path) -> None:
    """Two processes that count at once lose nothing."""
    counters = Counters(tmp_path / "store")
    counters.add(Counter.REQUESTS)

    def count() -> None:
        for _ in range(1000):
            counters.add(Counter.REQUESTS)

    for _ in range(4):
        in_child(count)
    counters.add(Counter.REQUESTS)

    assert counters.totals()[Counter.REQUESTS] == 4002
    counters.close()


def test_a_child_leaves_the_slot_of_its_parent_alone(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "store")
    counters.add(Counter.REQUESTS)
    slots: list[int] = [counters._offset]

    def claim() -> None:
        counters.add(Counter.REQUESTS)
        assert counters._offset != slots[0]

    in_child(claim)
    counters.close()


def test_threads_lose_no_count(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "store")
    counters.add(Counter.REQUESTS)

    def count() -> None:
        for _ in range(20_000):
            counters.add(Counter.REQUESTS)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert counters.totals()[Counter.REQUESTS] == 80_001
    counters.close()


def test_without_a_place_it_counts_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counting never fails a request."""
    counters = Counters(tmp_path / "no" / "such" / "place")

    with caplog.at_level(logging.WARNING):
        counters.add(Counter.REQUESTS)
        counters.add(Counter.REQUESTS)

    assert counters.totals()[Counter.REQUESTS] == 2
    assert caplog.text.count("Counting for this process only") == 1


def test_every_counter_has_its_place() -> None:
    assert len(Counter) <= SLOT_WORDS
    assert len({int(counter) for counter in Counter}) == len(Counter)
    assert all(counter.__doc__ for counter in Counter)


def test_more_processes_than_slots_share_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Counters(tmp_path / "store")
    monkeypatch.setattr("fcntl.lockf", _always_taken)

    counters.add(Counter.REQUESTS)

    assert counters._offset == (SLOTS - 1) * SLOT_WORDS
    assert counters.totals()[Counter.REQUESTS] == 1
    monkeypatch.undo()
    counters.close()


# Locks


def test_a_lock_excludes_threads(tmp_path: Path) -> None:
    lock = ProcessLock(tmp_path / "lock")
    results: list[bool] = []

    def try_it() -> None:
        with lock.held(wait=False) as is_held:
            results.append(is_held)

    with lock.held(wait=False) as is_held:
        assert is_held
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    try_it()

    assert results == [False, True]


def test_a_lock_excludes_processes(tmp_path: Path) -> None:
    lock = ProcessLock(tmp_path / "lock")

    def is_refused() -> None:
        with lock.held(wait=False) as is_held:
            assert not is_held

    with lock.held(wait=True) as is_held:
        assert is_held
        in_child(is_refused)


def test_a_dead_holder_frees_the_lock(tmp_path: Path) -> None:
    """Trap 6: locks do not survive their owner."""
    lock = ProcessLock(tmp_path / "lock")

    def die_holding() -> None:
        lock.held(wait=True).__enter__()
        os._exit(0)

    in_child(die_holding)

    with lock.held(wait=False) as is_held:
        assert is_held


def test_an_interrupted_holder_frees_the_lock(tmp_path: Path) -> None:
    """A time limit raises between any two instructions; only the kernel knows the lock."""
    lock = ProcessLock(tmp_path / "lock")
    with contextlib.suppress(KeyboardInterrupt), lock.held(wait=False):
        raise KeyboardInterrupt

    with lock.held(wait=False) as is_held:
        assert is_held


def test_a_child_does_not_hold_what_its_parent_held(tmp_path: Path) -> None:
    lock = ProcessLock(tmp_path / "lock")
    with lock.held(wait=False):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with lock.held(wait=True) as is_held:  # would wait for as long as the child lives
            assert is_held
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


# Forks


class Part:
    """Something that notes what it is told, and may fail at that."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.told: list[str] = []
        self._failure = failure

    def before_fork(self) -> None:
        if self._failure:
            raise self._failure
        self.told.append("before")

    def after_fork(self, *, in_child: bool) -> None:
        self.told.append("after")
        if in_child:
            raise ValueError("not in a child")


def test_a_part_that_fails_does_not_keep_the_others_from_their_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, bad = Part(), Part(OSError("no"))
    forks.watch(good)
    forks.watch(bad)

    in_child(lambda: None)

    assert (good.told, bad.told) == (["before", "after"], [])
    assert "cannot prepare for a fork" in caplog.text


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_threads_that_fork_at_once(store: HostStore) -> None:
    """One at a time: else each undoes what the other has prepared, and all hang."""
    store.set_note("x", b"0")
    done: list[int] = []

    def fork_often() -> None:
        for _ in range(40):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            store.note("x")
        done.append(1)

    threads = [threading.Thread(target=fork_often, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert done == [1, 1, 1]


def test_a_child_opens_the_store_for_itself(store: HostStore) -> None:
    """gunicorn --preload, Celery prefork: used before the fork, used after it."""
    store.set_note("parent", b"was here")

    def use() -> None:
        assert store._file.databases is None  # an inherited map would be the parent's
        assert store.note("parent") == b"was here"
        store.set_note("child", b"too")

    for _ in range(3):
        in_child(use)

    assert store.note("child") == b"too"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_threads_use_the_store(store: HostStore) -> None:
    """Neither the child nor the threads of the parent notice anything."""
    store.set_note("x", b"0")
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                store.set_note("x", b"1")
                assert store.note("x") == b"1"
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        in_child(lambda: store.set_note("child", b"1"))
    stop.set()
    for thread in threads:
        thread.join()

    assert failures == []
    assert store.note("child") == b"1"


def _always_taken(*_: object) -> None:
    raise BlockingIOError
