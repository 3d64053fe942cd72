"""The flusher on real PostgreSQL: when it writes, and what it does about trouble."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.models import Session
from deferred_sessions.record import TOUCHED, SessionRecord
from deferred_sessions.runtime import Runtime
from deferred_sessions.signals import session_flushed
from tests.integration.conftest import Outage, row, second_connection

pytestmark = pytest.mark.django_db(transaction=True)


def created(**values: Any) -> SessionStore:
    session = SessionStore()
    session.update(values)
    session.save()
    return session


def change(session: SessionStore, **values: Any) -> SessionStore:
    again = SessionStore(session.session_key)
    again.update(values)
    again.save()
    return again


def dirty(count: int) -> list[SessionStore]:
    """Return so many sessions with a change that PostgreSQL lacks."""
    return [change(created(n=0), n=number + 1) for number in range(count)]


def record(runtime: Runtime, session: SessionStore) -> SessionRecord:
    found = runtime.store.get(session.session_key or "")
    assert found is not None
    return found


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
    change(session, n=2)

    assert runtime.flusher.flush_once(now + 61 + 59).rows == 0
    assert runtime.flusher.flush_once(now + 61 + 61).rows == 1


# Trouble


def test_trap_1_a_failed_flush_leaves_everything_dirty(runtime: Runtime, outage: Outage) -> None:
    """Trap 1: nothing is remembered as done that was not, and the next run repeats it."""
    sessions = dirty(3)
    before = [record(runtime, s) for s in sessions]
    outage.begin()

    report = runtime.flusher.flush_once(time.time() + 61)

    assert report.rows == 0
    assert "PostgreSQL cannot be asked" in report.failure
    assert report.remaining == 3
    assert [record(runtime, s) for s in sessions] == before
    assert runtime.counters.totals()[Counter.FLUSH_FAILURES] == 1

    outage.end()
    report = runtime.flusher.flush_once(time.time() + 61)
    assert (report.updated, report.failure) == (3, "")


def test_the_connection_breaks_in_the_middle(tune: Callable[..., Runtime]) -> None:
    """What was committed is marked, the rest is still due, and the next run finishes."""
    runtime = tune(BATCH_SIZE=5)
    dirty(20)
    killer = second_connection()
    connection.ensure_connection()
    pid = connection.connection.info.backend_pid
    real = type(runtime.flusher._writer).mark_written

    def kill_then_mark(self: Any, batch: Any, now: float) -> None:
        killer.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        real(self, batch, now)

    with killer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runtime.flusher._writer), "mark_written", kill_then_mark)
        report = runtime.flusher.flush_once(time.time() + 61)

    again = runtime.flusher.flush_once(time.time() + 61)
    assert report.updated + report.repeated + again.updated + again.repeated >= 20
    assert again.remaining == 0
    assert Session.objects.filter(version=2).count() == 20


@pytest.fixture
def picky() -> Iterator[None]:
    """PostgreSQL refuses rows of user 13."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF NEW.user_id = '13' THEN RAISE EXCEPTION 'not this one'; END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER refuse BEFORE UPDATE ON deferred_sessions_session
                FOR EACH ROW EXECUTE FUNCTION refuse();
            """
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP FUNCTION refuse CASCADE")


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_poisonous_record_is_set_aside(
    picky: None, runtime: Runtime, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """One refused record is put off with an error and never blocks the others."""
    sessions = dirty(count)
    poison = sessions[count // 2]
    runtime.store.update(poison.session_key or "", lambda r: r and r._replace(user_id="13"))

    with caplog.at_level(logging.ERROR):
        report = runtime.flusher.flush_once(time.time() + 61)

    assert (report.updated + report.repeated, report.set_aside) == (count - 1, 1)
    assert report.failure == ""
    assert "set aside for 300 s" in caplog.text
    assert poison.session_key is not None
    assert poison.session_key not in caplog.text
    assert runtime.flusher.flush_once(time.time() + 120).set_aside == 0
    assert SessionStore(poison.session_key)["n"] > 0

    runtime.store.update(poison.session_key, lambda r: r and r._replace(user_id="14"))
    assert runtime.flusher.flush_once(time.time() + 61 + 301).updated == 1


def test_trap_4_a_deleted_row_does_not_come_back(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    """Trap 4: deleted in PostgreSQL behind our back; the flush deletes it here as well."""
    gone, other = dirty(2)
    Session.objects.filter(pk=gone.session_key).delete()

    with caplog.at_level(logging.WARNING):
        report = runtime.flusher.flush_once(time.time() + 61)

    assert (report.vanished, report.updated + report.repeated) == (1, 1)
    assert row(gone.session_key) is None
    assert row(other.session_key) == {"n": 2}
    assert SessionStore(gone.session_key).load() == {}
    assert "1 sessions with unsaved changes were deleted in PostgreSQL" in caplog.text
    assert runtime.counters.totals()[Counter.VANISHED] == 1
    assert runtime.flusher.flush_once(time.time() + 3600).rows == 0


def test_a_newer_row_wins(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody else wrote a newer version: ours is void, and the next load reads theirs."""
    session = dirty(1)[0]
    theirs = SessionStore().encode({"n": "theirs"})
    Session.objects.update(session_data=theirs, version=99, owner="elsewhere")

    with caplog.at_level(logging.WARNING):
        report = runtime.flusher.flush_once(time.time() + 61)

    assert report.superseded == 1
    assert row(session.session_key) == {"n": "theirs"}
    assert SessionStore(session.session_key).load() == {"n": "theirs"}
    assert "1 sessions with unsaved changes are newer in PostgreSQL" in caplog.text
    assert runtime.flusher.flush_once(time.time() + 3600).remaining == 0


