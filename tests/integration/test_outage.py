"""The session engine while PostgreSQL is away: what still works, and what raises."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import (
    Outage,
    change,
    created,
    forget,
    row,
)

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]


def test_known_sessions_are_served_and_changed(
    outage: Outage, runtime: Runtime, call: Call
) -> None:
    session = created(a=1)
    outage.begin()
    again = SessionStore(session.session_key)
    again["a"] = 2
    call(again, "save")
    assert call(SessionStore(session.session_key), "load") == {"a": 2}

    outage.end()
    runtime.flusher.flush_once(time.time() + 61)
    assert row(session.session_key) == {"a": 2}


def test_an_unknown_session_raises(outage: Outage, runtime: Runtime, call: Call) -> None:
    """Trap 14: "I cannot ask" never looks like "there is none", which deletes the cookie."""
    session = created(a=1)
    forget(runtime)
    outage.begin()
    again = SessionStore(session.session_key)

    with pytest.raises(ServerUnavailableError):
        call(again, "load")
    assert again.session_key == session.session_key
    with pytest.raises(ServerUnavailableError):
        call(SessionStore(), "exists", session.session_key)


def test_logout_holds_while_postgresql_is_away(
    outage: Outage, runtime: Runtime, call: Call
) -> None:
    session = created(a=1)
    outage.begin()
    call(session, "delete")
    assert call(SessionStore(session.session_key), "load") == {}

    outage.end()
    assert row(session.session_key) == {"a": 1}
    assert call(SessionStore(session.session_key), "load") == {}
    runtime.flusher.flush_once(time.time())
    assert row(session.session_key) is None


def test_a_login_while_postgresql_is_away_is_written_first(
    outage: Outage, runtime: Runtime, call: Call
) -> None:
    session = created(a=1)
    outage.begin()
    session["_auth_user_id"] = "7"
    call(session, "save")
    assert runtime.counters.totals()[Counter.WRITES_POSTPONED] == 1

    outage.end()
    runtime.flusher.flush_once(time.time())
    assert row(session.session_key) == {"a": 1, "_auth_user_id": "7"}
    assert Session.objects.get(pk=session.session_key).user_id == "7"


def test_creations_are_kept(outage: Outage, runtime: Runtime, call: Call) -> None:
    outage.begin()
    session = SessionStore()
    session["a"] = 1
    call(session, "save")
    session["a"] = 2
    call(session, "save")
    assert call(SessionStore(session.session_key), "load") == {"a": 2}

    outage.end()
    assert runtime.flusher.flush_once(time.time()).inserted == 1
    assert row(session.session_key) == {"a": 2}


def test_creations_fail_if_so_set(outage: Outage, tune: Callable[..., Runtime], call: Call) -> None:
    tune(CREATE_WHEN_DOWN=False)
    outage.begin()
    session = SessionStore()
    session["a"] = 1

    with pytest.raises(ServerUnavailableError):
        call(session, "save")


def test_an_outage_is_logged_once(
    outage: Outage, caplog: pytest.LogCaptureFixture, runtime: Runtime
) -> None:
    """Each login and logout counts; the log speaks of the outage, not of each of them."""
    outage.begin()
    for _ in range(3):
        created(a=1)

    messages = [record for record in caplog.records if "kept in memory" in record.message]
    assert len(messages) == 1
    assert runtime.counters.totals()[Counter.WRITES_POSTPONED] == 3


def test_requests_do_not_all_try_to_connect(outage: Outage, runtime: Runtime) -> None:
    """After a failure they are refused at once, until one finds that PostgreSQL is back."""
    session = created(a=1)
    forget(runtime)
    outage.begin()
    clock = time.monotonic()
    runtime.server.breaker.clock = lambda: clock
    for _ in range(2):
        with pytest.raises(ServerUnavailableError):
            SessionStore(session.session_key).load()
    with pytest.raises(ServerUnavailableError, match="tried again in"):
        SessionStore(session.session_key).load()
    outage.end()
    runtime.server.breaker.clock = lambda: clock
    with pytest.raises(ServerUnavailableError, match="tried again in"):
        SessionStore(session.session_key).load()

    runtime.server.breaker.clock = lambda: clock + 1
    assert SessionStore(session.session_key).load() == {"a": 1}


def test_the_flusher_always_tries(outage: Outage, runtime: Runtime) -> None:
    """And what it finds out, requests learn from."""
    session, forgotten = created(a=1), created(a=2)
    outage.begin()
    change(session, a=2)
    clock = time.monotonic()
    runtime.server.breaker.clock = lambda: clock
    assert runtime.flusher.flush_once(time.time() + 61).failure
    runtime.store.update(forgotten.session_key or "", lambda _: None)
    with pytest.raises(ServerUnavailableError, match="tried again in"):
        SessionStore(forgotten.session_key).load()
    outage.end()
    runtime.server.breaker.clock = lambda: clock

    assert runtime.flusher.flush_once(time.time() + 61).updated == 1
    assert SessionStore(forgotten.session_key).load() == {"a": 2}
