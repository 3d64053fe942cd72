"""The agent's duties, each by itself; and its thread."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.core import mail
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started
from django.db import connection

from deferred_sessions import agent as agent_module
from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import StoreUnavailableError
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from deferred_sessions.servers import listener as listener_module
from deferred_sessions.servers.listener import Listener, Listeners
from tests.integration.conftest import Outage, created, dirty, row, second_connection

pytestmark = pytest.mark.django_db(transaction=True)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_flushes_if_no_poller_does(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    session = dirty(1)[0]
    now = time.time()
    assert not runtime.agent.flush_if_forgotten_once(now + 119)
    assert row(session.session_key) == {"n": 0}

    with caplog.at_level(logging.WARNING):
        assert runtime.agent.flush_if_forgotten_once(now + 121)
        assert runtime.agent.flush_if_forgotten_once(now + 242)
    assert row(session.session_key) == {"n": 1}
    assert caplog.text.count("No poller has flushed") == 1


def test_it_leaves_a_poller_alone_that_does_its_work(runtime: Runtime) -> None:
    now = time.time()
    runtime.flusher.flush_once(now)
    dirty(1)
    assert not runtime.agent.flush_if_forgotten_once(now + 100)
    runtime.flusher.flush_once(now + 110)
    assert not runtime.agent.flush_if_forgotten_once(now + 121)


def test_an_idle_node_flushes_nothing(runtime: Runtime) -> None:
    runtime.store.open()
    assert not runtime.agent.flush_if_forgotten_once(time.time() + 1e6)


def test_it_clears_dead_readers(runtime: Runtime) -> None:
    runtime.store.open()
    assert runtime.agent.clear_dead_readers_once(time.time()) == 0


def test_it_reads_revocations(runtime: Runtime) -> None:
    runtime.agent.read_revocations_once(time.time())
    session = created(a=1)
    Session.objects.all().delete()
    assert runtime.agent.read_revocations_once(time.time()) == 1
    assert SessionStore(session.session_key).load() == {}


@pytest.mark.parametrize("error", [StoreUnavailableError("no"), ValueError("no")])
def test_a_duty_that_fails_ends_nothing(
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """Trap 8: a sweeper that dies at its first error."""
    done: list[float] = []

    def fail(now: float) -> int:
        raise error

    monkeypatch.setattr(runtime.agent, "read_revocations_once", fail)
    monkeypatch.setattr(runtime.agent, "clear_dead_readers_once", done.append)
    with caplog.at_level(logging.WARNING):
        for second in range(3):
            duties = (runtime.agent.read_revocations_once, runtime.agent.clear_dead_readers_once)
            runtime.agent._round(100.0 + second, duties)

    assert done == [100.0, 101.0, 102.0]
    assert caplog.text.count("failed") == 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "ROUND", 0.02)


def test_it_hears_of_a_deletion_at_once(runtime: Runtime) -> None:
    """LISTEN: well within the second that a round takes."""
    session = created(a=1)
    runtime.agent.start()
    wait_for(lambda: runtime.store.note("revocations"))
    try:
        with second_connection() as other:
            wait_for(
                lambda: (
                    other.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
                    ).fetchone()
                    != (0,)
                )
            )
            other.execute("DELETE FROM deferred_sessions_session")
        wait_for(lambda: SessionStore(session.session_key).load() == {})
    finally:
        runtime.agent.stop()
    assert threading.active_count() < 20


def test_without_listen_the_next_round_does_it(
    runtime: Runtime, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listener, "_open", lambda self: None)
    session = created(a=1)
    runtime.agent.start()
    wait_for(lambda: runtime.store.note("revocations"))
    Session.objects.all().delete()
    wait_for(lambda: SessionStore(session.session_key).load() == {})
    runtime.agent.stop()


def test_it_hears_what_was_said_while_it_began_to_listen(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg has it already: nothing more comes from the server."""
    real = listener_module.channel_of

    def channel_of(node: str) -> str:
        with second_connection() as other:
            other.execute("SELECT pg_notify('deferred_sessions', 'g')")
        return real(node)

    monkeypatch.setattr(listener_module, "channel_of", channel_of)
    listener = Listener("default", node=lambda: "n", retry_after=1.0)
    with Listeners(lambda _: listener, lambda: ["default"]) as listeners:
        assert listeners.wait(5.0, threading.Event()) == {"g"}


def test_it_goes_on_if_it_cannot_listen(
    runtime: Runtime, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else would do what it does, and nobody would be elected in its place."""
    session = created(a=1)

    def fail(*arguments: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(Listeners, "wait", fail)
    runtime.agent.start()
    wait_for(lambda: runtime.store.note("revocations"))
    Session.objects.all().delete()
    wait_for(lambda: SessionStore(session.session_key).load() == {})
    runtime.agent.stop()


def test_it_stands_by_while_another_is_elected(runtime: Runtime, quick: None) -> None:
    runtime.store.open()
    with ProcessLock(runtime.store.directory / "agent.lock").held(wait=True):
        runtime.agent.start()
        runtime.agent.start()
        time.sleep(0.1)
        assert runtime.store.note("revocations") is None
    wait_for(lambda: runtime.store.note("revocations"))
    runtime.agent.stop()


def test_it_outlives_an_outage(runtime: Runtime, quick: None, outage: Outage) -> None:
    session = created(a=1)
    runtime.agent.start()
    wait_for(lambda: runtime.store.note("revocations"))
    with second_connection() as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
    connection.close()
    Session.objects.all().delete()
    wait_for(lambda: SessionStore(session.session_key).load() == {})
    runtime.agent.stop()


@pytest.fixture
def in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under Django's tests, which put an outbox there."""
    monkeypatch.delattr(mail, "outbox")


@pytest.mark.parametrize("sender", [WSGIHandler, ASGIHandler])
def test_the_first_request_starts_it(
    runtime: Runtime, in_production: None, sender: type[object]
) -> None:
    assert runtime.agent._thread is None
    request_started.send(sender=sender)
    assert runtime.agent._thread is not None
    assert runtime.agent._thread.is_alive()
    runtime.agent.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_died_is_started_again(
    runtime: Runtime, in_production: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ended it: even what is told to the log may raise."""
    with monkeypatch.context() as patch:
        patch.setattr(runtime.agent, "_stand", sys.exit)
        request_started.send(sender=WSGIHandler)
        wait_for(lambda: not runtime.agent.is_started)
    request_started.send(sender=WSGIHandler)
    assert runtime.agent._thread is not None
    assert runtime.agent._thread.is_alive()
    runtime.agent.stop()


def test_it_is_not_started_where_it_should_not(
    tune: Callable[..., Runtime], in_production: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the test client, by live servers of tests, or if it is turned off."""
    runtime = tune()
    request_started.send(sender=object)
    assert runtime.agent._thread is None
    monkeypatch.setattr(mail, "outbox", [], raising=False)
    request_started.send(sender=WSGIHandler)
    assert runtime.agent._thread is None
    monkeypatch.delattr(mail, "outbox")
    runtime = tune(AGENT=False)
    request_started.send(sender=WSGIHandler)
    assert runtime.agent._thread is None
