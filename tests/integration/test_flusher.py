"""The flusher on real PostgreSQL: what it writes, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import connection
from freezegun import freeze_time

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.models import Session
from deferred_sessions.record import TOUCHED
from deferred_sessions.runtime import Runtime
from deferred_sessions.signals import session_flushed
from tests.integration.conftest import (
    Outage,
    change,
    created,
    dirty,
    record,
    row,
)

pytestmark = pytest.mark.django_db(transaction=True)


def test_d06_memory_is_carried_to_the_database(runtime: Runtime) -> None:
    """D06: the flusher transfers what changed to mass storage."""
    sessions = dirty(3)

    report = runtime.flusher.flush_once(time.time() + 61)

    assert report.updated == report.rows == 3
    assert report.remaining == 0
    assert [row(s.session_key) for s in sessions] == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a02_written_after_the_interval_and_not_before(runtime: Runtime) -> None:
    """A02: at one second less than the interval nothing is written."""
    session = created(n=0)
    written_at = record(runtime, session).written_at
    change(session, n=1)

    assert runtime.flusher.flush_once(written_at + 59).rows == 0
    assert row(session.session_key) == {"n": 0}
    assert runtime.flusher.flush_once(written_at + 60).rows == 1
    assert row(session.session_key) == {"n": 1}


def test_a05_only_what_changed_is_written(runtime: Runtime) -> None:
    """A05: a poller that comes again finds nothing to do."""
    session = dirty(1)[0]
    created(n=0)
    SessionStore(session.session_key)["n"]

    assert runtime.flusher.flush_once(time.time() + 61).rows == 1
    assert runtime.flusher.flush_once(time.time() + 3600).rows == 0


@pytest.mark.parametrize(("updates", "written"), [(2, False), (3, True)])
def test_a07_written_after_n_updates_and_not_before(
    tune: Callable[..., Runtime], updates: int, written: bool
) -> None:
    """A07: N updates cause the write, one less does not."""
    runtime = tune(FLUSH_AFTER_UPDATES=3)
    session = created(n=0)
    for number in range(updates):
        change(session, n=number + 1)

    assert runtime.flusher.flush_once(time.time()).rows == int(written)


def test_both_an_idle_and_a_busy_session_are_written_in_time(runtime: Runtime) -> None:
    """Trap 3: the bound is the age of the change, never the time without use."""
    idle, busy = change(created(n=0), n=1), change(created(n=0), n=1)
    start = time.time()
    for number in range(100):
        change(busy, n=number)

    report = runtime.flusher.flush_once(start + 61)

    assert report.updated == 2
    assert row(idle.session_key) == {"n": 1}
    assert row(busy.session_key) == {"n": 99}


def test_many_batches(tune: Callable[..., Runtime]) -> None:
    runtime = tune(BATCH_SIZE=7)
    sessions = dirty(30)

    report = runtime.flusher.flush_once(time.time() + 61)

    assert report.updated == 30
    assert report.remaining == 0
    assert [row(s.session_key) for s in sessions] == [{"n": n + 1} for n in range(30)]


def test_all_kinds_at_once(tune: Callable[..., Runtime], outage: Outage) -> None:
    runtime = tune(BATCH_SIZE=3)
    changed, touched, deleted = created(n=0), created(n=0), created(n=0)
    outage.begin()
    new = created(n=5)
    deleted.delete()
    change(changed, n=1)
    runtime.store.update(
        touched.session_key or "",
        lambda r: r and r._replace(flags=TOUCHED, due_at=1.0, expires_at=r.expires_at + 9),
    )
    outage.end()

    report = runtime.flusher.flush_once(time.time() + 61)

    assert (report.inserted, report.updated, report.touched, report.deleted) == (1, 1, 1, 1)
    assert report.remaining == 0
    assert row(new.session_key) == {"n": 5}
    assert row(deleted.session_key) is None


def test_everything(runtime: Runtime) -> None:
    """`--all`: due or not."""
    dirty(3)

    assert runtime.flusher.flush_once(time.time()).rows == 0
    assert runtime.flusher.flush_once(time.time(), everything=True).rows == 3


def test_two_intervals_in_a_row(runtime: Runtime) -> None:
    """The interval begins anew with each write."""
    session = dirty(1)[0]
    now = time.time()
    runtime.flusher.flush_once(now + 61)
    with freeze_time(datetime.fromtimestamp(now + 62, UTC)):
        change(session, n=2)

    assert runtime.flusher.flush_once(now + 61 + 59).rows == 0
    assert runtime.flusher.flush_once(now + 61 + 61).rows == 1


# Several flushers


def test_one_flusher_of_a_node_at_a_time(runtime: Runtime) -> None:
    dirty(1)
    lock = ProcessLock(runtime.store.directory / "flush.lock")

    def flush() -> None:
        reports.append(runtime.flusher.flush_once(time.time() + 61))
        connection.close()

    reports: list[Any] = []
    with runtime.flusher._lock.held(wait=True):
        thread = threading.Thread(target=flush)
        thread.start()
        thread.join()

    assert reports[0].skipped
    assert reports[0].rows == 0
    assert lock is not None


def test_many_flushers_at_once_are_harmless(runtime: Runtime) -> None:
    """Even without the lock: every session ends up written, once, as it is."""
    sessions, flusher = dirty(50), runtime.flusher

    def flush() -> None:
        flusher._runs(time.time() + 61).stream(flusher._batches(time.time() + 61))
        connection.close()

    threads = [threading.Thread(target=flush) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    runtime.flusher.flush_once(time.time() + 3600)
    assert runtime.store.status().dirty == 0
    assert [row(s.session_key) for s in sessions] == [{"n": n + 1} for n in range(50)]
    assert set(Session.objects.values_list("version", flat=True)) == {2}


def test_sessions_change_while_they_are_flushed(runtime: Runtime) -> None:
    """Nothing acknowledged is lost between the snapshot and the mark."""
    sessions = dirty(20)
    stop = threading.Event()
    counts = [0] * 20

    def visit() -> None:
        while not stop.is_set():
            for number, session in enumerate(sessions):
                change(session, n=counts[number] + 1)
                counts[number] += 1
        connection.close()

    thread = threading.Thread(target=visit)
    thread.start()
    for _ in range(30):
        runtime.flusher.flush_once(time.time(), everything=True)
    stop.set()
    thread.join()

    runtime.flusher.flush_once(time.time(), everything=True)
    assert [row(s.session_key) for s in sessions] == [{"n": n} for n in counts]


def test_a_change_during_its_flush_waits_for_the_next_interval(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is known as written; the change since is due one interval later."""
    session = change(created(n=0), n=1)
    columns = runtime.flusher._writer.columns

    def slow(batch: Any) -> Any:
        change(session, n=2)
        return columns(batch)

    monkeypatch.setattr(runtime.flusher._writer, "columns", slow)
    now = time.time() + 61
    runtime.flusher.flush_once(now)

    assert row(session.session_key) == {"n": 1}
    left = record(runtime, session)
    assert (left.version, left.stored_version, left.updates) == (3, 2, 1)
    assert left.due_at == pytest.approx(now + 60)


