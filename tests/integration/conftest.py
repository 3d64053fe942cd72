"""Fixtures for tests on real PostgreSQL."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.db import connection

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import StoreFullError
from deferred_sessions.memory.store import HostStore
from deferred_sessions.models import Session
from deferred_sessions.record import SessionRecord
from deferred_sessions.runtime import Runtime, get_runtime


@pytest.fixture
def unreachable(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make PostgreSQL unreachable: nobody listens where Django connects to."""
    connection.close()
    with monkeypatch.context() as patch:
        patch.setitem(connection.settings_dict, "HOST", "/nonexistent")
        yield
    connection.close()


@pytest.fixture
def outage(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outage]:
    """PostgreSQL comes and goes as the test says."""
    outage = Outage(connection.settings_dict["HOST"])
    yield outage
    outage.end()


class Outage:
    """Makes PostgreSQL unreachable for a while."""

    def __init__(self, host: str) -> None:
        self._host = host

    def begin(self) -> None:
        connection.close()
        connection.settings_dict["HOST"] = "/nonexistent"

    def end(self) -> None:
        """PostgreSQL is back, and it is later than the next attempt to connect."""
        connection.close()
        connection.settings_dict["HOST"] = self._host
        get_runtime().server.breaker.clock = lambda: time.monotonic() + 60


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call a method of a session store: its sync half, then its async half."""

    def sync(store: SessionStore, name: str, *arguments: Any, **keywords: Any) -> Any:
        return getattr(store, name)(*arguments, **keywords)

    def asynchronous(store: SessionStore, name: str, *arguments: Any, **keywords: Any) -> Any:
        return async_to_sync(getattr(store, f"a{name}"))(*arguments, **keywords)

    return sync if request.param == "sync" else asynchronous


def row(key: str | None) -> dict[str, Any] | None:
    """Return what PostgreSQL has of a session, decoded; None if it has nothing."""
    found = Session.objects.filter(pk=key).first()
    return None if found is None else found.get_decoded()


def second_connection(database: str | None = None) -> psycopg.Connection[Any]:
    """Return a connection of somebody else, outside of Django."""
    parameters = connection.get_connection_params()
    parameters["dbname"] = database or parameters["dbname"]
    for name in ("context", "cursor_factory", "prepare_threshold"):
        parameters.pop(name, None)
    return psycopg.connect(**parameters, autocommit=True)


def created(**values: Any) -> SessionStore:
    """Return a session that was created with these values."""
    session = SessionStore()
    session.update(values)
    session.save()
    return session


def change(session: SessionStore, **values: Any) -> SessionStore:
    """Change a session, as another request does."""
    again = SessionStore(session.session_key)
    again.update(values)
    again.save()
    return again


def dirty(count: int) -> list[SessionStore]:
    """Return so many sessions with a change that PostgreSQL lacks."""
    return [change(created(n=0), n=number + 1) for number in range(count)]


@contextmanager
def no_room_to(work: str) -> Iterator[None]:
    """Have memory be full for what a method of `Tiers` puts there in the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("update", "save"):
            patch.setattr(HostStore, name, _full_for(work, getattr(HostStore, name)))
        yield


def _full_for(work: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def full(*arguments: Any) -> Any:
        if sys._getframe(1).f_code.co_qualname == f"Tiers.{work}":
            raise StoreFullError("full")
        return real(*arguments)

    return full


def record(runtime: Runtime, session: SessionStore) -> SessionRecord:
    """Return what memory has of a session."""
    found = runtime.store.get(session.session_key or "")
    assert found is not None
    return found


def forget(runtime: Runtime) -> None:
    """Empty the memory of this host, as a restart of the host would."""
    runtime.store.clear()
    runtime.cache.clear()
