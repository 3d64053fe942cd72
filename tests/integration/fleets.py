"""Three databases on one server, as session servers that come and go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getclosurevars
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.db import connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import override_settings

from deferred_sessions.backend import SessionStore
from deferred_sessions.conf import get_settings
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime
from deferred_sessions.servers.placement import Placement
from deferred_sessions.servers.registry import announce
from deferred_sessions.servers.standing import FILLING
from tests.integration.conftest import change, created, forget
from tests.plugins.postgres import database_url

ALIASES = ("sessions_a", "sessions_b", "sessions_c")
TABLES = (
    "session",
    "revocation",
    "node",
    "waiter",
    "refused_write",
    "adopted",
    "server",
)


def place(alias: str) -> dict[str, Any]:
    """Return an entry of DATABASES for a database beside the one of the tests."""
    return {
        **connection.settings_dict,
        "NAME": f"fleet_{alias}_{os.getpid()}",
        "OPTIONS": {"connect_timeout": 2},
        "TEST": dict(connection.settings_dict["TEST"]),
    }


@pytest.fixture(scope="module")
def _databases(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """Three databases with our tables."""
    server = database_url().rpartition("/")[0]
    with django_db_blocker.unblock(), psycopg.connect(f"{server}/postgres", autocommit=True) as own:
        for alias in ALIASES:
            own.execute(f'CREATE DATABASE "{place(alias)["NAME"]}"')  # type: ignore[call-overload]
            connections.settings[alias] = place(alias)
        with override_settings(DEFERRED_SESSIONS={"SERVERS": list(ALIASES)}):
            for alias in ALIASES:
                call_command("migrate", database=alias, verbosity=0)
                connections[alias].close()
        for alias in ALIASES:
            forget_alias(alias)
        yield
        for alias in ALIASES:
            name = place(alias)["NAME"]
            own.execute(f'DROP DATABASE "{name}" WITH (FORCE)')  # type: ignore[call-overload]


def forget_alias(alias: str) -> None:
    """Have Django know nothing of a database any more."""
    if alias in connections.settings:
        connections[alias].close()
        del connections[alias]
        del connections.settings[alias]


class Servers:
    """Session servers of a test; each may be away for a while."""

    def __init__(self, change: Callable[..., Runtime]) -> None:
        self._change = change
        self.runtime = get_runtime()

    def tune(self, **changes: Any) -> Runtime:
        self.runtime = self._change(**changes)
        return self.runtime

    def stop(self, *aliases: str) -> None:
        """Make servers unreachable."""
        for alias in aliases:
            connections[alias].close()
            connections[alias].settings_dict["OPTIONS"]["port"] = "1"

    def start(self, *aliases: str) -> None:
        """They are back, and it is later than the next attempt to connect."""
        for alias in aliases:
            connections[alias].close()
            connections[alias].settings_dict["OPTIONS"].pop("port", None)
        for server in get_runtime().fleet.servers:
            if server.alias in aliases:
                server.breaker.clock = lambda: time.monotonic() + 60

    def beat(self, times: int = 1, runtime: Runtime | None = None) -> None:
        """Do what an agent does to see how the servers stand."""
        runtime = runtime or self.runtime
        agent = runtime.agent
        for _ in range(times):
            for alias in [server.alias for server in runtime.fleet.servers]:
                agent._do(lambda now, alias=alias: agent.beat_once(now, alias), time.time(), "beat")
            if runtime.fleet.only is None:
                agent.move_once(time.time())

    def phases(self) -> str:
        """Return how the node sees them."""
        view = self.runtime.fleet.view()
        return " ".join(view.phase(alias) for alias in ALIASES)

    def having(self, key: str | None) -> list[str]:
        """Return where there is a row of this key."""
        return [alias for alias in ALIASES if self.row(key, alias)]

    def row(self, key: str | None, alias: str) -> Session | None:
        """Return what one of them has of a session."""
        return Session.objects.using(alias).filter(pk=key).first()

    def value(self, key: str | None, alias: str) -> Any:
        """Return the same, decoded."""
        found = self.row(key, alias)
        return None if found is None else found.get_decoded()

    def counts(self, *aliases: str) -> list[int]:
        """Return how many rows each has."""
        return [Session.objects.using(alias).count() for alias in aliases or ALIASES]

    def authority(self, key: str | None) -> str:
        """Return which of them decides about a key."""
        return self.runtime.fleet.at(key or "").alias


@contextmanager
def as_node(servers: Servers, directory: Path, name: str, **settings: Any) -> Iterator[Runtime]:
    """Be another node in the block."""
    mine, home = get_settings(), servers.runtime.store.directory
    try:
        yield servers.tune(DIRECTORY=str(directory / name), NODE=name, **settings)
    finally:
        kept = {name: getattr(mine, name.lower()) for name in settings}
        servers.tune(DIRECTORY=str(home), NODE=mine.node, **kept)


@contextmanager
def allowed() -> Iterator[None]:
    """Have Django's tests not forbid databases that were not there when the test began."""
    guard = BaseDatabaseWrapper.ensure_connection
    found = getclosurevars(guard).nonlocals
    BaseDatabaseWrapper.ensure_connection = found["real_ensure_connection"]  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseDatabaseWrapper.ensure_connection = guard  # type: ignore[method-assign]


