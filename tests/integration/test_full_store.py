"""The session engine while the host store is full: nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.sessions.backends.base import UpdateError
from django.db import transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import RowLockedError, StoreFullError
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.record import TOUCHED
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import (
    change,
    created,
    forget,
    row,
)

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]


def fill(runtime: Runtime, *, size: int = 2000) -> None:
    """Fill the store with changes that PostgreSQL does not have."""
    from deferred_sessions import lifecycle
    from deferred_sessions.exceptions import StoreFullError

    number = 0
    try:
        while True:
            number += 1
            record = lifecycle.created(
                f"filler{number:08d}",
                b"x" * size,
                "",
                expires_at=time.time() + 9e5,
                now=time.time(),
                policy=runtime.settings.policy,
            )
            runtime.store.update(record.key, lambda _, record=record: record)
    except StoreFullError:
        pass


def test_a_full_store_saves_straight_to_postgresql(
    tune: Callable[..., Runtime], call: Call
) -> None:
    """Design 7: nothing is lost, and everybody sees it."""
    runtime = tune(STORE_SIZE=4 << 20)
    session = created(a="x")
    fill(runtime)
    again = SessionStore(session.session_key)
    again["a"] = "y" * 5000
    call(again, "save")

    assert row(session.session_key) == {"a": "y" * 5000}
    assert call(SessionStore(session.session_key), "load") == {"a": "y" * 5000}
    assert runtime.counters.totals()[Counter.STORE_FULL] == 1

    again["b"] = 1
    call(again, "save")
    assert row(session.session_key) == {"a": "y" * 5000, "b": 1}


def test_a_full_store_creates_and_deletes(tune: Callable[..., Runtime], call: Call) -> None:
    runtime = tune(STORE_SIZE=4 << 20)
    fill(runtime)

    session = created(a=1)
    assert row(session.session_key) == {"a": 1}
    assert call(SessionStore(session.session_key), "load") == {"a": 1}


def test_a_full_store_refuses_what_was_deleted(tune: Callable[..., Runtime], call: Call) -> None:
    runtime = tune(STORE_SIZE=4 << 20)
    session = created(a=1)
    again = SessionStore(session.session_key)
    again["a"] = "y" * 5000
    Session.objects.all().delete()
    forget(runtime)
    fill(runtime)

    with pytest.raises(UpdateError):
        call(again, "save")


def test_a_full_store_of_touched_sessions_makes_room(tune: Callable[..., Runtime]) -> None:
    """They are due days later only; a crowded store writes them at the next flush."""
    runtime = tune(STORE_SIZE=4 << 20)
    while not runtime.store.is_crowded():
        runtime.store.update(
            created(a="x" * 3000).session_key or "",
            lambda r: r and r._replace(flags=TOUCHED, due_at=1e11, expires_at=r.expires_at + 9),
        )
    assert runtime.store.status().dirty > 500

    runtime.flusher.flush_once(time.time())

    assert runtime.store.status().dirty == 0
    created(b=1)


def test_a_full_store_deletes(tune: Callable[..., Runtime], call: Call) -> None:
    """Login and logout go on: what memory does not know, PostgreSQL forgets at once."""
    runtime = tune(STORE_SIZE=4 << 20)
    known, unknown = created(a=1), created(b=1)
    runtime.store.update(unknown.session_key or "", lambda _: None)
    fill(runtime)
    call(known, "delete")
    call(unknown, "delete")

    for session in (known, unknown):
        assert row(session.session_key) is None
        assert call(SessionStore(session.session_key), "load") == {}


def test_a_save_past_memory_in_a_transaction_that_rolls_back(
    tune: Callable[..., Runtime], call: Call
) -> None:
    """What had been acknowledged before must not go with it."""
    runtime = tune(STORE_SIZE=4 << 20)
    session = created(a=1)
    change(session, b=2)
    fill(runtime)
    again = SessionStore(session.session_key)
    again["c"] = "y" * 5000
    with transaction.atomic():
        with pytest.raises(StoreFullError):
            call(again, "save")
        transaction.set_rollback(True)

    assert SessionStore(session.session_key).load() == {"a": 1, "b": 2}


@pytest.mark.parametrize(("size", "count"), [(2000, 1000), (5000, 250), (300, 250)])
def test_a_full_store_can_be_flushed(tune: Callable[..., Runtime], size: int, count: int) -> None:
    """There is room to mark what is written, whatever the sizes; in one run."""
    runtime = tune(STORE_SIZE=4 << 20, BATCH_SIZE=count)
    fill(runtime, size=size)
    assert runtime.store.status().dirty > 100

    report = runtime.flusher.flush_once(time.time(), everything=True)

    assert (report.failure, report.remaining) == ("", 0)


def test_an_unchanged_session_past_memory(tune: Callable[..., Runtime], call: Call) -> None:
    """SESSION_SAVE_EVERY_REQUEST: nothing changed but the expiry, and that is no error."""
    runtime = tune(STORE_SIZE=4 << 20)
    session = created(a=1)
    runtime.store.update(session.session_key or "", lambda _: None)
    fill(runtime)
    again = SessionStore(session.session_key)
    assert again["a"] == 1
    call(again, "save")

    assert row(session.session_key) == {"a": 1}


def test_somebody_saves_while_we_save_past_memory(
    tune: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Both changes are kept, in memory and in PostgreSQL."""
    runtime = tune(STORE_SIZE=4 << 20)
    session = created(a="x" * 100)
    fill(runtime)
    ours = SessionStore(session.session_key)
    ours["ours"] = "y" * 500
    real = runtime.server.update

    def meanwhile(columns: Any, now: float) -> int:
        monkeypatch.undo()
        change(session, a="short")
        return real(columns, now)

    monkeypatch.setattr(runtime.server, "update", meanwhile)
    call(ours, "save")

    expected = {"a": "short", "ours": "y" * 500}
    assert SessionStore(session.session_key).load() == expected
    runtime.flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) == expected


def test_a_session_deleted_while_we_save_past_memory(
    tune: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    runtime = tune(STORE_SIZE=4 << 20)
    session = created(a=1)
    fill(runtime)
    ours = SessionStore(session.session_key)
    ours["ours"] = "y" * 500
    real = runtime.server.update

    def meanwhile(columns: Any, now: float) -> int:
        monkeypatch.undo()
        SessionStore().delete(session.session_key)
        return real(columns, now)

    monkeypatch.setattr(runtime.server, "update", meanwhile)
    with pytest.raises(UpdateError):
        call(ours, "save")
    assert row(session.session_key) is None


def test_others_that_keep_writing_are_not_a_deletion(
    tune: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    runtime = tune(STORE_SIZE=4 << 20)
    session = created(a=1)
    fill(runtime)
    ours = SessionStore(session.session_key)
    ours["ours"] = "y" * 500
    monkeypatch.setattr(runtime.server, "update", lambda columns, now: 0)

    with pytest.raises(RowLockedError, match="keep writing"):
        call(ours, "save")