# Reports


def test_the_last_report_is_known_to_the_node(runtime: Runtime) -> None:
    assert runtime.flusher.last_report() is None
    dirty(2)
    report = runtime.flusher.flush_once(time.time() + 61)

    assert runtime.flusher.last_report() == report
    assert runtime.statistics.read(time.time()).last_flush == report


def test_a_signal_tells_of_a_flush(runtime: Runtime) -> None:
    reports: list[Any] = []

    def listen(report: Any, **_: Any) -> None:
        reports.append(report)
        raise RuntimeError("a receiver that fails harms nobody")

    session_flushed.connect(listen)
    try:
        runtime.flusher.flush_once(time.time())
        dirty(1)
        runtime.flusher.flush_once(time.time() + 61)
    finally:
        session_flushed.disconnect(listen)

    assert [report.updated for report in reports] == [1]


def test_statistics(runtime: Runtime) -> None:
    statistics = runtime.statistics.read(time.time())
    assert (statistics.store.records, statistics.oldest_change_age) == (0, 0.0)
    assert statistics.last_flush is None

    dirty(2)
    statistics = runtime.statistics.read(time.time() + 10)
    assert statistics.store.dirty == 2
    assert 10 <= statistics.oldest_change_age < 60
    assert statistics.counters[Counter.CREATIONS] == 2
    assert statistics.counters[Counter.UPDATES] == 2
