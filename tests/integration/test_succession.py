"""Session servers come and go: who decides, what moves, and what is served meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connections

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError, SessionAwayError
from deferred_sessions.membership import SETTLED_ON
from deferred_sessions.servers.leases import Leases
from deferred_sessions.servers.registry import Registry, announce
from deferred_sessions.servers.rows import Answer
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import FILLING, IN, LEAVING, ORDER, Order
from tests.integration.conftest import change, created, forget, record, second_connection
from tests.integration.fleets import (
    ALIASES,
    Servers,
    _databases,  # noqa: F401 - a fixture
    _fleet,  # noqa: F401 - a fixture
    _is_impatient,  # noqa: F401 - a fixture
    as_node,
    created_at,
    flush,
    loaded,
    servers,  # noqa: F401 - a fixture
    settled,
)

pytestmark = pytest.mark.django_db(transaction=True)
A, B, C = ALIASES


# Who is in


def test_a_new_site_begins(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    for alias in ALIASES:
        register = Registry(SessionServer(alias, owner=str)).read()
        order = register.pop(ORDER)
        assert Order.decoded(order.phase) == servers.runtime.fleet.wish.kept()
        assert {s.phase for s in register.values()} == {IN}
        assert set(register) == set(ALIASES)
    assert servers.runtime.fleet.is_whole()


def test_servers_that_were_added_are_filled_first(servers: Servers) -> None:  # noqa: F811
    """Nobody is logged out because a new, empty server was asked."""
    servers.tune(SERVERS=[A])
    sessions = [created(n=n) for n in range(20)]
    servers.tune(SERVERS=list(ALIASES))
    forget(servers.runtime)
    assert servers.phases() == "in gone gone"  # without an agent
    assert [loaded(session) for session in sessions[:5]] == [{"n": n} for n in range(5)]
    servers.beat(3)
    assert servers.phases() == "in filling filling"
    assert [loaded(session) for session in sessions] == [{"n": n} for n in range(20)]


def test_e06_sessions_in_memory_move(servers: Servers) -> None:  # noqa: F811
    """E06: what a node holds is written to the next server, with its lease."""
    settled(servers)
    clean, dirty = (created_at(servers, A, n=0) for _ in range(2))
    change(dirty, n=1)
    servers.stop(A)
    servers.beat()
    assert servers.phases() == "out in in"
    for session, n in ((clean, 0), (dirty, 1)):
        key = session.session_key
        home = servers.authority(key)
        assert home != A
        assert servers.value(key, home) == {"n": n}
        found = servers.row(key, home)
        assert found is not None
        assert found.owner == servers.runtime.fleet.owner()
        assert not record(servers.runtime, session).is_dirty
    forget(servers.runtime)
    assert [loaded(clean), loaded(dirty)] == [{"n": 0}, {"n": 1}]


def test_new_sessions_go_past_a_dead_server(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    servers.stop(A)
    servers.beat()
    for n in range(20):
        created(n=n)
    assert sum(servers.counts(B, C)) == 20
    assert flush(servers).remaining == 0


def test_what_only_the_dead_server_has_is_unavailable(
    servers: Servers,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error, which is no logout."""
    settled(servers)
    session = created_at(servers, A, n=1)
    forget(servers.runtime)
    servers.stop(A)
    servers.beat()
    monkeypatch.setattr("deferred_sessions.servers.fleet.PATIENCE", 600.0)  # nobody waits for it
    with pytest.raises(SessionAwayError):
        loaded(session)
    with pytest.raises(SessionAwayError):
        SessionStore().exists(session.session_key or "")


def test_what_was_never_there_is_not(servers: Servers) -> None:  # noqa: F811
    """If a server has been asked that would know."""
    settled(servers, COPIES=2)
    servers.stop(A)
    servers.beat()
    for number in range(10):
        assert SessionStore(f"nosuchsession{number}").load() == {}


