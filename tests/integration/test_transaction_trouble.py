"""Sessions in transactions that go wrong: neither the session nor the application loses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.db import DatabaseError, connection, transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import StoreFullError
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import created, dirty, forget, record, row, second_connection

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def no_autocommit(transactional_db: None) -> Iterator[None]:
    """Manual transaction management."""
    transaction.set_autocommit(False)
    yield
    transaction.rollback()
    transaction.set_autocommit(True)


@pytest.fixture
def holder(transactional_db: None) -> Iterator[Any]:
    """Somebody else, who holds rows until the end of the test."""
    with second_connection() as other:
        other.execute("BEGIN")
        yield other
        other.execute("ROLLBACK")


def run(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def log_in(session: SessionStore) -> None:
    session["_auth_user_id"] = "7"
    session.save()


def test_a_write_that_fails_does_not_spoil_the_transaction(runtime: Runtime, holder: Any) -> None:
    """The application's own work commits, although the session's row was locked."""
    session = created(a=1)
    holder.execute("UPDATE deferred_sessions_session SET fence = 0")
    with transaction.atomic():
        run("SET LOCAL lock_timeout = '50ms'")
        Group.objects.create(name="kept")
        log_in(session)

    assert Group.objects.filter(name="kept").exists()
    assert record(runtime, session).is_dirty
    assert runtime.counters.totals()[Counter.WRITES_POSTPONED] == 1


def test_a_deletion_that_fails_does_not_spoil_it_either(holder: Any) -> None:
    session = created(a=1)
    holder.execute("UPDATE deferred_sessions_session SET fence = 0")
    with transaction.atomic():
        run("SET LOCAL lock_timeout = '50ms'")
        Group.objects.create(name="kept")
        session.delete()

    assert Group.objects.filter(name="kept").exists()
    assert SessionStore(session.session_key).load() == {}


def test_a_creation_that_fails_does_not_spoil_it_either(runtime: Runtime, holder: Any) -> None:
    holder.execute("LOCK deferred_sessions_session IN EXCLUSIVE MODE")
    with transaction.atomic():
        run("SET LOCAL lock_timeout = '50ms'")
        Group.objects.create(name="kept")
        session = created(a=1)

    assert Group.objects.filter(name="kept").exists()
    assert SessionStore(session.session_key).load() == {"a": 1}
    holder.execute("ROLLBACK")
    runtime.flusher.flush_once(time.time())
    assert row(session.session_key) == {"a": 1}


def test_a_commit_that_is_silently_a_rollback(runtime: Runtime) -> None:
    """An error swallowed without a savepoint: Django calls the hooks all the same."""
    old = created(a=1)
    with transaction.atomic():
        new = created(b=1)
        log_in(old)
        with suppress(DatabaseError):
            run("SELECT 1 / 0")

    assert row(new.session_key) is None
    runtime.flusher.flush_once(time.time() + 61)
    assert row(new.session_key) == {"b": 1}
    assert row(old.session_key) == {"a": 1, "_auth_user_id": "7"}


def test_manual_transactions_that_roll_back(runtime: Runtime, no_autocommit: None) -> None:
    session = created(a=1)
    transaction.commit()
    log_in(session)
    other = created(b=1)
    gone = created(c=1)
    transaction.commit()
    gone.delete()
    session["_auth_user_id"] = "8"
    session.save()
    transaction.rollback()
    transaction.set_autocommit(True)

    runtime.flusher.flush_once(time.time() + 61)
    assert row(session.session_key) == {"a": 1, "_auth_user_id": "8"}
    assert row(other.session_key) == {"b": 1}
    assert row(gone.session_key) is None
    transaction.set_autocommit(False)


def test_a_begin_by_hand_that_rolls_back(runtime: Runtime) -> None:
    session = created(a=1)
    run("BEGIN")
    log_in(session)
    other = created(b=1)
    run("ROLLBACK")

    assert row(other.session_key) is None
    runtime.flusher.flush_once(time.time() + 61)
    assert row(session.session_key) == {"a": 1, "_auth_user_id": "7"}
    assert row(other.session_key) == {"b": 1}


def test_nothing_is_flushed_where_nobody_commits(runtime: Runtime, no_autocommit: None) -> None:
    dirty(2)
    transaction.commit()

    report = runtime.flusher.flush_once(time.time() + 61)

    assert "nobody commits" in report.failure
    assert report.rows == 0
    assert report.remaining == 2


def test_the_check_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(connection.settings_dict, "AUTOCOMMIT", False)
    with pytest.raises(Exception, match="deferred_sessions.E007"):
        call_command("check")


def test_an_old_snapshot_is_not_kept(runtime: Runtime) -> None:
    """REPEATABLE READ sees rows as they were: fine for this request, not for others."""
    session = created(a=1)
    forget(runtime)
    with transaction.atomic():
        run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert Session.objects.count() == 1  # takes the snapshot
        with second_connection() as other:
            newer = SessionStore().encode({"a": 2})
            other.execute(
                "UPDATE deferred_sessions_session SET session_data = %s, version = 2", [newer]
            )
        assert SessionStore(session.session_key).load() == {"a": 1}

    assert SessionStore(session.session_key).load() == {"a": 2}


def test_an_old_snapshot_deletes_nothing(runtime: Runtime) -> None:
    """A row that this transaction cannot see was not deleted by somebody."""
    with transaction.atomic():
        run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert Session.objects.count() == 0
        session = SessionStore()
        with pytest.MonkeyPatch.context() as patch:  # created by another process meanwhile
            patch.setattr(runtime.tiers._write_through, "insert", insert_elsewhere(runtime))
            session["a"] = 1
            session.save()
        log_in(session)

    assert SessionStore(session.session_key).load() == {"a": 1, "_auth_user_id": "7"}
    runtime.flusher.flush_once(time.time() + 61)
    assert row(session.session_key) == {"a": 1, "_auth_user_id": "7"}


def insert_elsewhere(runtime: Runtime) -> Any:
    def insert(record: Any, now: float) -> Any:
        from deferred_sessions import lifecycle

        with second_connection() as other:
            other.execute(
                "INSERT INTO deferred_sessions_session (session_key, session_data, expire_date, "
                "version, fence, owner) VALUES (%s, %s, to_timestamp(%s), 1, 0, %s)",
                [
                    record.key,
                    SessionStore().encode({"a": 1}),
                    record.expires_at,
                    runtime.server.owner(),
                ],
            )
        return lifecycle.written(
            record,
            version=1,
            expires_at=record.expires_at,
            now=now,
            policy=runtime.settings.policy,
        )

    return insert


def test_what_the_transaction_wrote_is_not_kept(runtime: Runtime) -> None:
    """It may roll back: then nobody else must ever have seen it."""
    session = created(a=1)
    forget(runtime)
    with transaction.atomic():
        Session.objects.update(session_data=SessionStore().encode({"a": "never"}))
        assert SessionStore(session.session_key).load() == {"a": "never"}
        transaction.set_rollback(True)

    assert SessionStore(session.session_key).load() == {"a": 1}


def test_a_session_unknown_to_memory_is_saved_in_such_a_transaction(runtime: Runtime) -> None:
    """Its row is older than what the transaction wrote: everybody sees the same."""
    session = created(a=1)
    again = SessionStore(session.session_key)
    assert again["a"] == 1
    forget(runtime)
    with transaction.atomic():
        Group.objects.create(name="anything")
        again["a"] = 2
        again.save()
        assert record(runtime, session).is_dirty

    assert SessionStore(session.session_key).load() == {"a": 2}
    assert runtime.flusher.flush_once(time.time() + 61).updated == 1
    assert row(session.session_key) == {"a": 2}


def test_what_cannot_be_saved_in_a_transaction_is_refused(runtime: Runtime) -> None:
    """Not in memory, and the snapshot is old: nobody can tell what others see."""
    session = created(a=1)
    again = SessionStore(session.session_key)
    assert again["a"] == 1
    forget(runtime)
    with transaction.atomic():
        run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        again["a"] = 2
        with pytest.raises(StoreFullError, match="save it after the transaction"):
            again.save()
    again.save()
    assert SessionStore(session.session_key).load() == {"a": 2}


def test_a_logout_while_the_row_is_being_inserted(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flusher has found a session that PostgreSQL never had; its INSERT is the later one."""
    with transaction.atomic():
        session = created(_auth_user_id="7")
        transaction.set_rollback(True)
    real = runtime.server.insert

    def insert(*arguments: Any) -> int:
        with ThreadPoolExecutor(1) as pool:  # another connection, in another thread
            pool.submit(log_out, session).result()
        return real(*arguments)

    monkeypatch.setattr(runtime.server, "insert", insert)
    now = time.time()
    assert runtime.flusher.flush_once(now, everything=True).inserted == 1
    assert row(session.session_key) is not None

    assert runtime.flusher.flush_once(now + 1).deleted == 1
    assert row(session.session_key) is None
    assert SessionStore(session.session_key).load() == {}


def test_the_same_and_the_flusher_is_killed(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed, and not marked: the deletion is repeated nevertheless."""
    with transaction.atomic():
        session = created(_auth_user_id="7")
        transaction.set_rollback(True)
    found = [Dirty.of(record(runtime, session))]
    log_out(session)
    runtime.server.insert(runtime.flusher._writer.columns(found), time.time())

    assert runtime.flusher.flush_once(time.time() + 61).deleted == 1
    assert row(session.session_key) is None


def log_out(session: SessionStore) -> None:
    SessionStore(session.session_key).delete()
    connection.close()


def test_an_open_transaction_is_not_asked_what_was_revoked(runtime: Runtime) -> None:
    session = created(a=1)
    with transaction.atomic():
        Session.objects.all().delete()
        runtime.flusher.flush_once(time.time())
        transaction.set_rollback(True)

    assert SessionStore(session.session_key).load() == {"a": 1}
