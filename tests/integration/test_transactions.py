"""Sessions inside the application's own transactions, that commit and that roll back.

Nobody can tell before the end, and not even Django's hook tells afterwards: so whatever is
written in a transaction stays dirty, and the flusher makes sure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db import transaction

from deferred_sessions.backend import SessionStore
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import row

pytestmark = pytest.mark.django_db(transaction=True)


def created(**values: Any) -> SessionStore:
    session = SessionStore()
    session.update(values)
    session.save()
    return session


def rolled_back(work: Callable[[], Any]) -> Any:
    with transaction.atomic():
        result = work()
        transaction.set_rollback(True)
    return result


def is_dirty(runtime: Runtime, key: str | None) -> bool:
    record = runtime.store.get(key or "")
    assert record is not None
    return record.is_dirty


def test_creation_that_commits(runtime: Runtime) -> None:
    with transaction.atomic():
        session = created(a=1)
        assert is_dirty(runtime, session.session_key)

    assert row(session.session_key) == {"a": 1}
    report = runtime.flusher.flush_once(time.time() + 61)
    assert (report.repeated, report.rows, report.remaining) == (1, 0, 0)
    assert not is_dirty(runtime, session.session_key)


def test_creation_that_rolls_back_is_repeated(runtime: Runtime) -> None:
    """Design 5.4: the visitor has the cookie, so the session must stay."""
    session = rolled_back(lambda: created(a=1))
    assert row(session.session_key) is None
    assert SessionStore(session.session_key).load() == {"a": 1}

    assert runtime.flusher.flush_once(time.time() + 61).inserted == 1
    assert row(session.session_key) == {"a": 1}


def test_deletion_that_rolls_back_is_repeated(runtime: Runtime) -> None:
    """A logout is never undone by a rollback."""
    session = created(a=1)
    rolled_back(session.delete)
    assert row(session.session_key) == {"a": 1}
    assert SessionStore(session.session_key).load() == {}

    assert runtime.flusher.flush_once(time.time() + 61).deleted == 1
    assert row(session.session_key) is None


def test_deletion_that_commits(runtime: Runtime) -> None:
    session = created(a=1)
    with transaction.atomic():
        session.delete()

    assert row(session.session_key) is None
    assert runtime.flusher.flush_once(time.time() + 61).remaining == 0
    assert row(session.session_key) is None
    assert SessionStore(session.session_key).load() == {}


def test_write_through_that_rolls_back_is_repeated(runtime: Runtime) -> None:
    session = created(a=1)

    def log_in() -> None:
        session["_auth_user_id"] = "7"
        session.save()

    rolled_back(log_in)
    assert row(session.session_key) == {"a": 1}
    assert SessionStore(session.session_key)["_auth_user_id"] == "7"

    runtime.flusher.flush_once(time.time() + 61)
    assert row(session.session_key) == {"a": 1, "_auth_user_id": "7"}


def test_write_through_that_commits(runtime: Runtime) -> None:
    session = created(a=1)
    with transaction.atomic():
        session["_auth_user_id"] = "7"
        session.save()
        assert is_dirty(runtime, session.session_key)

    assert row(session.session_key) == {"a": 1, "_auth_user_id": "7"}
    report = runtime.flusher.flush_once(time.time() + 61)
    assert (report.repeated, report.rows, report.remaining) == (1, 0, 0)


def test_a_savepoint_that_rolls_back(runtime: Runtime) -> None:
    """Only the inner part is undone, and only that is repeated."""
    with transaction.atomic():
        outer = created(a=1)
        inner = rolled_back(lambda: created(b=1))

    assert row(outer.session_key) == {"a": 1}
    assert row(inner.session_key) is None
    report = runtime.flusher.flush_once(time.time() + 61)
    assert report.repeated + report.inserted == 2
    assert row(inner.session_key) == {"b": 1}


def test_cycle_key_that_rolls_back(runtime: Runtime) -> None:
    session = created(a=1)
    old = session.session_key
    rolled_back(session.cycle_key)

    runtime.flusher.flush_once(time.time() + 61)
    assert row(old) is None
    assert row(session.session_key) == {"a": 1}


def test_changes_after_the_commit_of_a_creation(runtime: Runtime) -> None:
    with transaction.atomic():
        session = created(a=1)
        session["a"] = 2
        session.save()

    assert row(session.session_key) == {"a": 1}
    assert is_dirty(runtime, session.session_key)
    runtime.flusher.flush_once(time.time() + 61)
    assert row(session.session_key) == {"a": 2}


def test_a_broken_transaction_keeps_the_session_in_memory(runtime: Runtime) -> None:
    """The application caught a database error: nothing more can be written in there."""

    def break_then_create() -> SessionStore:
        transaction.set_rollback(True)
        return created(a=1)

    session = rolled_back(break_then_create)

    assert SessionStore(session.session_key).load() == {"a": 1}
    runtime.flusher.flush_once(time.time() + 61)
    assert row(session.session_key) == {"a": 1}


@pytest.mark.django_db
def test_inside_a_test_case(runtime: Runtime) -> None:
    """A test that never commits works like any other."""
    session = created(a=1)
    session["a"] = 2
    session.save()
    session["_auth_user_id"] = "7"
    session.save()
    runtime.flusher.flush_once(time.time() + 61)

    assert row(session.session_key) == {"a": 2, "_auth_user_id": "7"}
    session.delete()
    assert row(session.session_key) is None
