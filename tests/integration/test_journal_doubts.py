"""What a journal has may be old: what is deleted stays so; and a disk that fails stops nobody."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory import journal
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.models import RefusedWrite
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime
from deferred_sessions.servers import sql
from deferred_sessions.servers.server import SessionServer
from tests.integration.conftest import Outage, change, created, row, second_connection

pytestmark = pytest.mark.django_db(transaction=True)
DAY = 86_400.0


@pytest.fixture
def journaled(tune: Callable[..., Runtime], tmp_path: Path) -> Callable[..., Runtime]:
    def make(**settings: Any) -> Runtime:
        directory = str(tmp_path / "journal")
        return tune(JOURNAL_DIRECTORY=directory, JOURNAL_SIZE=1 << 20, **settings)

    return make


def lose_power(directory: Path) -> Runtime:
    """All processes end, and shared memory is gone."""
    reset_runtime()
    shutil.rmtree(directory)
    return get_runtime()


def refuse(*_: object) -> int:
    raise OSError(errno.EROFS, "Read-only file system")


def by_sql(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def delete(session: SessionStore, how: str) -> None:
    """Have the session deleted such that the journal hears nothing of it."""
    if how == "by SQL":
        by_sql("DELETE FROM deferred_sessions_session")
        get_runtime().flusher.flush_once(time.time())
    else:
        assert get_runtime().store.evict(10)
        SessionStore(session.session_key).delete()


def be_away_for_days(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lose power, and come back when nobody remembers any more who was deleted meanwhile."""
    reset_runtime()
    shutil.rmtree(directory)
    by_sql("DELETE FROM deferred_sessions_session")
    by_sql("DELETE FROM deferred_sessions_revocation")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 2 * DAY)


# Deleted sessions


@pytest.mark.parametrize("how", ["by SQL", "evicted"])
@pytest.mark.parametrize("is_flushed", [True, False])
def test_a_session_that_the_journal_knows_as_new_stays_deleted(
    journaled: Callable[..., Runtime], directory: Path, how: str, is_flushed: bool
) -> None:
    """It was written, and deleted, since; an insert would bring a login back."""
    runtime = journaled(WRITE_ON_CREATE=False)
    session = created(_auth_user_id="7")
    runtime.flusher.flush_once(time.time(), everything=True)
    delete(session, how)
    runtime = lose_power(directory)
    if is_flushed:
        report = runtime.flusher.flush_once(time.time())
        assert (report.inserted, report.vanished) == (0, 1)
    assert SessionStore(session.session_key).load() == {}
    assert row(session.session_key) is None


def test_a_new_session_outlives_an_earlier_end_of_all(
    journaled: Callable[..., Runtime], directory: Path
) -> None:
    """A TRUNCATE ends what was there."""
    journaled(WRITE_ON_CREATE=False)
    by_sql("TRUNCATE deferred_sessions_session")
    session = created(n=1)
    report = lose_power(directory).flusher.flush_once(time.time())
    assert (report.inserted, report.remaining) == (1, 0)
    assert row(session.session_key) == {"n": 1}


