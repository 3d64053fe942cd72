"""What must not wait for the flusher, and what need not be written at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db.models.functions import Now

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import (
    created,
    forget,
    row,
)

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]


@pytest.mark.parametrize(
    "key", ["_auth_user_id", "_auth_user_backend", "_auth_user_hash", "_session_expiry"]
)
def test_what_must_not_wait_is_written_at_once(call: Call, key: str) -> None:
    """Design 5.5: login, logout and expiry are written through, also their removal."""
    session = created(a=1)
    session[key] = 1000
    call(session, "save")
    assert row(session.session_key) == {"a": 1, key: 1000}

    del session[key]
    call(session, "save")
    assert row(session.session_key) == {"a": 1}


def test_other_changes_of_a_logged_in_session_wait(call: Call) -> None:
    session = created(_auth_user_id="7", a=1)
    again = SessionStore(session.session_key)
    again["a"] = 2
    call(again, "save")

    assert row(session.session_key) == {"_auth_user_id": "7", "a": 1}


def test_own_write_through_keys(tune: Callable[..., Runtime], call: Call) -> None:
    """Also nested ones, also when they change inside."""
    tune(WRITE_THROUGH_KEYS=["cart"])
    session = created(cart={"items": []}, a=1)
    again = SessionStore(session.session_key)
    again["cart"]["items"].append(1)
    call(again, "save")
    assert row(session.session_key) == {"cart": {"items": [1]}, "a": 1}

    again["_auth_user_id"] = "8"
    call(again, "save")
    assert row(session.session_key) == {"cart": {"items": [1]}, "a": 1}


def test_a_session_that_was_replaced_unseen_is_written_at_once(call: Call) -> None:
    """`clear()` without a load: nobody knows what was there, so it does not wait."""
    session = created(_auth_user_id="7")
    again = SessionStore(session.session_key)
    again.clear()
    call(again, "save")

    assert row(session.session_key) == {}


def test_the_user_stands_in_the_row(call: Call) -> None:
    session = created(a=1)
    assert Session.objects.get(pk=session.session_key).user_id is None
    session["_auth_user_id"] = "42"
    call(session, "save")

    assert Session.objects.get(pk=session.session_key).user_id == "42"


def test_a_strange_user_id_does_no_harm(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    session["_auth_user_id"] = "nul\0" + "x" * 1000
    call(session, "save")

    assert Session.objects.get(pk=session.session_key).user_id == ("nul" + "x" * 1000)[:255]


@pytest.mark.parametrize("user_id", ["\ud800", "é" * 300, 7, {"a": 1}, "\U0001f600" * 254])
def test_any_user_id_can_be_saved(runtime: Runtime, call: Call, user_id: Any) -> None:
    """The column is for people who look; what cannot stand there must not fail a save."""
    session = created(a=1)
    session["_auth_user_id"] = user_id
    call(session, "save")

    stored = Session.objects.get(pk=session.session_key).user_id
    assert stored is not None
    assert 0 < len(stored) <= 255
    assert runtime.flusher.flush_once(time.time() + 61).set_aside == 0
    forget(runtime)
    assert SessionStore(session.session_key).load()["_auth_user_id"] == user_id


def test_cycle_key(call: Call) -> None:
    """A new key with the same data, at once; the old one is gone, at once."""
    session = created(a=1)
    old = session.session_key
    again = SessionStore(old)
    call(again, "cycle_key")

    assert again.session_key != old
    assert row(again.session_key) == {"a": 1}
    assert row(old) is None
    assert call(SessionStore(old), "load") == {}


def test_cycle_key_keeps_what_was_not_flushed(call: Call) -> None:
    session = created(a=1)
    session["a"] = 2
    session.save()
    again = SessionStore(session.session_key)
    call(again, "cycle_key")

    assert row(again.session_key) == {"a": 2}


def test_flush_destroys(call: Call) -> None:
    session = created(a=1)
    key = session.session_key
    call(session, "flush")

    assert session.session_key is None
    assert row(key) is None


def test_touches_are_not_written(runtime: Runtime, call: Call) -> None:
    """SESSION_SAVE_EVERY_REQUEST costs PostgreSQL nothing until the stored expiry comes near."""
    session = created(a=1)
    for _ in range(20):
        call(SessionStore(session.session_key), "save")

    report = runtime.flusher.flush_once(time.time() + 3600)
    assert report.rows == 0
    assert runtime.counters.totals()[Counter.TOUCHES] == 20


def test_a_touch_is_written_before_the_stored_expiry_bites(runtime: Runtime, settings: Any) -> None:
    """Trap 5: memory alive while the stored row expires must not happen."""
    settings.SESSION_COOKIE_AGE = 600
    session = created(a=1)
    stored = Session.objects.get(pk=session.session_key).expire_date
    time.sleep(0.01)
    SessionStore(session.session_key).save()

    report = runtime.flusher.flush_once(stored.timestamp() - 120)

    assert report.touched == 1
    assert Session.objects.get(pk=session.session_key).expire_date > stored


def test_short_sessions_are_extended_in_time(settings: Any, call: Call) -> None:
    """A lifetime below the interval: the poller would be too late, so the save writes."""
    session = created(a=1)
    session.set_expiry(30)
    call(session, "save")
    Session.objects.update(expire_date="2026-01-01T00:00Z", written_at=Now())
    runtime_record = Session.objects.get(pk=session.session_key)

    from deferred_sessions.runtime import get_runtime

    store = get_runtime().store
    store.update(
        session.session_key or "",
        lambda r: r and r._replace(stored_expires_at=time.time() + 10),
    )
    call(SessionStore(session.session_key), "save")

    assert Session.objects.get(pk=session.session_key).expire_date > runtime_record.expire_date
