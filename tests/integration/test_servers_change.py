"""SERVERS, their weights or COPIES change: nobody is logged out, and nothing old is believed."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from freezegun import freeze_time

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError, SessionAwayError
from deferred_sessions.models import Session
from deferred_sessions.servers import fleet_sql, lookup
from deferred_sessions.servers.copies import Copies
from deferred_sessions.servers.placement import Placement
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
    as_node,
    created_at,
    flush,
    forget_alias,
    loaded,
    place,
    repair,
    servers,  # noqa: F401 - a fixture
    settled,
)

pytestmark = pytest.mark.django_db(transaction=True)
A, B, C = ALIASES
HEAVY = {A: 1, B: 1, C: 5}


def moving(servers: Servers, weights: dict[str, Any], **values: Any) -> SessionStore:  # noqa: F811
    """Return a session that belongs elsewhere by these weights, and that no memory has."""
    later = Placement(weights)
    while True:
        session = created(**values)
        if later.ranked(session.session_key or "")[0] != servers.authority(session.session_key):
            forget(servers.runtime)
            return session


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


# A server is named, and is not


def test_a_server_is_named_again_before_it_was_empty(servers: Servers) -> None:  # noqa: F811
    """Its old rows are not believed, and what was deleted meanwhile does not come back."""
    settled(servers)
    kept, ended, idle = (created_at(servers, C, n=0) for _ in range(3))
    forget(servers.runtime)
    servers.tune(SERVERS=[A, B])
    servers.beat(2)
    assert [loaded(kept), loaded(ended)] == [{"n": 0}] * 2
    change(kept, n=1)
    flush(servers)
    servers.stop(C)
    SessionStore(ended.session_key).delete()
    servers.start(C)
    forget(servers.runtime)
    assert [servers.value(s.session_key, C)["n"] for s in (kept, ended, idle)] == [0, 0, 0]

    servers.tune(SERVERS=list(ALIASES))
    servers.beat(2)
    assert servers.phases() == "in in filling"
    assert [loaded(kept), loaded(ended), loaded(idle)] == [{"n": 1}, {}, {"n": 0}]
    forget(servers.runtime)
    repair(servers)
    assert servers.phases() == "in in in"
    assert servers.runtime.fleet.is_whole()
    assert servers.value(kept.session_key, C) == {"n": 1}
    assert servers.having(ended.session_key) == []
    assert [loaded(kept), loaded(ended), loaded(idle)] == [{"n": 1}, {}, {"n": 0}]


def test_hosts_that_differ_go_by_what_was_before(
    servers: Servers,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A deploy host by host: all have the same homes at any time, and nobody waits."""
    settled(servers)
    with as_node(servers, tmp_path, "other"):
        servers.beat(2)
    servers.beat(2)
    for names in ([A, B], HEAVY):
        with as_node(servers, tmp_path, "other", SERVERS=names):
            servers.beat(3)
            assert servers.runtime.fleet.is_whole()
            keys = [created(n=n).session_key or "" for n in range(12)]
            homes = [servers.authority(key) for key in keys]
        servers.beat(3)
        assert servers.runtime.fleet.is_whole()
        assert servers.runtime.fleet.view().is_agreed
        assert [servers.authority(key) for key in keys] == homes
        assert [servers.having(key) for key in keys] == [[home] for home in homes]


def test_processes_go_by_the_view_of_their_agent(servers: Servers) -> None:  # noqa: F811
    """New ones may be there before it is."""
    servers.tune(SERVERS=[A, B])
    servers.beat(3)
    for names in (list(ALIASES), {A: 1, B: 7}, [C, A, B]):
        servers.tune(SERVERS=names)
        session = created(n=1)
        assert len(servers.having(session.session_key)) == 1
        servers.tune(SERVERS=[A, B])
        forget(servers.runtime)
        assert loaded(session) == {"n": 1}