def test_a_host_that_was_off_for_days_brings_nothing_back(
    journaled: Callable[..., Runtime], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody remembers that the session was deleted on another host meanwhile."""
    runtime = journaled()
    session = created(_auth_user_id="7")
    change(session, n=1)
    runtime.flusher.flush_once(time.time(), everything=True)
    be_away_for_days(directory, monkeypatch)
    report = get_runtime().flusher.flush_once(time.time())
    assert (report.inserted, report.remaining) == (0, 0)
    assert row(session.session_key) is None
    assert SessionStore(session.session_key).load() == {}


def save_while_away(session: SessionStore, outage: Outage) -> None:
    """What the journal had is all there is, and goes on."""
    outage.begin()
    change(session, n=1)
    outage.end()
    get_runtime().flusher.flush_once(time.time(), everything=True)


def test_a_save_while_postgresql_is_away_leaves_the_doubt(
    journaled: Callable[..., Runtime], directory: Path, outage: Outage
) -> None:
    """A rack lost power, and PostgreSQL is the last to be back."""
    runtime = journaled(WRITE_ON_CREATE=False)
    session = created(_auth_user_id="7")
    runtime.flusher.flush_once(time.time(), everything=True)
    delete(session, "by SQL")
    lose_power(directory)
    save_while_away(session, outage)
    assert row(session.session_key) is None


def test_so_it_does_on_a_host_that_was_off_for_days(
    journaled: Callable[..., Runtime],
    directory: Path,
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = journaled()
    session = created(_auth_user_id="7")
    change(session, n=0)
    runtime.flusher.flush_once(time.time(), everything=True)
    be_away_for_days(directory, monkeypatch)
    get_runtime().store.open()
    save_while_away(session, outage)
    assert row(session.session_key) is None


@pytest.mark.parametrize("is_new", [True, False])
def test_a_session_deleted_while_the_disk_was_broken(
    journaled: Callable[..., Runtime],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_new: bool,
) -> None:
    """PostgreSQL alone remembers it, also of a session that it has never had."""
    journaled(WRITE_ON_CREATE=not is_new)
    session = created(_auth_user_id="7")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        SessionStore(session.session_key).delete()
        assert SessionStore(session.session_key).load() == {}
    lose_power(directory).flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) is None
    assert SessionStore(session.session_key).load() == {}


def test_a_new_session_is_deleted_while_its_row_is_on_its_way(
    journaled: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the disk is broken: memory knows of the deletion all the same, and repeats it."""
    runtime = journaled(WRITE_ON_CREATE=False)
    session = created(_auth_user_id="7")
    real = SessionServer.insert

    def log_out() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", refuse)
            SessionStore(session.session_key).delete()
        connection.close()

    def slow(*arguments: Any) -> int:
        monkeypatch.setattr(SessionServer, "insert", real)
        other = threading.Thread(target=log_out)
        other.start()
        other.join()
        return real(*arguments)

    monkeypatch.setattr(SessionServer, "insert", slow)
    runtime.flusher.flush_once(time.time(), everything=True)
    runtime.flusher.flush_once(time.time() + 100, everything=True)
    assert SessionStore(session.session_key).load() == {}
    assert row(session.session_key) is None


def test_two_processes_have_the_same_session_judged(
    journaled: Callable[..., Runtime], directory: Path
) -> None:
    """For the second one it has gone on since, under a new lease: there is nothing to refuse."""
    journaled()
    session = created(n=0)
    change(session, n=1)
    runtime = lose_power(directory)
    known = runtime.store.get(str(session.session_key))
    assert known is not None
    stale, writer = Dirty.of(known), runtime.flusher._writer
    assert len(writer.write([stale], time.time()).updated) == 1
    change(session, n=2)
    by_sql("UPDATE deferred_sessions_session SET fence = fence + 1, version = version + 1")
    outcome = writer.write([stale], time.time())
    assert (outcome.fenced, outcome.moved) == ([], [stale])
    assert SessionStore(session.session_key).load() == {"n": 2}


def test_a_session_saved_past_a_full_journal(
    journaled: Callable[..., Runtime], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal had of it is older than the row: it is no change that got lost."""
    journaled()
    session = created(n=0)
    change(session, n=1)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "GROWTH", 0)
        change(session, n=1, ballast="x" * 200)
        change(session, n=2)
        assert get_runtime().counters.totals()[Counter.STORE_FULL] == 2
    now = {"n": 2, "ballast": "x" * 200}
    runtime = lose_power(directory)
    runtime.flusher.flush_once(time.time(), everything=True)
    assert SessionStore(session.session_key).load() == row(session.session_key) == now
    counted = runtime.counters.totals()
    assert (counted[Counter.SUPERSEDED], counted[Counter.FENCED]) == (0, 0)
    assert not RefusedWrite.objects.exists()


def test_what_was_revoked_is_found_among_many(journaled: Callable[..., Runtime]) -> None:
    """By one look at them, not one for each session: nobody has an index for that."""
    server = journaled().server
    by_sql("DELETE FROM deferred_sessions_revocation")
    by_sql(
        "INSERT INTO deferred_sessions_revocation (session_key) "
        "SELECT 'revoked' || n FROM generate_series(1, 1000) n"
    )
    asked = {f"new{number}": time.time() + 60 for number in range(5)} | {"revoked7": 0.0}
    assert server.revoked_since(asked) == server.revoked(asked) == {"revoked7"}
    with connection.cursor() as cursor:
        keys = [*asked]
        parameters = [keys, [*asked.values()], keys]
        cursor.execute(f"EXPLAIN (FORMAT TEXT) {sql.REVOKED_SINCE}".replace("%b", "%s"), parameters)
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "hashed SubPlan" in plan or "Hash" in plan, plan
    by_sql("DELETE FROM deferred_sessions_revocation")


# Hosts with another name


@pytest.mark.parametrize("how", ["flushed", "loaded"])
def test_a_container_that_is_made_anew(
    journaled: Callable[..., Runtime], directory: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its host name is another; the journal, on a volume, tells under which it had its leases."""
    journaled()
    session = created(n=0)
    change(session, n=1)
    name = get_runtime().fleet.owner().partition("#")[0]
    was = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "anew", *was[2:])))
    runtime = lose_power(directory)
    if how == "flushed":
        report = runtime.flusher.flush_once(time.time())
        assert (report.rows, report.fenced, report.remaining) == (1, 0, 0)
        assert row(session.session_key) == {"n": 1}
    assert SessionStore(session.session_key).load() == {"n": 1}
    assert runtime.fleet.owner().startswith(f"{name}#")


