"""What is under way while session servers change places is judged where the session went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from django.db import connections

from deferred_sessions import lifecycle
from deferred_sessions.backend import SessionStore
from deferred_sessions.flusher import Flusher
from deferred_sessions.report import FlushReport
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.leases import Leases
from deferred_sessions.servers.rows import Answer
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import FILLING, IN
from tests.integration.conftest import (
    change,
    created,
    forget,
    no_room_to,
    record,
    second_connection,
)
from tests.integration.fleets import (
    ALIASES,
    Servers,
    _databases,  # noqa: F401 - a fixture
    _fleet,  # noqa: F401 - a fixture
    _is_impatient,  # noqa: F401 - a fixture
    copied,
    created_at,
    flush,
    loaded,
    servers,  # noqa: F401 - a fixture
    settled,
    stand,
    tell,
)

pytestmark = pytest.mark.django_db(transaction=True)
A, B, _ = ALIASES
SKIPPED = FlushReport(skipped=True)
EPOCH = 1 << 20  # by which fences grow with each change of the servers
Meanwhile = Callable[..., None]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Have something happen right after the next call of a method, or right before it."""

    def have(owner: type, name: str, work: Callable[[], object], *, before: bool = False) -> None:
        method, to_do = getattr(owner, name), [work]

        def patched(*arguments: Any, **options: Any) -> Any:
            now = to_do.pop() if to_do else int  # which does nothing
            if before:
                now()
                return method(*arguments, **options)
            result = method(*arguments, **options)
            now()
            return result

        monkeypatch.setattr(owner, name, patched)

    return have


def fences(servers: Servers, session: SessionStore) -> tuple[int, int]:  # noqa: F811
    """Return the fences of a session in memory and where it belongs."""
    row = servers.row(session.session_key, servers.authority(session.session_key))
    assert row is not None
    return record(servers.runtime, session).fence, row.fence


# Leases that a node has had since before


def without(servers: Servers, alias: str) -> None:  # noqa: F811
    """Have a server be out: a new epoch."""
    servers.stop(alias)
    servers.beat(2)
    assert servers.runtime.fleet.view().is_agreed


