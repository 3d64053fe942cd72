"""SERVERS are rolled out, host by host; hosts differ, begin with several, or end with one."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.db import connections

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError, SessionAwayError
from deferred_sessions.servers.standing import OUT
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
    moving,
    place,
    repair,
    servers,  # noqa: F401 - a fixture
    settled,
)

pytestmark = pytest.mark.django_db(transaction=True)
A, B, C = ALIASES
HEAVY = {A: 1, B: 1, C: 5}


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


def test_a_host_that_cannot_name_a_server_writes_to_the_others(servers: Servers) -> None:  # noqa: F811
    """And leaves it to other hosts to bring sessions where they belong."""
    settled(servers)
    sessions = [created_at(servers, alias, n=0) for alias in ALIASES]
    forget_alias(C)
    servers.tune(SERVERS=[A, B])
    for session in sessions:
        change(session, n=1)
    report = flush(servers)
    assert (report.updated, report.remaining) == (2, 1)
    assert "DATABASES does not name it" in report.failure
    assert servers.runtime.resync.resync_once(time.time()) is None
    connections.settings[C] = place(C)
    assert flush(servers).updated == 1


def test_a_server_is_away_when_several_begin(servers: Servers) -> None:  # noqa: F811
    """Nobody knows yet that it has all there is."""
    servers.tune(SERVERS=[A])
    sessions = [created(n=n) for n in range(12)]
    forget(servers.runtime)
    servers.stop(A)
    servers.tune(SERVERS=[A, B])
    for session in sessions:
        with pytest.raises(ServerUnavailableError):
            loaded(session)


def test_a_new_server_dies_that_all_were_replaced_by(servers: Servers) -> None:  # noqa: F811
    """It was not in yet, but what is written there counts."""
    servers.tune(SERVERS=[A])
    created(n=0)
    servers.tune(SERVERS={A: 0, B: 1, C: 1})
    servers.beat(3)
    session = created_at(servers, B, n=1)
    forget(servers.runtime)
    servers.stop(B)
    servers.beat(2)
    assert servers.runtime.fleet.view().phase(B) == OUT
    with pytest.raises(SessionAwayError):
        loaded(session)


def test_an_old_row_is_not_believed_while_a_server_is_silent(servers: Servers) -> None:  # noqa: F811
    """Though that one came in long before the row was written, it may have a later one."""
    settled(servers)
    session = moving(servers, HEAVY, n=0)
    (before,) = servers.having(session.session_key)
    servers.tune(SERVERS=HEAVY)
    servers.beat(2)
    change(session, n=1)
    flush(servers)
    after = servers.authority(session.session_key)
    assert servers.value(session.session_key, before) == {"n": 0}
    forget(servers.runtime)
    servers.tune(SERVERS=list(ALIASES))
    servers.beat(2)
    assert servers.authority(session.session_key) == before
    servers.stop(after)
    with pytest.raises(SessionAwayError):
        loaded(session)
    servers.start(after)
    assert loaded(session) == {"n": 1}


def test_a_host_with_one_name_is_not_followed(
    servers: Servers,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A forgotten setting on one host must not take servers from all others."""
    settled(servers)
    with caplog.at_level(logging.ERROR), as_node(servers, tmp_path, "other", SERVERS=[A]):
        servers.beat(3)
    assert "names sessions_a alone" in caplog.text
    servers.beat(3)
    assert servers.phases() == "in in in"