def test_the_same_version_of_somebody_else_is_not_taken_for_ours(runtime: Runtime) -> None:
    """Two nodes made version 2: the second to flush is told that its change is void."""
    session = dirty(1)[0]
    theirs = SessionStore().encode({"n": "theirs"})
    Session.objects.update(session_data=theirs, version=2, owner="elsewhere")

    assert runtime.flusher.flush_once(time.time() + 61).superseded == 1
    assert SessionStore(session.session_key).load() == {"n": "theirs"}


def test_a_write_that_got_through_unnoticed(runtime: Runtime) -> None:
    """Killed between the commit and the mark: the repetition finds that out."""
    session = dirty(1)[0]
    before = record(runtime, session)
    runtime.flusher.flush_once(time.time() + 61)
    runtime.store.update(before.key, lambda _: before)

    report = runtime.flusher.flush_once(time.time() + 61)

    assert (report.repeated, report.remaining) == (1, 0)
    assert not record(runtime, session).is_dirty


def test_a_row_that_postgresql_forgot(runtime: Runtime) -> None:
    """Failed over to a server that lost the last commits: written again in full."""
    session = created(n=0)
    change(session, n=1)
    runtime.flusher.flush_once(time.time() + 61)
    Session.objects.update(session_data=SessionStore().encode({"n": 0}), version=1)
    runtime.store.update(
        session.session_key or "", lambda r: r and r._replace(flags=TOUCHED, due_at=1.0)
    )

    report = runtime.flusher.flush_once(time.time())

    assert report.outdated == 1
    assert report.updated == 1
    assert row(session.session_key) == {"n": 1}


def test_a_row_that_a_transaction_holds(runtime: Runtime) -> None:
    """The poller does not wait for a long transaction of the application."""
    sessions = dirty(5)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic():
            Session.objects.select_for_update().get(pk=sessions[2].session_key)
            held.set()
            release.wait()
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    report = runtime.flusher.flush_once(time.time() + 61)
    release.set()
    thread.join()

    assert (report.updated + report.repeated, report.locked) == (4, 1)
    assert runtime.flusher.flush_once(time.time() + 61 + 61).updated == 1


def test_an_insert_that_a_transaction_holds(runtime: Runtime, outage: Outage) -> None:
    """A session created in a transaction that is still open is put off."""
    outage.begin()
    waiting, free = created(n=1), created(n=2)
    outage.end()
    done, release = threading.Event(), threading.Event()

    def insert() -> None:
        with transaction.atomic():
            Session.objects.create(
                session_key=waiting.session_key,
                session_data="",
                expire_date="2100-01-01T00:00Z",
            )
            done.set()
            release.wait()
        connection.close()

    thread = threading.Thread(target=insert)
    thread.start()
    done.wait()
    report = runtime.flusher.flush_once(time.time())
    release.set()
    thread.join()

    assert report.locked == 1
    assert row(free.session_key) == {"n": 2}


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
    sessions = dirty(50)

    def flush() -> None:
        runtime.flusher._flush(time.time() + 61, time.time() + 61)
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
