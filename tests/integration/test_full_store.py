"""The session engine while the host store is full: nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.sessions.backends.base import UpdateError

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


def fill(runtime: Runtime) -> None:
    """Fill the store with changes that PostgreSQL does not have."""
    from deferred_sessions import lifecycle
    from deferred_sessions.exceptions import StoreFullError

    number = 0
    try:
        while True:
            number += 1
            record = lifecycle.created(
                f"filler{number:08d}",
                b"x" * 2000,
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