@contextmanager
def as_fleet(change: Callable[..., Runtime], **settings: Any) -> Iterator[Servers]:
    """Have Django know the databases, emptied, and the runtime use them."""
    for alias in ALIASES:
        connections.settings[alias] = place(alias)
        with connections[alias].cursor() as cursor:
            names = ", ".join(f"deferred_sessions_{table}" for table in TABLES)
            cursor.execute(f"TRUNCATE {names}")
            cursor.execute("DELETE FROM deferred_sessions_revocation")
    change(SERVERS=list(ALIASES), **settings)
    servers = Servers(change)
    try:
        yield servers
    finally:
        reset_runtime()
        servers.start(*ALIASES)
        for alias in ALIASES:
            forget_alias(alias)


@pytest.fixture
def servers(
    _databases: None, transactional_db: None, tune: Callable[..., Runtime]
) -> Iterator[Servers]:
    """Three session servers, and sessions on one of them each."""
    with allowed(), as_fleet(tune) as found:
        yield found


def created_at(servers: Servers, alias: str, **values: Any) -> SessionStore:
    """Return a session that one of the servers decides about."""
    while True:
        session = created(**values)
        if servers.authority(session.session_key) == alias:
            return session


def flush(servers: Servers, everything: bool = True) -> Any:
    return servers.runtime.flusher.flush_once(time.time(), everything=everything)


def loaded(session: SessionStore) -> dict[str, Any]:
    return dict(SessionStore(session.session_key).load())


def settled(servers: Servers, **settings: Any) -> Servers:
    """Have an agent found the site."""
    if settings:
        servers.tune(**settings)
    servers.beat(3)
    assert servers.phases() == "in in in"
    assert servers.runtime.fleet.view().is_agreed
    return servers


def tell(servers: Servers, alias: str, phase: str) -> None:
    """Tell all servers that one of them stands so."""
    known = servers.runtime.fleet.view().standings[alias]
    after = known._replace(number=known.number + 1, phase=phase, since=time.time())
    assert announce(servers.runtime.fleet.live(), after)


def stand(servers: Servers, alias: str, phase: str) -> None:
    """Have a server stand so, and the node move to that."""
    tell(servers, alias, phase)
    servers.beat(2)
    assert servers.runtime.fleet.view().is_agreed
    assert servers.runtime.fleet.view().phase(alias) == phase


def moving(servers: Servers, weights: dict[str, Any], **values: Any) -> SessionStore:
    """Return a session that belongs elsewhere by these weights, and that no memory has."""
    later = Placement(weights)
    while True:
        session = created(**values)
        if later.ranked(session.session_key or "")[0] != servers.authority(session.session_key):
            forget(servers.runtime)
            return session


def repair(servers: Servers, *, leaving: bool = False) -> None:
    """Do what agents do until all is in order; with `leaving`, as `rebalancesessions` does."""
    resync = servers.runtime.resync
    servers.beat(3)
    while resync.resync_once(time.time(), leaving=leaving) or resync.progress(leaving=leaving):
        servers.beat(3)


def copied(servers: Servers, alias: str = ALIASES[0]) -> SessionStore:
    """Return a session, {"n": 1}, that another server decides about until one is in again.

    That one is being filled, and has a copy.
    """
    settled(servers)
    session = created_at(servers, alias, n=0)
    stand(servers, alias, FILLING)
    change(session, n=1)
    flush(servers)
    return session


@pytest.fixture(autouse=True)
def _is_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferred_sessions.servers.fleet.PATIENCE", 0.0)


@pytest.fixture(autouse=True)
def _fleet(servers: Servers) -> None:
    """All of these tests have three servers."""
