"""What keeps writes of the wrong node away, each guard by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import SessionBusy
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from deferred_sessions.servers.rows import Answer, Columns
from deferred_sessions.servers.server import SessionServer
from tests.integration.conftest import change, created, row, second_connection
from tests.integration.test_full_store import fill
from tests.integration.test_leases import (
    KEY,
    NOW,
    _empty_queue,  # noqa: F401 - a fixture
    as_node,  # noqa: F401 - a fixture
    granted_to,
    insert,
    named,
    waiters,
)
from tests.processes.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True)
AsNode = Callable[..., Runtime]
OWNERS = [
    ("a#2", 5, True),  # its own
    ("a#1", 5, True),  # of its earlier incarnation
    (None, 5, True),
    ("b#1", 4, True),  # the row is behind: a failover forgot that this node was given the lease
    ("b#1", 5, False),  # and gave the same fence to another
    ("ab#1", 5, False),  # whose name only begins like this one's
    ("a#2", 6, False),
]


@pytest.mark.parametrize(("owner", "fence", "is_taken"), OWNERS)
@pytest.mark.parametrize("statement", ["update", "touch"])
def test_who_may_write(owner: str | None, fence: int, is_taken: bool, statement: str) -> None:
    """Node a, under fence 5."""
    insert(owner)
    Session.objects.update(fence=fence, version=1)
    before = Session.objects.get()
    version = 2 if statement == "update" else 1
    server = SessionServer("default", owner=lambda: "a#2")
    columns = Columns([KEY], ["new"], [NOW + 9e6], [version], [5], [""], [NOW])
    assert getattr(server, statement)(columns, NOW) == is_taken
    after = Session.objects.get()
    if is_taken:
        assert (after.owner, after.fence) == ("a#2", 5)
        assert after.expire_date.timestamp() == NOW + 9e6
    else:
        assert (after.owner, after.expire_date) == (before.owner, before.expire_date)
    assert after.session_data == ("new" if is_taken and statement == "update" else "x")


@pytest.mark.parametrize(
    ("owner", "is_known"),
    [(None, False), ("b#1", False), ("b#1", True)],
    ids=["free", "another node's", "another node's, in memory"],
)
def test_a_save_past_memory_needs_the_lease(
    as_node: AsNode,  # noqa: F811
    owner: str | None,
    is_known: bool,
) -> None:
    """The store is full; memory has forgotten the session, or has it and may not have the lease."""
    a = as_node("a", STORE_SIZE=4 << 20)
    session = created(a="x")
    key = session.session_key or ""
    if is_known:
        change(session, b="PostgreSQL lacks it, so it is not evicted")
    again = SessionStore(key)
    again["a"] = "y" * 5000
    fence = 0 if is_known else 3
    if not is_known:
        a.store.update(key, lambda _: None)
    Session.objects.update(owner=owner, fence=fence + (owner is not None))
    fill(a)
    if owner is None:
        again.save()
        assert granted_to(key) == (a.server.owner(), fence + 1)
        assert row(key) == {"a": "y" * 5000}
    else:
        with pytest.raises(SessionBusy, match="Node b has held on to the session"):
            again.save()
        assert a.counters.totals()[Counter.LEASE_WAITS] == 1
        assert granted_to(key) == (owner, fence + 1)
        assert row(key) == {"a": "x"}


def test_who_asks_waits_for_who_is_letting_go() -> None:
    """Its place in the queue would not be seen any more; so it looks again."""
    insert("a#1")
    found: list[Answer] = []

    def ask() -> None:
        found.append(named("b#1").acquire(KEY).answer)
        connection.close()

    thread = threading.Thread(target=ask)
    with second_connection() as other, second_connection() as third:
        with other.transaction():
            release = "SELECT * FROM deferred_sessions_release('a#1', %s, %s::bigint[], 0)"
            assert other.execute(release, [[KEY], [0]]).fetchall() == [(KEY, True)]
            thread.start()
            blocked = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
            pid = [other.info.backend_pid]
            wait_until(lambda: found or third.execute(blocked, pid).fetchall(), what="the question")
            assert not found
        thread.join()
    assert found == [Answer.AGAIN]
    assert waiters() == []
    assert named("b#1").acquire(KEY).answer is Answer.GRANTED


def test_a_row_read_while_it_was_given_up_is_not_kept(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read when the session had left memory already, and the lease had not been passed on yet."""
    a = as_node("a")
    session = created(n=1)
    key = session.session_key or ""
    named("b#1").acquire(key)
    assert a.store.hand_over({key: 0}, 9e9) == [key]  # and then the agent died
    real = a.server.read

    def read(key: str) -> Any:
        found = real(key)
        monkeypatch.undo()
        with second_connection() as other:  # the next agent, in another process
            other.execute(
                "SELECT * FROM deferred_sessions_release(%s, %s, %s::bigint[], 0)",
                [a.server.owner(), [key], [0]],
            )
        a.store.handed_over({key: 0})
        return found

    monkeypatch.setattr(a.server, "read", read)
    with transaction.atomic(), pytest.raises(SessionBusy):
        SessionStore(key).load()
    assert a.store.head(key) is None
    assert granted_to(key) == ("b#1", 1)


def test_c06_a_row_that_is_held_for_a_moment_is_passed_on_at_once(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C06: who asks for a lease holds its row; who waits must not wait until it asks again."""
    a = as_node("a")
    session = created(n=1)
    key = session.session_key or ""
    named("b#1").acquire(key)
    with second_connection() as other:
        other.execute("BEGIN")
        other.execute("SELECT 1 FROM deferred_sessions_session FOR KEY SHARE")
        monkeypatch.setattr(
            "deferred_sessions.handover.time.sleep", lambda _: other.execute("COMMIT")
        )
        a.handover.release_once(time.time() + 1)
    assert granted_to(key) == ("b#1", 1)