def test_e06_a_request_that_asks_late_changes_nothing(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    """E06: it hears of the new epoch; another request has loaded and changed the session."""
    settled(servers)
    session = created_at(servers, B, n=0)
    forget(servers.runtime)

    def another_request_is_faster() -> None:
        assert loaded(session) == {"n": 0}
        change(session, n=1)
        tell(servers, A, FILLING)

    meanwhile(Leases, "acquire", another_request_is_faster, before=True)
    assert loaded(session) == {"n": 1}
    assert fences(servers, session) == (0, 0)
    report = flush(servers)
    assert (report.updated, report.fenced, report.remaining) == (1, 0, 0)
    assert servers.value(session.session_key, B) == {"n": 1}


def test_what_was_given_by_the_view_before_is_not_kept(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    """Or of two requests, the later one would raise the fence of what the first one keeps."""
    settled(servers)
    session = created_at(servers, B, n=0)
    forget(servers.runtime)
    meanwhile(Leases, "acquire", lambda: stand(servers, A, FILLING))
    assert loaded(session) == {"n": 0}
    assert fences(servers, session) == (EPOCH - 1, EPOCH - 1)


def test_what_is_loaded_anew_outdoes_all_servers_before(servers: Servers) -> None:  # noqa: F811
    """They may have given fences that nobody else knows of."""
    settled(servers)
    session = created_at(servers, B, n=0)
    without(servers, A)
    change(session, n=1)
    assert loaded(session) == {"n": 1}  # from memory
    flush(servers)
    assert fences(servers, session) == (0, 0)
    forget(servers.runtime)
    assert loaded(session) == {"n": 1}
    assert fences(servers, session) == (EPOCH - 1, EPOCH - 1)


def test_a_server_that_is_away_keeps_nothing_on_the_others(servers: Servers) -> None:  # noqa: F811
    """What these have passed on is done; the rest stays marked for the next time."""
    settled(servers)
    here, away = created_at(servers, B, n=0), created_at(servers, A, n=0)
    leases = {session.session_key or "": 0 for session in (here, away)}
    servers.runtime.store.hand_over(leases, 9e9)
    servers.stop(A)
    servers.runtime.handover.release_once(time.time(), ask=False)
    row = servers.row(here.session_key, B)
    assert row is not None
    assert row.owner is None
    assert servers.runtime.store.handing_over() == {away.session_key: 0}


def test_who_has_not_heard_gives_fences_of_the_epoch_before(servers: Servers) -> None:  # noqa: F811
    """What is given where nobody decides any more is behind all that is given where one does."""
    settled(servers)
    session = created_at(servers, A, n=0)
    key = session.session_key or ""
    others = Leases(SessionServer(A, owner=lambda: "other#1"))
    assert others.acquire(key).answer is Answer.QUEUED
    tell(servers, A, FILLING)
    assert servers.runtime.handover.release_all(time.time(), int) == 0
    given = servers.row(key, A)
    assert given is not None
    assert (given.owner, given.fence) == ("other#1", 1)


def test_who_has_heard_too_late_asks_nobody(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    """A request found out where to ask, and all nodes have moved before it did."""
    settled(servers)
    session = created_at(servers, A, n=0)
    key = session.session_key or ""
    forget(servers.runtime)
    before = servers.row(key, A)
    meanwhile(Fleet, "at", lambda: stand(servers, A, FILLING))
    assert servers.runtime.leases.acquire(key).answer is Answer.QUEUED
    assert servers.row(key, A) == before


@pytest.mark.parametrize("use", ["load", "touch", "change"])
def test_it_is_handed_on_at_the_first_go(servers: Servers, use: str) -> None:  # noqa: F811
    """Under whichever fence its row stands when it is released."""
    settled(servers)
    session = created_at(servers, B, n=0)
    without(servers, A)
    forget(servers.runtime)
    assert loaded(session) == {"n": 0}
    key, policy = session.session_key or "", servers.runtime.settings.policy
    if use == "touch":
        touched = partial(lifecycle.touched, expires_at=2e9, now=time.time(), policy=policy)
        servers.runtime.store.update(key, lambda known: known and touched(known))
    if use == "change":
        change(session, n=1)
    others = Leases(SessionServer(B, owner=lambda: "other#1"))
    assert others.acquire(key).answer is Answer.QUEUED
    assert not servers.runtime.handover.release_once(time.time() + 1)
    grant = others.acquire(key, waits=True)
    assert grant.row is not None
    assert grant.row.fence >= EPOCH


# What is sent while the view changes


@pytest.mark.parametrize("sent", ["update", "delete"])
def test_what_the_server_before_says_does_not_count(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
    monkeypatch: pytest.MonkeyPatch,
    sent: str,
) -> None:
    """The next one lacks what was sent to it, until this node has written it there."""
    session = copied(servers)
    assert servers.value(session.session_key, A) == {"n": 1}  # a copy

    def move_but_do_not_write() -> None:
        tell(servers, A, IN)
        with monkeypatch.context() as patch:
            patch.setattr(servers.runtime.flusher, "flush_once", lambda *_, **__: SKIPPED)
            servers.beat(1)
        assert not servers.runtime.fleet.view().is_settled

    meanwhile(SessionServer, sent, move_but_do_not_write)
    monkeypatch.setattr(servers.runtime.fleet, "shape", lambda: ())  # it was looked at before
    if sent == "update":
        change(session, n=2)
        servers.runtime.flusher.flush_sessions([session.session_key or ""], time.time())
    else:
        SessionStore(session.session_key).delete()
    assert record(servers.runtime, session).is_dirty
    servers.beat(2)
    assert servers.runtime.fleet.view().is_agreed
    assert servers.authority(session.session_key) == A
    assert servers.value(session.session_key, A) == ({"n": 2} if sent == "update" else None)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_deletion_that_is_sent_to_the_server_before(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
    is_known: bool,
) -> None:
    """It is sent to the next one, too, which may have the row; so memory knows it or not."""
    session = copied(servers)
    if not is_known:
        forget(servers.runtime)
    meanwhile(SessionServer, "delete", lambda: stand(servers, A, IN))
    SessionStore(session.session_key).delete()
    flush(servers)
    assert servers.authority(session.session_key) == A
    assert servers.row(session.session_key, A) is None


def test_a_session_that_is_created_at_the_server_before(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    """Other nodes find it where it belongs as soon as the visitor has its key."""
    settled(servers)
    has_moved = False
    while not has_moved:
        stand(servers, A, FILLING)
        before = servers.runtime.fleet.view()
        meanwhile(SessionServer, "insert", lambda: stand(servers, A, IN))
        key = created(n=1).session_key or ""
        home = servers.authority(key)
        assert servers.value(key, home) == {"n": 1}
        has_moved = before.layout.homes(key)[0] != home


def test_a_save_past_memory_to_the_server_before(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    settled(servers)
    session = created_at(servers, A, n=0)
    loaded_one = SessionStore(session.session_key)
    loaded_one["n"] = 1
    meanwhile(SessionServer, "update", lambda: stand(servers, A, FILLING))
    with no_room_to("remember"):
        loaded_one.save()
    home = servers.authority(session.session_key)
    assert home != A
    assert servers.value(session.session_key, home) == {"n": 1}


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_deletion_is_repeated_where_the_session_went(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
    monkeypatch: pytest.MonkeyPatch,
    is_seen: bool,
) -> None:
    """It was confirmed by the server before, which had ceased to decide in this moment."""
    session = copied(servers)

    def note_only() -> None:
        tell(servers, A, IN)
        with monkeypatch.context() as patch:
            patch.setattr(servers.runtime.succession, "settle_once", lambda _: False)
            servers.beat(1)

    meanwhile(SessionServer, "delete", note_only)
    if not is_seen:
        monkeypatch.setattr(servers.runtime.fleet, "shape", lambda: ())
    SessionStore(session.session_key).delete()
    servers.beat(2)
    assert servers.runtime.fleet.view().is_agreed
    assert servers.authority(session.session_key) == A
    assert servers.row(session.session_key, A) is None


def test_a_session_that_is_created_past_memory(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    """Memory has no room for it, and its server ceases to decide."""
    settled(servers)
    homes = set()
    while len(homes) < 2:
        phase = IN if "filling" in servers.phases() else FILLING
        meanwhile(SessionServer, "insert", lambda phase=phase: stand(servers, A, phase))
        with no_room_to("create"):
            key = created(n=1).session_key or ""
        homes.add(home := servers.authority(key))
        assert servers.value(key, home) == {"n": 1}


# Before a node says that it has moved


@contextmanager
def held(alias: str, key: str | None) -> Iterator[None]:
    """Have somebody's transaction hold the row in the block."""
    name = connections[alias].settings_dict["NAME"]
    with second_connection(name) as other, other.transaction():
        found = other.execute(
            "SELECT 1 FROM deferred_sessions_session WHERE session_key = %s FOR UPDATE", [key]
        )
        assert found.rowcount == 1
        yield


def test_a_row_that_somebody_holds_is_waited_for(servers: Servers) -> None:  # noqa: F811
    """Or others would be given the lease, with what stands there."""
    session = copied(servers)
    home = servers.authority(session.session_key)
    change(session, n=2)
    with held(A, session.session_key):
        tell(servers, A, IN)
        servers.beat(2)
        view = servers.runtime.fleet.view()
        assert (view.phase(A), view.is_settled) == (IN, False)
    servers.beat(2)
    assert servers.runtime.fleet.view().is_agreed
    assert home != servers.authority(session.session_key) == A
    assert servers.value(session.session_key, A) == {"n": 2}


def test_a_row_that_another_flusher_put_off_is_waited_for_too(
    servers: Servers,  # noqa: F811
    meanwhile: Meanwhile,
) -> None:
    """At the end of a request, say: its session is not due then, as far as the agent can see."""
    session = copied(servers)
    key, flusher = session.session_key or "", servers.runtime.flusher
    change(session, n=2)
    with held(A, key):
        tell(servers, A, IN)
        meanwhile(Flusher, "flush_once", lambda: flusher.flush_due([key], time.time()), before=True)
        servers.beat(1)
        assert not servers.runtime.fleet.view().is_settled
    servers.beat(2)
    assert servers.value(key, A) == {"n": 2}


def test_nobody_waits_for_a_row_for_ever(
    servers: Servers,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A transaction that nobody ends must not keep this node from all that has moved."""
    session = copied(servers)
    change(session, n=2)
    with held(A, session.session_key):
        tell(servers, A, IN)
        servers.beat(1)
        assert not servers.runtime.fleet.view().is_settled
        moving = servers.runtime.succession._moving
        later = moving._clock() + 61.0
        monkeypatch.setattr(moving, "_clock", lambda: later)
        servers.beat(1)
        assert servers.runtime.fleet.view().is_settled
    assert "rows of sessions that moved" in caplog.text
    flush(servers)
    assert servers.value(session.session_key, A) == {"n": 2}