def test_with_two_copies_nothing_is_lost(servers: Servers) -> None:  # noqa: F811
    """E06: not even what no node holds."""
    settled(servers, COPIES=2)
    sessions = [created(n=n) for n in range(30)]
    forget(servers.runtime)
    servers.stop(A)
    servers.beat()
    assert [loaded(session) for session in sessions] == [{"n": n} for n in range(30)]


def test_a_server_that_comes_back_is_not_believed(servers: Servers) -> None:  # noqa: F811
    """It has its old rows; the newer ones count, and get to it, too."""
    settled(servers)
    session = created_at(servers, A, n=0)
    key = session.session_key
    servers.stop(A)
    servers.beat()
    change(session, n=1)
    flush(servers)
    servers.start(A)
    servers.beat(3)
    assert servers.phases() == "filling in in"
    assert servers.value(key, A) == {"n": 0}
    forget(servers.runtime)
    assert loaded(session) == {"n": 1}
    change(session, n=2)
    flush(servers)
    assert servers.value(key, A) == {"n": 2}  # a further copy


def test_what_was_not_touched_meanwhile_is_found_there(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    session = created_at(servers, A, n=0)
    forget(servers.runtime)
    servers.stop(A)
    servers.beat()
    servers.start(A)
    servers.beat(3)
    assert servers.phases() == "filling in in"
    assert loaded(session) == {"n": 0}
    assert len(servers.having(session.session_key)) == 2


def test_what_was_deleted_meanwhile_does_not_come_back(servers: Servers) -> None:  # noqa: F811
    """Neither from the server that missed it, nor from a node that had it."""
    settled(servers)
    session = created_at(servers, A, n=0)
    forget(servers.runtime)
    servers.stop(A)
    servers.beat()
    SessionStore(session.session_key).delete()
    forget(servers.runtime)
    servers.start(A)
    servers.beat(3)
    assert servers.value(session.session_key, A) == {"n": 0}
    assert loaded(session) == {}


def test_it_is_trusted_again(servers: Servers) -> None:  # noqa: F811
    """When somebody has filled it, and said so on any server."""
    settled(servers)
    session = created_at(servers, A, n=0)
    servers.stop(A)
    servers.beat()
    servers.start(A)
    servers.beat(3)
    standing = servers.runtime.fleet.view().standings[A]
    assert standing.phase == FILLING
    filled = standing._replace(number=standing.number + 1, phase=IN, since=time.time())
    assert announce(servers.runtime.fleet.live(), filled)
    servers.beat(2)
    assert servers.phases() == "in in in"
    assert servers.authority(session.session_key) == A
    assert servers.runtime.fleet.view().is_agreed
    assert loaded(session) == {"n": 0}


def test_what_is_left_over_from_an_earlier_outage_is_not_served(servers: Servers) -> None:  # noqa: F811
    """The other server still has what it was given then; the session has moved on since."""
    test_it_is_trusted_again(servers)
    session = created_at(servers, A, n=0)
    key = session.session_key
    ranked = servers.runtime.fleet.view().placement.ranked(key or "")
    stray = next(alias for alias in ranked if alias != A)
    with connections[A].cursor() as ours, connections[stray].cursor() as theirs:
        columns = "session_key, session_data, expire_date, version, fence, written_at"
        ours.execute(
            f"SELECT {columns} FROM deferred_sessions_session WHERE session_key = %s", [key]
        )
        values = ours.fetchone()
        theirs.execute(
            f"INSERT INTO deferred_sessions_session ({columns}) VALUES (%s, %s, %s, %s, %s, %s)",
            values,
        )
        theirs.execute("UPDATE deferred_sessions_session SET written_at = now() - interval '1 h'")
    change(session, n=1)
    flush(servers)
    forget(servers.runtime)
    servers.stop(A)
    servers.beat()
    with pytest.raises(ServerUnavailableError):
        loaded(session)


def test_a_server_that_leaves_is_still_read(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    sessions = [created_at(servers, alias, n=1) for alias in ALIASES]
    servers.tune(SERVERS=[A, B])
    forget(servers.runtime)
    assert servers.runtime.fleet.is_whole()  # it is used until all hosts name it no more
    servers.beat(2)
    assert servers.runtime.fleet.view().phase(C) == LEAVING
    assert [loaded(session) for session in sessions] == [{"n": 1}] * 3
    other = created_at(servers, A, n=2)
    forget(servers.runtime)
    servers.stop(C)
    assert loaded(other) == {"n": 2}
    with pytest.raises(SessionAwayError):
        SessionStore("nosuchsession").load()


def test_a_dead_server_costs_one_attempt(servers: Servers, monkeypatch: Any) -> None:  # noqa: F811
    """E06: not one for each request."""
    settled(servers)
    servers.stop(A)
    servers.beat()
    attempts = []
    monkeypatch.setattr(connections[A], "connect", lambda: attempts.append(1))
    for n in range(10):
        change(created(n=n), n=n + 1)
    flush(servers)
    assert attempts == []


# Several nodes


def test_nobody_gets_a_lease_before_all_nodes_have_moved(
    servers: Servers,  # noqa: F811
    tmp_path: Any,
) -> None:
    """The other one may hold the session, and not have said so to the server that decides now."""
    settled(servers)
    session = created_at(servers, A, n=0)
    key = session.session_key or ""
    here = servers.runtime
    with as_node(servers, tmp_path, "other") as there:
        servers.beat(2)  # it knows of the other
    servers.beat(2)
    forget(servers.runtime)
    servers.stop(A)
    servers.beat(2)
    view = servers.runtime.fleet.view()
    assert (view.is_settled, view.is_agreed) == (True, False)
    assert servers.runtime.leases.acquire(key).answer is Answer.QUEUED
    assert there is not here
    with as_node(servers, tmp_path, "other"):
        servers.beat(2)
    servers.beat()
    assert servers.runtime.fleet.view().is_agreed


def test_heartbeats_tell_what_a_node_has_settled_on(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    servers.beat()
    beats = Leases(SessionServer(B, owner=lambda: "watcher#1")).beat({})
    (mine,) = [beat for beat in beats if beat.node == servers.runtime.fleet.owner()]
    assert mine.traits[SETTLED_ON] == servers.runtime.fleet.view().digest


# The agent itself


def wait_until(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


@contextmanager
def away(alias: str) -> Iterator[None]:
    """Have a database take no connections in the block, and end those that it has."""
    name = connections[alias].settings_dict["NAME"]
    with second_connection() as own:
        own.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')  # type: ignore[call-overload]
        own.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        try:
            yield
        finally:
            own.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')  # type: ignore[call-overload]


def test_the_agent_follows_the_servers(servers: Servers) -> None:  # noqa: F811
    """E06: a server goes, the next takes over; it comes back, and is to be filled."""
    runtime = servers.tune(HEARTBEAT_INTERVAL=0.1, NODE_TIMEOUT=2.0)
    view = runtime.fleet.view
    runtime.agent.start()
    try:
        wait_until(lambda: servers.phases() == "in in in" and view().is_agreed)
        session = created_at(servers, A, n=1)
        change(session, n=2)
        with away(A):
            wait_until(lambda: servers.phases() == "out in in" and view().is_agreed)
            home = servers.authority(session.session_key)
            assert servers.value(session.session_key, home) == {"n": 2}
            forget(runtime)
            assert loaded(session) == {"n": 2}
        wait_until(lambda: servers.phases() == "filling in in" and view().is_agreed)
    finally:
        runtime.agent.stop()


def test_who_asks_for_a_session_waits_for_the_next_server(
    servers: Servers,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request, no error: the agent finds out meanwhile."""
    monkeypatch.setattr("deferred_sessions.servers.fleet.PATIENCE", 20.0)
    runtime = servers.tune(HEARTBEAT_INTERVAL=0.1, NODE_TIMEOUT=2.0, COPIES=2)
    runtime.agent.start()
    try:
        wait_until(lambda: runtime.fleet.view().is_agreed)
        session = created_at(servers, A, n=1)
        forget(runtime)
        with away(A):
            assert loaded(session) == {"n": 1}
            assert servers.phases() == "out in in"
    finally:
        runtime.agent.stop()
