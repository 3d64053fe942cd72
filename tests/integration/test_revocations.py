"""Rows that others delete or change: memory hears of it, once and for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection, transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.revocations import LIFETIME
from deferred_sessions.runtime import Runtime
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
    """What it missed may have been removed meanwhile; unsaved changes are kept."""
    clean, dirty = created(a=1), created(a=1)
    change(dirty, a=2)
    Session.objects.filter(pk=clean.session_key).delete()
    later = time.time() + 2 * LIFETIME
    runtime.revocations.prune(later)
    runtime.revocations.read_once(later)

    assert runtime.store.get(clean.session_key or "") is None
    assert record(runtime, dirty).is_dirty


def test_a_session_that_postgresql_never_had_is_left_alone(
    tune: Callable[..., Runtime],
) -> None:
    """Created while it was away, say: TRUNCATE cannot have meant that one."""
    runtime = tune(WRITE_ON_CREATE=False)
    runtime.revocations.read_once(time.time())
    session = created(a=1)
    run("TRUNCATE deferred_sessions_session")
    runtime.revocations.read_once(time.time())

    assert SessionStore(session.session_key).load() == {"a": 1}


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
        runtime.revocations.prune(time.time() + LIFETIME + 60)
        cursor.execute("SELECT count(*) FROM deferred_sessions_revocation")
        assert cursor.fetchone() == (0,)
