"""Several session servers: where sessions are, with their copies; faces; servers that hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import connections
from django.test import Client
from django.urls import reverse

from deferred_sessions.backend import SessionStore
from deferred_sessions.dashboard import snapshot
from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.handles import handle_of
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.registry import Registry
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import FILLING, IN, Standing
from deferred_sessions.session_list import ServerFilter
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
    servers,  # noqa: F401 - a fixture
    settled,
)

pytestmark = pytest.mark.django_db(transaction=True)
A, B, C = ALIASES


# Where sessions are


def test_e03_one_copy(servers: Servers) -> None:  # noqa: F811
    """E03: each session on exactly one server, about as many on each."""
    keys = [created(n=n).session_key for n in range(120)]
    assert sum(servers.counts()) == 120
    assert min(servers.counts()) > 20
    for key in keys:
        assert servers.having(key) == [servers.authority(key)]


def test_e04_two_copies(servers: Servers) -> None:  # noqa: F811
    """E04: each on exactly two, with the same content."""
    servers.tune(COPIES=2)
    for n in range(20):
        session = created(n=n)
        change(session, n=n + 1)
    assert flush(servers).updated == 20
    assert sum(servers.counts()) == 40
    for n in range(20):
        session = created(n=n)
        found = servers.having(session.session_key)
        assert len(found) == 2
        assert {servers.value(session.session_key, alias)["n"] for alias in found} == {n}


def test_the_whole_life_of_a_session(servers: Servers) -> None:  # noqa: F811
    servers.tune(COPIES=2)
    session = created(n=1)
    key = session.session_key
    change(session, n=2)
    assert flush(servers).updated == 1
    forget(servers.runtime)
    assert loaded(session) == {"n": 2}
    change(session, _auth_user_id="7")  # is written through
    assert [servers.value(key, alias) for alias in servers.having(key)] == [
        {"n": 2, "_auth_user_id": "7"}
    ] * 2
    SessionStore(key).delete()
    assert servers.having(key) == []
    assert not SessionStore(key).exists(key or "")


def test_a_flush_of_many(servers: Servers) -> None:  # noqa: F811
    """Each server gets its own, several batches of it, side by side."""
    servers.tune(BATCH_SIZE=7, COPIES=2)
    sessions = [created(n=0) for _ in range(90)]
    for session in sessions:
        change(session, n=1)
    report = flush(servers)
    assert (report.updated, report.remaining, report.failure) == (90, 0, "")
    for session in sessions:
        found = servers.having(session.session_key)
        assert [servers.value(session.session_key, alias) for alias in found] == [{"n": 1}] * 2


def test_a_touch_gets_to_the_copies(servers: Servers) -> None:  # noqa: F811
    servers.tune(COPIES=2)
    session = created(n=1)
    again = SessionStore(session.session_key)
    again.set_expiry(3600)
    again.save()
    key = session.session_key
    rows = [servers.row(key, alias) for alias in servers.having(key)]
    assert len({found.expire_date for found in rows if found}) == 1


def test_expired_sessions_go_everywhere(servers: Servers) -> None:  # noqa: F811
    servers.tune(COPIES=2)
    for _ in range(10):
        created(n=1)
    forget(servers.runtime)
    servers.runtime.flusher.clear_expired(time.time() + 1e8)
    assert servers.counts() == [0, 0, 0]


def test_a_transaction_on_one_of_them(servers: Servers) -> None:  # noqa: F811
    """What a rollback takes back is written again, on all homes."""
    from django.db import transaction

    servers.tune(COPIES=2)
    with pytest.raises(RuntimeError), transaction.atomic(using=A):
        sessions = [created(n=1) for _ in range(12)]
        raise RuntimeError
    flush(servers)
    assert sum(servers.counts()) == 24
    for session in sessions:
        assert loaded(session) == {"n": 1}


def test_a_session_in_memory_costs_what_it_did(
    servers: Servers,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To load and to save it, nobody looks at which servers there are."""
    session = created(n=1)
    looks: list[int] = []
    monkeypatch.setattr(Fleet, "view", lambda self: looks.append(1))
    change(session, n=2)
    assert loaded(session) == {"n": 2}
    assert looks == []


# A server fails


def test_a_dead_server_does_not_hold_up_the_others(servers: Servers) -> None:  # noqa: F811
    sessions = [created_at(servers, alias, n=0) for alias in ALIASES for _ in range(3)]
    for session in sessions:
        change(session, n=1)
    servers.stop(A)
    report = flush(servers)
    assert report.updated == 6
    assert report.failure.startswith(f"{A}: ")
    assert report.remaining == 3
    servers.start(A)
    assert flush(servers).updated == 3


def test_a_copy_that_was_missed_is_made_up_for(servers: Servers) -> None:  # noqa: F811
    """Durable on one server, complete on two; until then the record stays dirty."""
    servers.tune(COPIES=2)
    session = created_at(servers, A, n=0)
    key = session.session_key
    (copy,) = set(servers.having(key)) - {A}
    servers.stop(copy)
    change(session, n=1)
    report = flush(servers)
    assert (report.updated, report.incomplete, report.remaining) == (0, 1, 1)
    assert servers.value(key, A) == {"n": 1}
    servers.start(copy)
    report = flush(servers)
    assert (report.repeated, report.incomplete, report.remaining) == (1, 0, 0)
    assert servers.value(key, copy) == {"n": 1}