# Disks that take nothing


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(os, "pwrite", refuse)


def test_visitors_notice_no_broken_disk(
    journaled: Callable[..., Runtime], broken_disk: Callable[[], None]
) -> None:
    """While PostgreSQL is there it takes saves, logins and logouts."""
    journaled()
    visitor, member = created(n=0), created(_auth_user_id="7")
    broken_disk()
    change(visitor, n=1)
    assert row(visitor.session_key) == {"n": 1}
    session = SessionStore(visitor.session_key)
    session.cycle_key()
    session["_auth_user_id"] = "8"
    session.save()
    assert row(visitor.session_key) is None
    assert row(session.session_key) == {"n": 1, "_auth_user_id": "8"}
    SessionStore(member.session_key).delete()
    assert row(member.session_key) is None
    assert SessionStore(member.session_key).load() == {}


@contextmanager
def refused(session: SessionStore) -> Iterator[None]:
    """PostgreSQL refuses whatever changes this session."""
    table = "ALTER TABLE deferred_sessions_session"
    check = f"session_key <> '{session.session_key}' OR version < 2"
    by_sql(f"{table} ADD CONSTRAINT poison CHECK ({check})")
    try:
        yield
    finally:
        connection.close()
        by_sql(f"{table} DROP CONSTRAINT poison")


def test_a_broken_disk_and_a_session_that_is_refused(
    journaled: Callable[..., Runtime], broken_disk: Callable[[], None]
) -> None:
    """The refused one cannot be put off; all others are written nevertheless."""
    runtime = journaled(BATCH_SIZE=2)
    bad, *good = sorted((created(n=0) for _ in range(6)), key=lambda s: str(s.session_key))
    change(bad, n="poison" * 20)
    for session in good:
        change(session, n=1)
    with refused(bad):
        broken_disk()
        report = runtime.flusher.flush_once(time.time() + 1000)
        assert (report.updated, report.set_aside, report.remaining) == (5, 1, 1)
    assert [row(session.session_key) for session in good] == [{"n": 1}] * 5


def test_a_recovered_session_that_is_refused_is_served(
    journaled: Callable[..., Runtime], directory: Path
) -> None:
    """As before the crash."""
    journaled()
    session = created(n=0)
    change(session, n=1)
    with refused(session):
        lose_power(directory)
        assert SessionStore(session.session_key).load() == {"n": 1}


def test_a_recovered_session_whose_row_is_locked_is_served(
    journaled: Callable[..., Runtime], directory: Path
) -> None:
    journaled()
    session = created(n=0)
    change(session, n=1)
    lose_power(directory)
    with second_connection() as other, other.transaction():
        other.execute("SELECT FROM deferred_sessions_session FOR UPDATE")
        assert SessionStore(session.session_key).load() == {"n": 1}


def test_a_strict_save_of_a_session_that_is_dirty_already(
    journaled: Callable[..., Runtime],
) -> None:
    journaled(SYNC_INTERVAL=0)
    session = created(n=0)
    for n in range(1, 4):
        change(session, n=n)
        log = get_runtime().store.journal
        assert log is not None
        assert not log.unsynced()


def test_a_logout_that_postgresql_has_needs_no_disk(
    journaled: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SYNC_INTERVAL 0 each save waits for it; a deletion is in PostgreSQL already."""
    journaled(SYNC_INTERVAL=0)
    session = created(n=0)
    change(session, n=1)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    SessionStore(session.session_key).delete()
    assert row(session.session_key) is None
