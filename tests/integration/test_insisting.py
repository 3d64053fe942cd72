"""A session that requests change all the time is given up all the same, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from django.db import connection

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError, SessionBusy
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.record import SHUT
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import change, created, record, row
from tests.integration.test_leases import (
    _empty_queue,  # noqa: F401 - a fixture
    as_node,  # noqa: F401 - a fixture
    granted_to,
    let_go,
    named,
)

pytestmark = pytest.mark.django_db(transaction=True)
AsNode = Callable[..., Runtime]


def after_each_write(runtime: Runtime, patch: pytest.MonkeyPatch, work: Callable[[], Any]) -> None:
    """Have a request be faster than the agent each time it has flushed."""
    real = runtime.handover._writer.write

    def write(batch: Sequence[Dirty], now: float) -> Any:
        outcome = real(batch, now)
        work()
        return outcome

    patch.setattr(runtime.handover._writer, "write", write)


def test_who_changes_it_after_each_flush_has_to_wait(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first such save is kept; the next one waits, and would merge with what b does."""
    a = as_node("a")
    session = change(created(n=0), n=1)
    told = [1]

    def work() -> None:
        change(session, n=told[-1] + 1)
        told.append(told[-1] + 1)

    def try_to_work() -> None:
        try:
            work()
        except SessionBusy:
            told.append(told[-1])

    after_each_write(a, monkeypatch, try_to_work)
    named("b#1").acquire(session.session_key or "")
    assert not let_go(a)
    assert told == [1, 2, 2]
    assert granted_to(session.session_key or "") == ("b#1", 1)
    assert row(session.session_key) == {"n": 2}


def test_loads_go_on_meanwhile(as_node: AsNode, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    a = as_node("a")
    session = change(created(n=0), n=1)
    found: list[Any] = []

    def work() -> None:
        if not record(a, session).flags & SHUT:
            change(session, n=2)
        found.append(SessionStore(session.session_key).load()["n"])

    after_each_write(a, monkeypatch, work)
    named("b#1").acquire(session.session_key or "")
    assert not let_go(a)
    assert found == [2, 2]


def test_deleted_meanwhile(as_node: AsNode, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A logout does not wait, and is not undone."""
    a = as_node("a")
    session = change(created(n=0), n=1)

    def work() -> None:
        if record(a, session).flags & SHUT:
            SessionStore(session.session_key).delete()
        elif not record(a, session).is_tombstone:
            change(session, n=2)

    after_each_write(a, monkeypatch, work)
    named("b#1").acquire(session.session_key or "")
    let_go(a)
    let_go(a)
    assert row(session.session_key) is None
    assert SessionStore(session.session_key).load() == {}
    assert a.store.handing_over() == {}


def test_the_agent_is_killed_while_saves_wait(as_node: AsNode) -> None:  # noqa: F811
    """They go on when the next one comes, even if nobody waits for the session any more."""
    a = as_node("a")
    session = change(created(n=0), n=1)
    a.store.shut([session.session_key or ""])
    assert SessionStore(session.session_key).load() == {"n": 1}
    with pytest.raises(SessionBusy, match="is being handed to another node"):
        change(session, n=2)
    a.flusher.flush_once(time.time(), everything=True)  # a poller does not open it
    with pytest.raises(SessionBusy):
        change(session, n=2)
    assert not let_go(a)
    change(session, n=3)
    assert a.store.head(session.session_key or "").flags & SHUT == 0  # type: ignore[union-attr]
    assert SessionStore(session.session_key).load() == {"n": 3}


def test_postgresql_goes_away_while_saves_wait(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then the session stays here, and is changed as in any outage."""
    a = as_node("a")
    session = change(created(n=0), n=1)

    def work() -> None:
        if record(a, session).flags & SHUT:
            raise ServerUnavailableError("gone")
        change(session, n=2)

    with monkeypatch.context() as patch:
        after_each_write(a, patch, work)
        named("b#1").acquire(session.session_key or "")
        with pytest.raises(ServerUnavailableError):
            let_go(a)
    change(session, n=3)
    assert granted_to(session.session_key or "") == (a.server.owner(), 0)
    assert not let_go(a)
    assert row(session.session_key) == {"n": 3}


def test_saves_without_a_pause(as_node: AsNode) -> None:  # noqa: F811
    """A thread that never rests: what it was told is saved is what b gets."""
    a = as_node("a")
    session = change(created(n=0), n=1)
    told, is_busy, stop = [0], threading.Event(), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                change(session, n=told[0] + 1)
                told[0] += 1
                if told[0] > 50:
                    is_busy.set()
        except SessionBusy:  # b has it, and keeps it
            pass
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    is_busy.wait()
    named("b#1").acquire(session.session_key or "")
    while let_go(a):
        pass
    stop.set()
    thread.join()
    assert granted_to(session.session_key or "") == ("b#1", 1)
    assert row(session.session_key) == {"n": told[0]}