def test_a_copy_that_a_creation_missed(servers: Servers) -> None:  # noqa: F811
    servers.tune(COPIES=2)
    servers.stop(B)
    sessions = [created(n=1) for _ in range(12)]
    servers.start(B)
    flush(servers)
    for session in sessions:
        assert len(servers.having(session.session_key)) == 2


def test_a_deletion_that_a_copy_missed(servers: Servers) -> None:  # noqa: F811
    servers.tune(COPIES=2)
    session = created_at(servers, A, n=0)
    key = session.session_key
    (copy,) = set(servers.having(key)) - {A}
    servers.stop(copy)
    SessionStore(key).delete()
    servers.start(copy)
    flush(servers)
    assert servers.having(key) == []


def test_a_deletion_behind_our_back_on_a_copy(servers: Servers) -> None:  # noqa: F811
    """It counts as one, wherever it is made."""
    servers.tune(COPIES=2)
    servers.runtime.revocations.read_once(time.time())
    session = created_at(servers, A, n=0)
    key = session.session_key
    (copy,) = set(servers.having(key)) - {A}
    found = servers.row(key, copy)
    assert found is not None
    found.delete()
    servers.runtime.revocations.read_once(time.time())
    assert servers.having(key) == []
    assert loaded(session) == {}


# What hangs


def test_a_server_that_does_not_answer(servers: Servers) -> None:  # noqa: F811
    """SERVER_TIMEOUT: an error within that time, and the connection is not used again."""
    server = SessionServer(A, owner=lambda: "node#1", timeout=0.3)
    server.connect()
    began = time.monotonic()
    with pytest.raises(ServerUnavailableError, match="no answer"):
        server.run("SELECT pg_sleep(60)", [])
    assert time.monotonic() - began < 30
    server.breaker.clock = lambda: time.monotonic() + 60
    assert server.run("SELECT 1", []) == [(1,)]


def test_the_statements_of_the_application_may_take_long(servers: Servers) -> None:  # noqa: F811
    server = SessionServer(A, owner=lambda: "node#1", timeout=0.1)
    server.run("SELECT 1", [])
    with connections[A].cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.4)")


def test_faces(servers: Servers) -> None:  # noqa: F811
    """Users are found on whichever server they are."""
    from deferred_sessions.models import Session

    servers.tune(COPIES=2)
    created(_auth_user_id="8")
    keep, *others = [created_at(servers, alias, _auth_user_id="7") for alias in ALIASES]
    found = {session.pk for session in Session.objects.of_user("7")}
    assert found >= {keep.session_key, *(session.session_key for session in others)}
    assert Session.objects.revoke_all("7", keep=keep.session_key) == len(found) - 1
    assert [s.pk for s in Session.objects.of_user("7")] == [keep.session_key]
    assert len(Session.objects.of_user("8")) == 1


def test_the_runtime_is_made_anew(servers: Servers, tune: Callable[..., Runtime]) -> None:  # noqa: F811
    reset_runtime()
    assert get_runtime().fleet.only is None
    assert tune(SERVERS=[A]).fleet.only is not None


def test_standings_are_told_in_any_order(servers: Servers) -> None:  # noqa: F811
    registry = Registry(SessionServer(A, owner=str))
    newer, older = Standing(B, 4, IN, 7.0), Standing(B, 3, FILLING, 5.0)
    registry.write([newer])
    registry.write([older])
    assert registry.read() == {B: newer}
    registry.write([newer._replace(phase=FILLING)])
    assert registry.read()[B].phase == FILLING


def test_commands_ask_all_servers(servers: Servers) -> None:  # noqa: F811
    settled(servers)
    out = StringIO()
    call_command("sessionnodes", stdout=out)
    assert out.getvalue().count("alive") == 1
    call_command("sessionnodes", "--refused", stdout=out)
    found = snapshot("15m", time.time())
    assert (len(found["nodes"]), found["refused"]) == (1, 0)


def test_the_admin_shows_each_server(
    servers: Servers,  # noqa: F811
    admin_client: Client,
) -> None:
    """A filter, which is not there for one server; and any session by its handle."""
    session = created_at(servers, C, _auth_user_id="7")
    address = reverse("admin:deferred_sessions_session_changelist")
    page = admin_client.get(address, {"server": C})
    listed = [each.pk for each in page.context["cl"].result_list]
    assert session.session_key in listed
    assert all(servers.authority(key) == C for key in listed)
    handle = handle_of(session.session_key or "")
    one = reverse("admin:deferred_sessions_session_change", args=[handle])
    assert admin_client.get(one).status_code == 200
    assert admin_client.post(one, {"action": "flush_now"}).status_code == 302
    servers.tune(SERVERS=[A])
    assert ServerFilter.lookups(None, None, None) == []  # type: ignore[arg-type]
