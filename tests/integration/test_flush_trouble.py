"""The flusher in trouble: what PostgreSQL refuses, has lost, or somebody else holds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone
from freezegun import freeze_time

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.models import Node, Session
from deferred_sessions.record import TOUCHED
from deferred_sessions.runtime import Runtime
from deferred_sessions.servers.stream import StatementStream
from tests.integration.conftest import (
    Outage,
    change,
    created,
    dirty,
    record,
    row,
    second_connection,
)

pytestmark = pytest.mark.django_db(transaction=True)


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

    def kill_then_mark(self: Any, batch: Any, now: float) -> Any:
        killer.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        return real(self, batch, now)

    with killer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runtime.flusher._writer), "mark_written", kill_then_mark)
        report = runtime.flusher.flush_once(time.time() + 61)

    again = runtime.flusher.flush_once(time.time() + 61)
    assert report.updated + report.repeated + again.updated + again.repeated >= 20
    assert again.remaining == 0
    assert Session.objects.filter(version=2).count() == 20


@contextmanager
def trigger(body: str, when: str = "BEFORE UPDATE") -> Iterator[None]:
    """Have a trigger on the table of the sessions."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {body} RETURN NEW; END $$; "
            f"CREATE TRIGGER refuse {when} ON deferred_sessions_session "
            f"FOR EACH ROW EXECUTE FUNCTION refuse();"
        )
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION refuse CASCADE")


@pytest.fixture(params=["P0001", "42501", "22000", "XX001"])
def picky(request: pytest.FixtureRequest) -> Iterator[None]:
    """PostgreSQL refuses rows of user 13, for one reason or another."""
    with trigger(
        "IF NEW.user_id = '13' THEN "
        f"RAISE EXCEPTION 'not this one' USING ERRCODE = '{request.param}'; END IF;"
    ):
        yield


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
    runtime: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 4: deleted by somebody in this very moment; the flush deletes it here as well."""
    gone, other = dirty(2)
    runtime.revocations.read_once(time.time())

    def delete(*_: Any) -> None:
        Session.objects.filter(pk=gone.session_key).delete()

    monkeypatch.setattr(runtime.revocations, "read_once", delete)

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
    Session.objects.update(session_data=theirs, version=99, owner=None)

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
    Node.objects.create(node="elsewhere", died_at=timezone.now())

    assert runtime.flusher.flush_once(time.time() + 61).fenced == 1
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


def test_a_commit_that_fails_is_no_write(runtime: Runtime) -> None:
    """A deferred constraint is checked at the commit, after the statement was counted."""
    sessions = dirty(3)
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'not today'; END $$"
        )
        cursor.execute(
            "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON deferred_sessions_session "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    try:
        report = runtime.flusher.flush_once(time.time() + 61)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION refuse CASCADE")

    assert (report.updated, report.remaining) == (0, 3)
    assert row(sessions[0].session_key) == {"n": 0}


def test_a_statement_that_takes_too_long_is_divided(runtime: Runtime) -> None:
    """`statement_timeout` is no reason to stop: smaller batches may be fast enough."""
    sessions = dirty(4)
    with trigger("PERFORM pg_sleep(0.15);"):
        with connection.cursor() as cursor:
            cursor.execute("SET statement_timeout = '400ms'")
        try:
            report = runtime.flusher.flush_once(time.time() + 61)
        finally:
            with connection.cursor() as cursor:
                cursor.execute("RESET statement_timeout")

    assert (report.failure, report.updated) == ("", 4)
    assert row(sessions[3].session_key) == {"n": 4}


def test_errors_do_not_quote_the_row(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """PostgreSQL's DETAIL has all columns of the row; a session key is a secret."""
    session = dirty(1)[0]
    with connection.cursor() as cursor:
        cursor.execute(
            "ALTER TABLE deferred_sessions_session ADD CONSTRAINT small CHECK (version < 2)"
        )
    try:
        with caplog.at_level(logging.DEBUG, "deferred_sessions"):
            assert runtime.flusher.flush_once(time.time() + 61).set_aside == 1
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE deferred_sessions_session DROP CONSTRAINT small")

    assert "small" in caplog.text
    assert str(session.session_key) not in caplog.text