def test_a_server_is_used_when_all_hosts_name_it(
    servers: Servers,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers.tune(SERVERS=[A, B])
    servers.beat(3)
    with as_node(servers, tmp_path, "other"):
        servers.beat(2)
    servers.tune(SERVERS=list(ALIASES))
    servers.beat(3)
    assert servers.phases() == "in in gone"
    with pytest.raises(CommandError, match="not in force yet"):
        call_command("rebalancesessions")
    monkeypatch.setattr("deferred_sessions.succession.PATIENCE", 0.0)
    with caplog.at_level(logging.ERROR):
        servers.beat()
    assert [r.count for r in caplog.records if r.action == "servers_differ"] == [1]  # type: ignore[attr-defined]
    monkeypatch.undo()
    with as_node(servers, tmp_path, "other", SERVERS=list(ALIASES)):
        servers.beat(3)
    servers.beat(2)
    assert servers.phases() == "in in filling"


def test_a_server_that_this_host_cannot_name(servers: Servers) -> None:  # noqa: F811
    """It is in use, and not in DATABASES any more: an error, for its sessions alone."""
    settled(servers)
    here, there = (created_at(servers, alias, n=1) for alias in (A, C))
    forget(servers.runtime)
    forget_alias(C)
    servers.tune(SERVERS=[A, B])
    assert loaded(here) == {"n": 1}
    with pytest.raises(ServerUnavailableError, match="DATABASES does not name it"):
        loaded(there)
    servers.beat(2)
    assert servers.runtime.fleet.view().leaving == (C,)
    with pytest.raises(SessionAwayError):  # nobody knows what is there
        loaded(there)
    connections.settings[C] = place(C)
    assert loaded(there) == {"n": 1}


def test_a_new_server_that_does_not_answer_is_waited_for(servers: Servers) -> None:  # noqa: F811
    """What is in use goes on as before."""
    servers.tune(SERVERS=[B, C])
    servers.beat(3)
    session = created(n=1)
    servers.stop(A)
    servers.tune(SERVERS={A: 1, B: 1, C: 5})
    servers.beat(3)
    forget(servers.runtime)
    assert servers.phases() == "gone in in"
    assert servers.runtime.fleet.is_whole()
    assert loaded(session) == {"n": 1}
    servers.start(A)
    servers.beat(3)
    repair(servers)
    assert servers.phases() == "in in in"
    assert loaded(session) == {"n": 1}


def test_a_new_server_is_away_before_it_has_anything(servers: Servers) -> None:  # noqa: F811
    """Nothing can be missing that only it has."""
    servers.tune(SERVERS=[A, B])
    servers.beat(3)
    servers.tune(SERVERS=list(ALIASES))
    servers.beat(2)
    servers.stop(C)
    servers.beat(2)
    assert (servers.phases(), servers.runtime.fleet.view().is_in_order) == ("in in out", False)
    for number in range(10):
        assert not SessionStore().exists(f"nosuchsession{number}")


def test_one_of_two_copies_is_enough_while_servers_change(servers: Servers) -> None:  # noqa: F811
    servers.tune(SERVERS=[A, B], COPIES=2)
    servers.beat(3)
    sessions = [created(n=n) for n in range(12)]
    servers.tune(SERVERS=list(ALIASES))
    servers.beat(2)
    forget(servers.runtime)
    servers.stop(B)
    servers.beat(2)
    assert servers.phases() == "in out filling"
    assert [loaded(session) for session in sessions] == [{"n": n} for n in range(12)]
    assert loaded(SessionStore("nosuchsession")) == {}


def test_a_server_that_will_never_answer_is_given_up(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    session = created_at(servers, A, n=1)
    servers.tune(SERVERS=[A, B])
    servers.beat(2)
    servers.stop(C)
    forget(servers.runtime)
    with pytest.raises(SessionAwayError):
        loaded(SessionStore("nosuchsession"))
    with pytest.raises(CommandError, match="is not one that leaves"):
        call_command("rebalancesessions", lost=A)
    call_command("rebalancesessions", lost=C)
    repair(servers)
    assert servers.runtime.fleet.is_whole()
    assert loaded(SessionStore("nosuchsession")) == {}
    assert loaded(session) == {"n": 1}


# What is deleted meanwhile


def test_what_expired_does_not_come_back(servers: Servers) -> None:  # noqa: F811
    """The old row, where the session belonged before, has the expiry that it had then."""
    settled(servers)
    session = moving(servers, HEAVY, n=0)
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    short = SessionStore(session.session_key)
    short.set_expiry(60)
    short.save()
    flush(servers)
    assert len(servers.having(session.session_key)) == 2
    forget(servers.runtime)
    later = time.time() + 120
    servers.runtime.flusher.clear_expired(later)
    with freeze_time(datetime.fromtimestamp(later, UTC), ignore=["psycopg"]):
        assert SessionStore(session.session_key).load() == {}


def test_a_deletion_while_a_session_is_brought(
    servers: Servers,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another node ends it between the look at where it was and the copy to where it belongs."""
    settled(servers)
    session = moving(servers, HEAVY, n=1)
    key = session.session_key or ""
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    real, fleet = lookup.copy, servers.runtime.fleet

    def late(*arguments: Any) -> int:
        monkeypatch.undo()
        fleet.at(key).delete([key])
        Copies(fleet).delete([key])
        return real(*arguments)

    monkeypatch.setattr(lookup, "copy", late)
    assert loaded(session) == {}
    assert servers.having(key) == []


def test_users_are_logged_out_everywhere_while_servers_change(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    sessions = [created_at(servers, alias, _auth_user_id="7") for alias in ALIASES]
    moved = moving(servers, {A: 9, B: 1}, _auth_user_id="7")
    forget(servers.runtime)
    servers.tune(SERVERS={A: 9, B: 1})
    servers.beat(2)
    wanted = {session.session_key for session in (*sessions, moved)}
    assert {session.pk for session in Session.objects.of_user("7")} >= wanted
    assert Session.objects.revoke_all("7") >= len(wanted)
    assert [loaded(session) for session in (*sessions, moved)] == [{}] * 4
    assert Session.objects.of_user("7") == []


def test_nobody_is_said_to_be_logged_out_where_a_server_is_out(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    created_at(servers, A, _auth_user_id="7")
    created_at(servers, B, _auth_user_id="7")
    servers.stop(B)
    forget(servers.runtime)
    servers.beat(2)
    with pytest.raises(ServerUnavailableError, match="ended, but a session server is out"):
        Session.objects.revoke_all("7")


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
        return bool(server.run(fleet_sql.DELETED, [session.session_key])[0][0])

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
