"""SERVERS, their weights or COPIES change: nobody is logged out, and nothing old is believed."""

from __future__ import annotations

import inspect
import logging
import time

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import SessionAwayError
from deferred_sessions.servers import fleet_sql
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.registry import Registry
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import FILLING, LEAVING
from tests.integration.conftest import change, created, forget
from tests.integration.fleets import (
    ALIASES,
    Servers,
    _databases,  # noqa: F401 - a fixture
    _fleet,  # noqa: F401 - a fixture
    _is_impatient,  # noqa: F401 - a fixture
    created_at,
    flush,
    loaded,
    moving,
    repair,
    servers,  # noqa: F401 - a fixture
    settled,
)

pytestmark = pytest.mark.django_db(transaction=True)
A, B, C = ALIASES
HEAVY = {A: 1, B: 1, C: 5}


# Weights


def test_weights_of_servers_in_use(servers: Servers) -> None:  # noqa: F811
    """What no host has in memory is found at once; the agents bring it to where it belongs."""
    settled(servers)
    sessions = [created(n=n) for n in range(60)]
    forget(servers.runtime)
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    assert servers.runtime.fleet.view().is_agreed
    assert not servers.runtime.fleet.is_whole()
    assert [loaded(session) for session in sessions[:30]] == [{"n": n} for n in range(30)]
    repair(servers)
    assert servers.runtime.fleet.is_whole()
    for n, session in enumerate(sessions):
        assert servers.having(session.session_key) == [servers.authority(session.session_key)]
        assert loaded(session) == {"n": n}
    assert servers.counts()[2] > 30


def test_weights_there_and_back(servers: Servers) -> None:  # noqa: F811
    """What was left where it had been is neither believed nor brought back."""
    settled(servers)
    kept, ended = (moving(servers, HEAVY, n=0) for _ in range(2))
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    assert [loaded(kept), loaded(ended)] == [{"n": 0}] * 2
    change(kept, n=1)
    flush(servers)
    SessionStore(ended.session_key).delete()
    assert servers.having(ended.session_key) == []
    assert len(servers.having(kept.session_key)) == 2
    forget(servers.runtime)
    servers.tune(SERVERS=list(ALIASES))
    servers.beat(2)
    assert loaded(kept) == {"n": 1}
    assert loaded(ended) == {}
    repair(servers)
    assert servers.value(kept.session_key, servers.authority(kept.session_key)) == {"n": 1}
    assert len(servers.having(kept.session_key)) == 1
    assert servers.having(ended.session_key) == []


def test_a_server_is_away_while_sessions_may_be_anywhere(servers: Servers) -> None:  # noqa: F811
    """The one that does not answer may have it: an error, no logout."""
    settled(servers)
    session = moving(servers, HEAVY, n=1)
    (place,) = servers.having(session.session_key)
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    servers.stop(place)
    servers.beat()
    with pytest.raises(SessionAwayError):
        loaded(session)
    servers.start(place)
    servers.beat(4)
    assert loaded(session) == {"n": 1}


