"""Rows that others delete or change: memory hears of it, once and for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.db import connection, transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.lifecycle import REMEMBERED
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from deferred_sessions.servers.rows import Grant
from deferred_sessions.signals import session_revoked
from tests.integration.conftest import change, created, record, row, second_connection

pytestmark = pytest.mark.django_db(transaction=True)


def run(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


@pytest.fixture(autouse=True)
def _listening(runtime: Runtime, transactional_db: None) -> None:
    """A node that has been at work for a while."""
    run("TRUNCATE deferred_sessions_revocation")
    runtime.revocations.read_once(time.time())


@pytest.fixture
def revoked() -> Iterator[list[str]]:
    """Collect what the signal tells."""
    told: list[str] = []

    def hear(session_keys: list[str], **_: Any) -> None:
        told.extend(session_keys)

    session_revoked.connect(hear)
    yield told
    session_revoked.disconnect(hear)


WAYS: dict[str, Callable[[], object]] = {
    "model": lambda: Session.objects.all().delete(),
    "sql": lambda: run("DELETE FROM deferred_sessions_session"),
    "truncate": lambda: run("TRUNCATE deferred_sessions_session"),
    "one by one": lambda: [session.delete() for session in Session.objects.all()],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dirty", [False, True])
def test_a_deleted_row_ends_the_session(
    runtime: Runtime, revoked: list[str], way: str, dirty: bool
) -> None:
    session, other = created(a=1), created(a=2)
    if dirty:
        change(session, a=3)
    WAYS[way]()
    assert runtime.revocations.read_once(time.time()) == 2

    assert SessionStore(session.session_key).load() == {}
    assert sorted(revoked) == sorted([str(session.session_key), str(other.session_key)])
    assert runtime.counters.totals()[Counter.REVOKED] == 2
    runtime.flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) is None
    assert runtime.revocations.read_once(time.time()) == 0


def test_a_changed_row_is_what_the_next_request_sees(runtime: Runtime) -> None:
    """`Session.objects.save(...)`, as tools of other projects do it."""
    session = created(a=1)
    Session.objects.save(session.session_key, {"a": 2}, session.get_expiry_date())
    assert runtime.revocations.read_once(time.time()) == 1

    assert SessionStore(session.session_key).load() == {"a": 2}
    change(session, b=1)
    assert runtime.flusher.flush_once(time.time() + 61).updated == 1
    assert row(session.session_key) == {"a": 2, "b": 1}


def test_a_row_changed_under_unsaved_changes(runtime: Runtime) -> None:
    """Two changed it; PostgreSQL's stands, and the other is counted as void."""
    session = created(a=1)
    change(session, b=1)
    Session.objects.filter(pk=session.session_key).update(
        session_data=SessionStore().encode({"a": 2})
    )
    runtime.revocations.read_once(time.time())

    assert runtime.flusher.flush_once(time.time() + 61).superseded == 1
    assert SessionStore(session.session_key).load() == {"a": 2}


