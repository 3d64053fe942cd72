"""What is deleted or expires while session servers change stays so, and nothing else goes."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connections
from freezegun import freeze_time

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.models import Session
from deferred_sessions.servers import lookup
from deferred_sessions.servers.copies import Copies
from tests.integration.conftest import created, forget
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


def test_a_table_that_was_emptied_before_it_was_used(servers: Servers) -> None:  # noqa: F811
    """That ends no session: none was there."""
    servers.tune(SERVERS=[A, B])
    servers.beat(3)
    sessions = [created(n=n) for n in range(30)]
    forget(servers.runtime)
    with connections[C].cursor() as cursor:
        cursor.execute("TRUNCATE deferred_sessions_session")
    servers.tune(SERVERS=list(ALIASES))
    repair(servers)
    assert servers.runtime.fleet.is_whole()
    assert sum(servers.counts()) == 30
    assert servers.counts()[2] > 0
    assert [loaded(session) for session in sessions] == [{"n": n} for n in range(30)]


def test_a_row_that_was_changed_there_and_back(servers: Servers) -> None:  # noqa: F811
    """It was revoked for that, and is not ended where it is not any more."""
    settled(servers)
    session = moving(servers, HEAVY, n=1)
    (before,) = servers.having(session.session_key)
    row = servers.row(session.session_key, before)
    assert row is not None
    row.expire_date += timedelta(days=1)
    row.save()
    for weights in (HEAVY, list(ALIASES)):
        servers.tune(SERVERS=weights)
        repair(servers)
        assert servers.runtime.fleet.is_whole()
        assert loaded(session) == {"n": 1}
        forget(servers.runtime)
    assert servers.having(session.session_key) == [before]


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
