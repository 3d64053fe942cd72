"""When a node does not trust its memory: found dead, clocks set back, nobody who beats."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.core.handlers.wsgi import WSGIHandler
from django.db import connection

from deferred_sessions import apps
from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.pulse import moment
from deferred_sessions.models import Node
from deferred_sessions.runtime import Runtime, get_runtime
from tests.integration.conftest import Outage, change, created, row
from tests.integration.test_lease_trouble import taken_over
from tests.integration.test_leases import (
    _empty_queue,  # noqa: F401 - a fixture
    as_node,  # noqa: F401 - a fixture
    granted_to,
    kill,
    named,
)

pytestmark = pytest.mark.django_db(transaction=True)
AsNode = Callable[..., Runtime]


def at_another_time(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set the clock of the host."""
    real = time.time
    patch.setattr(time, "time", lambda: real() + seconds)


@pytest.mark.parametrize("is_dirty", [False, True], ids=["clean", "dirty"])
def test_found_dead_and_the_clock_was_set_back(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    django_assert_num_queries: Any,
    is_dirty: bool,
) -> None:
    """What entered memory at a later time than it is now is doubted all the same."""
    as_node("a")
    with monkeypatch.context() as patch:
        at_another_time(patch, 3600)
        session = created(n=1)
        if is_dirty:
            change(session, mine=True)
    taken_over(as_node, session, n=2)
    get_runtime().membership.beat_once(time.time())
    assert SessionStore(session.session_key).load()["n"] == 2
    with django_assert_num_queries(0):  # and what has entered since is not
        assert SessionStore(session.session_key).load()["n"] == 2
        change(session, n=3)


def test_found_dead_and_the_clock_is_set_back_then(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    django_assert_num_queries: Any,
) -> None:
    """What enters memory from then on is trusted, though it is earlier than the suspicion."""
    a = as_node("a")
    session = created(n=1)
    a.membership.beat_once(time.time())
    kill(a)
    a.membership.beat_once(time.time())
    at_another_time(monkeypatch, -3600)
    later = created(n=2)
    assert SessionStore(session.session_key).load() == {"n": 1}
    with django_assert_num_queries(0):
        assert SessionStore(session.session_key).load() == {"n": 1}
        assert SessionStore(later.session_key).load() == {"n": 2}
        change(session, n=3)


