"""Leases when several things go wrong at once: power cuts, late awakenings, held rows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import SessionBusy
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.pulse import moment
from deferred_sessions.models import RefusedWrite, Session
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime
from deferred_sessions.servers import sql
from deferred_sessions.servers.rows import Answer, Columns
from deferred_sessions.servers.server import SessionServer
from tests.integration.conftest import change, created, row, second_connection
from tests.integration.test_leases import (
    KEY,
    NOW,
    _empty_queue,  # noqa: F401 - a fixture
    as_node,  # noqa: F401 - a fixture
    granted_to,
    insert,
    kill,
    let_go,
    named,
)

pytestmark = pytest.mark.django_db(transaction=True)
AsNode = Callable[..., Runtime]


def wait_for(node: str, *sessions: SessionStore) -> None:
    """Stand in the queues of these sessions, whatever holds their rows."""
    with connection.cursor() as cursor:
        for session in sessions:
            cursor.execute(
                "INSERT INTO deferred_sessions_waiter (session_key, node) VALUES (%s, %s)",
                [session.session_key, node],
            )


def taken_over(as_node: AsNode, session: SessionStore, times: int = 1, **values: Any) -> None:  # noqa: F811
    """Have node b take over from a, change the session so often, write it, and let go."""
    a = as_node("a")
    a.membership.beat_once(time.time())
    kill(a)
    b, key = as_node("b"), session.session_key or ""
    for _ in range(times):
        change(session, **{**values, "turn": time.time()})
    b.flusher.flush_once(time.time(), everything=True)
    named(b.server.owner()).release({key: granted_to(key)[1]})
    b.store.update(key, lambda _: None)
    as_node("a")


@pytest.mark.parametrize("changes", [0, 1, 9])
@pytest.mark.parametrize("first", ["load", "flush"])
def test_power_is_lost_and_others_take_over(
    as_node: AsNode,  # noqa: F811
    tmp_path: Path,
    changes: int,
    first: str,
) -> None:
    """What the journal had is refused and kept if others took over; whoever comes first."""
    journal = {"JOURNAL_DIRECTORY": str(tmp_path / "journal"), "JOURNAL_SIZE": 1 << 20}
    as_node("a", **journal)
    session = created(n=1)
    for number in range(4):
        change(session, mine=number)
    a = as_node("a", **journal)
    a.membership.beat_once(time.time())
    if changes:
        kill(a)
    reset_runtime()
    shutil.rmtree(tmp_path / "a")
    if changes:
        b, key = as_node("b"), session.session_key or ""
        for number in range(changes):
            change(session, b=number)
        b.flusher.flush_once(time.time(), everything=True)
        named(b.server.owner()).release({key: granted_to(key)[1]})
    a = as_node("a", **journal)
    a.membership.beat_once(time.time())
    expected = {"n": 1, "b": changes - 1} if changes else {"n": 1, "mine": 3}
    if first == "load":
        assert SessionStore(session.session_key).load() == expected
    a.flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) == expected
    assert RefusedWrite.objects.count() == bool(changes)
    assert SessionStore(session.session_key).load() == expected


@pytest.mark.parametrize("is_atomic", [False, True], ids=["", "in a transaction"])
@pytest.mark.parametrize("beat_ago", [60.0, -86_400.0], ids=["slept", "of an earlier boot"])
def test_nobody_serves_before_the_node_has_asked(
    as_node: AsNode,  # noqa: F811
    is_atomic: bool,
    beat_ago: float,
) -> None:
    as_node("a")
    session = created(n=1)
    taken_over(as_node, session, n=2)
    get_runtime().pulse.beat(moment() - beat_ago)
    if is_atomic:
        with transaction.atomic():
            found = SessionStore(session.session_key).load()
    else:
        found = SessionStore(session.session_key).load()
    assert found["n"] == 2


def test_a_clock_that_was_set_back_holds_up_nothing(as_node: AsNode) -> None:  # noqa: F811
    a = as_node("a")
    session = created(n=1)
    named("b#1").acquire(session.session_key or "")
    assert not a.handover.release_once(time.time() - 3600)
    assert granted_to(session.session_key or "") == ("b#1", 1)


@pytest.mark.parametrize("is_dirty", [False, True], ids=["clean", "dirty"])
def test_a_held_row_holds_up_no_other(as_node: AsNode, is_dirty: bool) -> None:  # noqa: F811
    a = as_node("a")
    one, two = created(n=1), created(n=2)
    if is_dirty:
        change(one, n=5)
        change(two, n=6)
    with second_connection() as other, other.transaction():
        other.execute(
            "SELECT * FROM deferred_sessions_session WHERE session_key = %s FOR UPDATE",
            [one.session_key],
        )
        wait_for("b#1", one, two)
        for _ in range(2):
            let_go(a)
        assert granted_to(two.session_key or "") == ("b#1", 1)
        assert granted_to(one.session_key or "") == (a.server.owner(), 0)
    assert not let_go(a)
    assert granted_to(one.session_key or "") == ("b#1", 1)
    assert a.store.handing_over() == {}


def test_refused_once_also_within_a_transaction(as_node: AsNode) -> None:  # noqa: F811
    as_node("a")
    session = change(created(n=1), mine=True)
    taken_over(as_node, session, n=3)
    a = get_runtime()
    a.membership.beat_once(time.time())
    with transaction.atomic():
        assert SessionStore(session.session_key).load()["n"] == 3
        transaction.set_rollback(True)
    a.flusher.flush_once(time.time(), everything=True)
    assert RefusedWrite.objects.count() == 1
    assert a.counters.totals()[Counter.FENCED] == 1


def test_what_was_written_and_handed_over_meanwhile_is_not_refused(
    as_node: AsNode,  # noqa: F811
) -> None:
    """A flusher had read the record before."""
    a = as_node("a")
    session = change(created(n=1), mine=True)
    key = session.session_key or ""
    batch = a.store.find_dirty([key])
    named("b#1").acquire(key)
    let_go(a)
    found, theirs = Session.objects.get(pk=key), SessionStore().encode({"b": 1})
    columns = Columns([key], [theirs], [NOW], [found.version + 1], [found.fence], [""], [NOW])
    SessionServer("default", owner=lambda: "b#1").update(columns, NOW)
    a.flusher._runs(time.time()).write(batch)
    assert not RefusedWrite.objects.exists()
    assert row(key) == {"b": 1}


def test_who_comes_back_to_the_queue_stands_at_its_end() -> None:
    """A grant that nobody fetched leaves no place in the next queue."""
    first, second, third = named("a#1"), named("b#1"), named("c#1")
    insert("a#1")
    second.acquire(KEY)
    first.release({KEY: 0})
    third.acquire(KEY)
    second.release({KEY: 1})
    assert third.acquire(KEY, waits=True).answer is Answer.GRANTED
    first.acquire(KEY)
    second.acquire(KEY)
    third.release({KEY: 2})
    assert granted_to()[0] == "a#1"


def test_a_dead_waiter_inherits_nothing() -> None:
    insert("a#1")
    second, third = named("b#1"), named("c#1")
    second.beat({}, "join")
    second.acquire(KEY)
    third.acquire(KEY)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE deferred_sessions_node SET died_at = now() WHERE node = 'b#1'")
    named("a#1").release({KEY: 0})
    assert granted_to() == ("c#1", 1)


def test_who_joins_ends_its_earlier_incarnations() -> None:
    named("a#1").beat({}, "join")
    assert [beat.node for beat in named("a#2").beat({}, "join")] == ["a#2"]
    assert {beat.node: beat.is_dead for beat in named("a#1").beat({})}["a#1"]


def test_persist_under_an_old_fence_is_an_error(as_node: AsNode) -> None:  # noqa: F811
    as_node("a")
    session = created(n=1)
    again = SessionStore(session.session_key)
    again.load()
    taken_over(as_node, session, n=2)
    again["mine"] = True
    with pytest.raises(SessionBusy, match="has passed to another node"):
        again.persist()


def test_a_lock_does_not_trust_what_is_doubtful(as_node: AsNode) -> None:  # noqa: F811
    as_node("a")
    session = created(n=1)
    mine = SessionStore(session.session_key)
    mine.load()
    taken_over(as_node, session, n=2)
    get_runtime().membership.beat_once(time.time())
    with mine.lock("n"):
        assert mine["n"] == 2


def test_requests_are_looked_up_not_searched_for() -> None:
    """A node asks for them all the time; the table may have millions of rows."""
    insert("a#1")
    with connection.cursor() as cursor:
        statement = sql.REQUESTED.replace("%b", "%s")
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(f"EXPLAIN {statement}", ["a#1"] * 3)
        plan = "\n".join(line for (line,) in cursor.fetchall())
        cursor.execute("RESET enable_seqscan")
    assert "Index Cond: ((session_key)::text = ANY" in plan or "Index Cond: (session_key" in plan