def test_more_at_once_than_are_decoded_at_once(
    runtime: Runtime, revoked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows deleted by SQL: no request waits while all of them are decoded."""
    decoded: list[int] = []
    fetchmany = psycopg.Cursor.fetchmany

    def fetch(cursor: psycopg.Cursor[Any], size: int = 0) -> list[Any]:
        rows = fetchmany(cursor, size)
        decoded.append(len(rows))
        return rows

    monkeypatch.setattr("deferred_sessions.servers.connection.AT_ONCE", 2)
    sessions = [created(n=number) for number in range(5)]
    run("DELETE FROM deferred_sessions_session")
    monkeypatch.setattr(psycopg.Cursor, "fetchmany", fetch)
    assert runtime.revocations.read_once(time.time()) == 5
    assert max(decoded) == 2
    assert sum(decoded) >= 5
    assert sorted(revoked) == sorted(session.session_key for session in sessions)


def test_what_we_write_and_delete_is_no_news(runtime: Runtime, revoked: list[str]) -> None:
    """Neither flushes, nor touches, nor logouts of this node."""
    session, gone = created(a=1), created(a=1)
    change(session, a=2)
    runtime.flusher.flush_once(time.time() + 61)
    runtime.store.update(
        session.session_key or "",
        lambda r: r and r._replace(flags=2, due_at=1.0, expires_at=r.expires_at + 9),
    )
    assert runtime.flusher.flush_once(time.time()).touched == 1
    gone.delete()

    assert runtime.revocations.read_once(time.time()) == 0
    assert revoked == []


def test_our_logout_does_not_hide_a_deletion_beside_it(runtime: Runtime) -> None:
    """In one transaction: the trigger must not take theirs for ours."""
    session, other = created(a=1), created(a=1)
    with transaction.atomic():
        session.delete()
        Session.objects.all().delete()

    assert runtime.revocations.read_once(time.time()) == 1
    assert SessionStore(other.session_key).load() == {}


def test_what_expired_is_no_news(runtime: Runtime) -> None:
    session = created(a=1)
    run("UPDATE deferred_sessions_session SET expire_date = '2020-01-01', written_at = now()")
    runtime.store.clear()
    call_command("clearsessions")

    assert row(session.session_key) is None
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM deferred_sessions_revocation")
        assert cursor.fetchone() == (0,)


def test_a_transaction_that_is_overtaken_is_not_missed(runtime: Runtime) -> None:
    """Its number is lower than one that was read already."""
    first, second = created(a=1), created(a=2)
    with second_connection() as other:
        other.execute("BEGIN")
        other.execute(
            "DELETE FROM deferred_sessions_session WHERE session_key = %s", [first.session_key]
        )
        Session.objects.filter(pk=second.session_key).delete()
        assert runtime.revocations.read_once(time.time()) == 1
        assert runtime.revocations.read_once(time.time()) == 0
        assert SessionStore(first.session_key).load() == {"a": 1}
        other.execute("COMMIT")

    assert runtime.revocations.read_once(time.time()) == 1
    assert SessionStore(first.session_key).load() == {}


def test_a_deletion_that_rolls_back(runtime: Runtime) -> None:
    session = created(a=1)
    with transaction.atomic():
        Session.objects.all().delete()
        transaction.set_rollback(True)

    assert runtime.revocations.read_once(time.time()) == 0
    assert SessionStore(session.session_key).load() == {"a": 1}


def test_a_node_that_was_away_for_long_reads_everything_anew(runtime: Runtime) -> None:
    """What it missed may have been removed meanwhile: what is gone was deleted."""
    clean, dirty = created(a=1), created(a=1)
    change(dirty, a=2)
    Session.objects.filter(pk=clean.session_key).delete()
    later = time.time() + 2 * REMEMBERED
    runtime.revocations.prune(later)
    runtime.revocations.read_once(later)

    assert SessionStore(clean.session_key).load() == {}
    assert record(runtime, dirty).is_dirty


def test_truncate_ends_what_is_on_its_way_and_not_what_comes_after(
    tune: Callable[..., Runtime],
) -> None:
    """Everybody out; who comes back then is in."""
    runtime = tune(WRITE_ON_CREATE=False)
    runtime.revocations.read_once(time.time())
    before = created(a=1)
    run("TRUNCATE deferred_sessions_session")
    after = created(a=1)
    runtime.revocations.read_once(time.time())

    assert SessionStore(before.session_key).load() == {}
    assert SessionStore(after.session_key).load() == {"a": 1}


def test_a_session_created_in_a_transaction_does_not_come_back(runtime: Runtime) -> None:
    """Memory does not know that its row was there, but whoever deleted it does."""
    with transaction.atomic():
        session = created(a=1)
    Session.objects.filter(pk=session.session_key).delete()
    runtime.flusher.flush_once(time.time() + 61)

    assert SessionStore(session.session_key).load() == {}
    assert row(session.session_key) is None


def test_a_load_under_way_does_not_keep_a_deleted_row(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the row; then the row is deleted, and the node hears of it."""
    session = created(a=1)
    runtime.store.clear()
    real = runtime.leases.acquire

    def acquire(key: str, **options: bool) -> Grant:
        found = real(key, **options)
        if found.row is not None:
            Session.objects.all().delete()
            runtime.revocations.read_once(time.time())
        return found

    monkeypatch.setattr(runtime.leases, "acquire", acquire)
    SessionStore(session.session_key).load()
    monkeypatch.undo()

    assert SessionStore(session.session_key).load() == {}


@pytest.mark.parametrize(("ours", "theirs"), [(3, 1), (1, 2)])
def test_a_foreign_change_outdoes_all_unsaved_ones(
    runtime: Runtime, ours: int, theirs: int
) -> None:
    session = created(a=1)
    for number in range(ours):
        change(session, b=number)
    for number in range(theirs):
        Session.objects.update(session_data=SessionStore().encode({"a": f"theirs {number}"}))
    runtime.revocations.read_once(time.time())

    assert runtime.flusher.flush_once(time.time()).superseded == 1
    assert row(session.session_key) == {"a": f"theirs {theirs - 1}"}
    assert SessionStore(session.session_key).load() == {"a": f"theirs {theirs - 1}"}


def test_a_row_that_gets_another_key(runtime: Runtime) -> None:
    session = created(a=1)
    run("UPDATE deferred_sessions_session SET session_key = repeat('x', 32)")
    runtime.revocations.read_once(time.time())

    assert SessionStore(session.session_key).load() == {}
    assert SessionStore("x" * 32).load() == {"a": 1}


# Another server answers: it was exchanged or started anew


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> Callable[[], None]:
    """Have another server process answer from now on."""
    real = runtime.server.revocations

    def revocations(since: int) -> Any:
        return real(since)._replace(server="the standby")

    return lambda: monkeypatch.setattr(runtime.server, "revocations", revocations)


def test_a_failover_that_lost_commits(
    runtime: Runtime, exchange: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A creation, and a flush: memory has both, and writes both again."""
    forgotten, outdated, fine = created(a=1), created(a=1), created(a=1)
    with connection.cursor() as cursor:
        cursor.execute("SET session_replication_role = replica")  # no triggers
        Session.objects.filter(pk=forgotten.session_key).delete()
        cursor.execute("SET session_replication_role = DEFAULT")
    change(outdated, a=2)
    runtime.flusher.flush_once(time.time() + 61)
    data = SessionStore().encode({"a": 1})
    Session.objects.filter(pk=outdated.session_key).update(session_data=data, version=1)
    run("TRUNCATE deferred_sessions_revocation")
    exchange()

    report = runtime.flusher.flush_once(time.time() + 62)

    assert (report.inserted, report.updated) == (1, 1)
    assert row(forgotten.session_key) == {"a": 1}
    assert row(outdated.session_key) == {"a": 2}
    assert "of the 3 sessions in memory, 2 are not" in caplog.text
    assert not record(runtime, fine).is_dirty
    assert runtime.flusher.flush_once(time.time() + 63).rows == 0


def test_a_failover_does_not_bring_back_what_was_deleted(
    runtime: Runtime, exchange: Callable[[], None]
) -> None:
    """The deletion got through, and its record, too."""
    session = created(a=1)
    Session.objects.all().delete()
    exchange()
    runtime.flusher.flush_once(time.time())

    assert SessionStore(session.session_key).load() == {}
    assert row(session.session_key) is None


def test_a_row_that_is_lost_without_a_failover_is_written_anew(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    """Found when it is flushed: nobody deleted it, and it is not there."""
    session = created(a=1)
    change(session, a=2)
    run("SET session_replication_role = replica")
    Session.objects.all().delete()
    run("SET session_replication_role = DEFAULT")

    assert runtime.flusher.flush_once(time.time() + 61).inserted == 1
    assert row(session.session_key) == {"a": 2}
    assert "lost 1 sessions that it had confirmed" in caplog.text


def test_the_poller_reads_them_too(runtime: Runtime) -> None:
    """At the next tick, without an agent."""
    session = created(a=1)
    Session.objects.all().delete()
    runtime.flusher.flush_once(time.time())

    assert SessionStore(session.session_key).load() == {}


def test_old_ones_are_removed(runtime: Runtime) -> None:
    created(a=1)
    Session.objects.all().delete()
    runtime.flusher.clear_expired(time.time())
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM deferred_sessions_revocation")
        assert cursor.fetchone() == (1,)
        runtime.revocations.prune(time.time() + REMEMBERED + 60)
        cursor.execute("SELECT count(*) FROM deferred_sessions_revocation")
        assert cursor.fetchone() == (0,)