@pytest.mark.parametrize("at", [1, 2])
def test_a_flush_that_is_interrupted_leaves_a_clean_connection(
    tune: Callable[..., Runtime], at: int
) -> None:
    """Celery's soft time limit raises anywhere: the next statement must get its own answer."""
    runtime = tune(BATCH_SIZE=2)
    sessions = dirty(8)
    marks = []
    real = type(runtime.flusher._writer).mark_written

    def interrupted(self: Any, batch: Any, now: float) -> Any:
        marks.append(1)
        if len(marks) == at:
            raise KeyboardInterrupt
        return real(self, batch, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runtime.flusher._writer), "mark_written", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.flusher.flush_once(time.time() + 61)

    assert Session.objects.count() == 8
    report = runtime.flusher.flush_once(time.time() + 61)
    assert (report.failure, report.remaining, report.skipped) == ("", 0, False)
    assert [row(s.session_key) for s in sessions] == [{"n": n + 1} for n in range(8)]


def test_a_server_that_hangs_does_not_hang_the_flusher(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deferred_sessions.servers.stream.DEADLINE", 0.05)
    sessions = dirty(2)
    with trigger("IF pg_trigger_depth() < 9 THEN PERFORM pg_sleep(0.3); END IF;"):
        report = runtime.flusher.flush_once(time.time() + 61)

    assert report.remaining == 0
    assert [row(s.session_key) for s in sessions] == [{"n": 1}, {"n": 2}]


def test_a_batch_that_cannot_be_streamed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something in it has no form that goes over the wire: the careful way finds out what."""

    def refuse(_stream: StatementStream, _value: object) -> None:
        raise psycopg.DataError("no such value")

    sessions = dirty(2)
    monkeypatch.setattr(StatementStream, "encoded", refuse)

    report = runtime.flusher.flush_once(time.time() + 61)

    assert (report.updated, report.remaining, report.failure) == (2, 0, "")
    assert [row(s.session_key) for s in sessions] == [{"n": 1}, {"n": 2}]


def test_a_clock_that_was_set_back(runtime: Runtime) -> None:
    """What was due by the clock of then is written now, not an hour later."""
    session = dirty(1)[0]
    now = time.time()
    with freeze_time(datetime.fromtimestamp(now + 3600, UTC)):
        change(session, n=5)
        runtime.flusher.flush_once(now + 3600 + 61)
        change(session, n=6)

    assert runtime.flusher.flush_once(now).updated == 1
    assert row(session.session_key) == {"n": 6}
    change(session, n=7)
    assert runtime.flusher.flush_once(time.time() + 61).updated == 1


def test_clear_expired_spares_what_could_not_be_written(runtime: Runtime) -> None:
    """The row has expired, the session has not: somebody holds the row, or it is refused."""
    session = dirty(1)[0]
    now = time.time()
    Session.objects.update(expire_date=datetime.fromtimestamp(now - 60, UTC), written_at=Now())
    runtime.store.update(
        session.session_key or "", lambda r: r and r._replace(stored_expires_at=now - 60)
    )
    other = created(a=1)
    Session.objects.filter(pk=other.session_key).update(
        expire_date=datetime.fromtimestamp(now - 60, UTC)
    )
    runtime.store.update(other.session_key or "", lambda _: None)
    with trigger("RAISE EXCEPTION 'not today';"):
        runtime.flusher.clear_expired(now)

    assert row(other.session_key) is None
    assert row(session.session_key) == {"n": 0}


def test_a_flusher_that_has_been_at_work_for_long_is_mentioned(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.time()
    runtime.flusher.flush_once(now)
    with (
        ProcessLock(runtime.store.directory / "flush.lock").held(wait=True),
        caplog.at_level(logging.WARNING),
    ):
        assert runtime.flusher.flush_once(now + 100).skipped
        assert caplog.text == ""
        assert runtime.flusher.flush_once(now + 121).skipped
    assert "at work for 121 s" in caplog.text