def test_taken_over_in_the_moment_of_the_revival(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loaded after the node knew that it was dead, and before the others knew that it lives."""
    a = as_node("a")
    session = created(n=1)
    key = session.session_key or ""
    a.membership.beat_once(time.time())
    kill(a)
    a.store.update(key, lambda _: None)
    leases = a.membership.at("default")._leases
    real = leases.beat

    def beat(traits: Any, word: str = "beat") -> Any:
        if word == "revive":
            monkeypatch.undo()
            assert SessionStore(key).load() == {"n": 1}
            b = as_node("b")
            change(session, n=2)
            b.flusher.flush_once(time.time(), everything=True)
            named(b.server.owner()).release({key: granted_to(key)[1]})
        return real(traits, word)

    monkeypatch.setattr(leases, "beat", beat)
    a.membership.beat_once(time.time())
    a.close()
    as_node("a")
    assert SessionStore(key).load() == {"n": 2}


def test_who_revives_the_node_dies(as_node: AsNode, django_assert_num_queries: Any) -> None:  # noqa: F811
    """The next heartbeat ends the time in which all is doubted."""
    a = as_node("a")
    session = created(n=1)
    a.pulse.suspect_all()
    assert SessionStore(session.session_key).load() == {"n": 1}
    a.membership.beat_once(time.time())
    assert SessionStore(session.session_key).load() == {"n": 1}
    with django_assert_num_queries(0):
        assert SessionStore(session.session_key).load() == {"n": 1}


# Without an agent


def be_served(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """Begin a request, as a web server does."""
    patch.setattr("deferred_sessions.conf.is_under_test", lambda: False)
    apps._on_request_started(WSGIHandler)
    patch.undo()


def test_a_node_without_an_agent_is_told(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    django_assert_num_queries: Any,
) -> None:
    """All its requests hit memory, and yet it learns that others have taken over."""
    a = as_node("a", AGENT=False)
    session, other = created(n=1), created(n=5)
    be_served(a, monkeypatch)
    assert SessionStore(session.session_key).load() == {"n": 1}
    with django_assert_num_queries(0):  # once for the whole node
        assert SessionStore(other.session_key).load() == {"n": 5}
        assert SessionStore(session.session_key).load() == {"n": 1}
    kill(a)
    as_node("b")
    change(session, n=2)
    get_runtime().flusher.flush_once(time.time(), everything=True)
    named(get_runtime().server.owner()).release({session.session_key or "": 1})
    a = as_node("a", AGENT=False)
    a.pulse.beat(moment() - a.pulse.patience - 1)
    assert SessionStore(session.session_key).load() == {"n": 2}


def test_a_node_without_an_agent_gives_up_what_others_want(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or they would wait for a node that beats and does not let go."""
    a = as_node("a", AGENT=False)
    wanted, used = change(created(n=1), n=2), created(n=3)
    a.store.update(wanted.session_key or "", lambda known: known and known._replace(entered_at=1.0))
    named("b#1").acquire(wanted.session_key or "")
    be_served(a, monkeypatch)
    assert SessionStore(used.session_key).load() == {"n": 3}
    assert granted_to(wanted.session_key or "") == ("b#1", 1)
    assert row(wanted.session_key) == {"n": 2}


def test_what_it_cannot_give_up_reserves_nothing(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody looks again soon, so newcomers do not wait behind who wants it."""
    a = as_node("a", AGENT=False)
    wanted, used = created(n=1), created(n=3)
    with wanted.lock("n"):
        named("b#1").acquire(wanted.session_key or "")
        be_served(a, monkeypatch)
        SessionStore(used.session_key).load()
        assert Node.objects.filter(node=a.server.owner()).exists()
        assert not a.handover.is_wanted(wanted.session_key or "")


def test_nobody_stands_in_for_an_agent_that_is_there(
    as_node: AsNode,  # noqa: F811
) -> None:
    """It is late, perhaps it was stopped; it will let go by itself."""
    a = as_node("a")
    wanted, used = created(n=1), created(n=3)
    named("b#1").acquire(wanted.session_key or "")
    a.pulse.beat(moment() - 60)
    with ProcessLock(a.store.directory / "agent.lock").held(wait=False) as is_elected:
        assert is_elected
        SessionStore(used.session_key).load()
    assert granted_to(wanted.session_key or "")[0] == a.server.owner()
    assert not a.pulse.is_late(moment())


def test_without_an_agent_an_outage_makes_nobody_doubt(
    as_node: AsNode,  # noqa: F811
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = as_node("a", AGENT=False)
    session = created(n=1)
    be_served(a, monkeypatch)
    outage.begin()
    assert SessionStore(session.session_key).load() == {"n": 1}
    change(session, n=2)
    outage.end()


def test_postgresql_hangs_and_one_request_with_it(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who asks gets no answer; the others go on with what the node knows."""
    a = as_node("a", AGENT=False, NODE_TIMEOUT=3.0)
    session = created(n=1)
    be_served(a, monkeypatch)
    with ProcessLock(a.store.directory / "stand_in.lock").held(wait=False) as is_first:
        assert is_first
        assert SessionStore(session.session_key).load() == {"n": 1}
        assert not a.pulse.is_late(moment())
    assert not Node.objects.exists()


def test_the_others_wait_for_who_asks(
    as_node: AsNode,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They serve nothing before it is known whether this node was found dead."""
    as_node("a")
    session = created(n=1)
    taken_over(as_node, session, n=2)
    a = get_runtime()
    a.pulse.beat(moment() - 60)
    found: list[Any] = []
    waits = threading.Event()
    leases = a.membership.at("default")._leases
    real_beat, real_late = leases.beat, a.pulse.is_late

    def load() -> None:
        found.append(SessionStore(session.session_key).load()["n"])
        connection.close()

    def is_late(at: float) -> bool:
        if threading.current_thread() is other:
            waits.set()
        return real_late(at)

    def beat(*arguments: Any) -> Any:
        if not waits.is_set():
            other.start()
            waits.wait()
        return real_beat(*arguments)

    other = threading.Thread(target=load)
    monkeypatch.setattr(a.pulse, "is_late", is_late)
    monkeypatch.setattr(leases, "beat", beat)
    assert SessionStore(session.session_key).load()["n"] == 2
    other.join()
    assert found == [2]