def test_homes_that_change_while_a_session_is_looked_for(
    servers: Servers,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who was asked by one view is judged by that view, or all is asked again."""
    settled(servers)
    session = moving(servers, HEAVY, n=1)
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    real = Fleet.live

    def live(fleet: Fleet) -> list[SessionServer]:
        if not inspect.stack()[1].function.endswith("bring"):
            return real(fleet)
        monkeypatch.setattr(Fleet, "live", real)
        fleet._seen = None  # as by a note that the agent has just left
        return []

    monkeypatch.setattr(Fleet, "live", live)
    assert loaded(session) == {"n": 1}


def test_a_deletion_that_a_server_missed(servers: Servers) -> None:  # noqa: F811
    """It is not done before all servers know of it that may have the session."""
    settled(servers)
    session = moving(servers, HEAVY, n=1)
    (place,) = servers.having(session.session_key)
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    assert loaded(session) == {"n": 1}
    servers.stop(place)
    SessionStore(session.session_key).delete()
    servers.start(place)
    assert servers.having(session.session_key) == [place]
    flush(servers)
    assert servers.having(session.session_key) == []


def test_copies_are_made_when_there_are_to_be_more(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    sessions = [created(n=n) for n in range(12)]
    servers.tune(COPIES=2)
    servers.beat(2)
    repair(servers)
    assert {len(servers.having(session.session_key)) for session in sessions} == {2}
    assert servers.runtime.fleet.is_whole()


def test_a_walk_counts_for_the_weights_it_went_by(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    servers.runtime.resync.resync_once(time.time())
    servers.tune(SERVERS={A: 5, B: 1, C: 1})
    servers.beat(2)
    assert not servers.runtime.fleet.is_whole()
    repair(servers)
    assert servers.runtime.fleet.is_whole()
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    assert not servers.runtime.fleet.is_whole()


# One server, and several


def test_a_single_server_for_a_while(
    servers: Servers,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others are not believed afterwards; that they are not looked at is said."""
    settled(servers)
    session = created_at(servers, B, n=0)
    forget(servers.runtime)
    with caplog.at_level(logging.ERROR):
        servers.tune(SERVERS=[A])
        servers.beat(2)
    (said,) = [r for r in caplog.records if getattr(r, "action", "") == "servers_left"]
    assert said.servers == [B, C]  # type: ignore[attr-defined]
    assert loaded(session) == {}
    register = Registry(SessionServer(A, owner=str)).read()
    assert register[B].phase == register[C].phase == LEAVING
    servers.tune(SERVERS=list(ALIASES))
    servers.beat(2)
    assert servers.phases() == "in filling filling"
    assert loaded(session) == {"n": 0}
    repair(servers)
    assert servers.runtime.fleet.is_whole()


def test_a_single_server_is_replaced(servers: Servers) -> None:  # noqa: F811
    """Nothing is on record of any server; the one with weight 0 has all there is."""
    servers.tune(SERVERS=[B])
    session, idle = created(n=1), created(n=2)
    forget(servers.runtime)
    servers.tune(SERVERS={A: 1, B: 0})
    servers.beat(3)
    assert servers.runtime.fleet.view().leaving == (B,)
    assert loaded(session) == {"n": 1}
    repair(servers, leaving=True)
    assert servers.runtime.fleet.is_whole()
    assert servers.counts() == [2, 0, 0]
    servers.tune(SERVERS=[A])
    assert [loaded(session), loaded(idle)] == [{"n": 1}, {"n": 2}]


def test_a_process_without_an_agent_reads_what_is_to_be_emptied(servers: Servers) -> None:  # noqa: F811
    servers.tune(SERVERS=[B])
    session = created(n=1)
    forget(servers.runtime)
    servers.tune(SERVERS={A: 1, B: 0})
    assert servers.runtime.fleet.view().names == (B,)
    assert loaded(session) == {"n": 1}


def test_nothing_is_in_order_while_a_server_leaves(servers: Servers) -> None:  # noqa: F811
    """What it has belongs elsewhere; a walk through the others does not change that."""
    settled(servers)
    servers.tune(SERVERS=[A, B])
    servers.beat(2)
    servers.runtime.resync.begin()
    repair(servers)
    view = servers.runtime.fleet.view()
    assert (view.is_in_order, view.leaving) == (False, (C,))
    repair(servers, leaving=True)
    assert servers.runtime.fleet.view().is_whole


def test_deletions_are_kept_for_a_server_that_left(servers: Servers) -> None:  # noqa: F811
    """It may be named again; after a month nobody waits for that."""
    settled(servers)
    session = created_at(servers, A, n=1)
    servers.tune(SERVERS=[A, B])
    servers.beat(2)
    SessionStore(session.session_key).delete()
    server = servers.runtime.fleet.at(session.session_key or "")
    day = 86_400.0

    def kept(later: float) -> bool:
        servers.runtime.revocations.prune(time.time() + later)
        return bool(server.run(fleet_sql.REVOKED, [session.session_key])[0][0])

    assert kept(3 * day)
    assert kept(25 * day)
    assert not kept(40 * day)


def test_all_servers_are_replaced(servers: Servers) -> None:  # noqa: F811
    """When the old ones are empty, the new one is in, and has all."""
    servers.tune(SERVERS=[A, B])
    servers.beat(3)
    sessions = [created(n=n) for n in range(12)]
    forget(servers.runtime)
    servers.tune(SERVERS={C: 1, A: 0, B: 0})
    servers.beat(3)
    assert servers.runtime.fleet.view().phase(C) == FILLING
    assert loaded(sessions[0]) == {"n": 0}
    repair(servers, leaving=True)
    assert servers.runtime.fleet.is_whole()
    assert servers.counts() == [0, 0, 12]
    assert [loaded(session) for session in sessions] == [{"n": n} for n in range(12)]
