"""The commands and the tasks, as an operator and a worker call them."""

from __future__ import annotations

import ast
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from django.core.management import CommandError, ManagementUtility, call_command
from kombu import Exchange

from deferred_sessions import tasks
from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import StoreUnavailableError
from deferred_sessions.flusher import Flusher
from deferred_sessions.models import Session
from deferred_sessions.report import FlushReport
from deferred_sessions.runtime import Runtime
from deferred_sessions.schedule import CLEAR_TASK, FLUSH_TASK, beat_schedule
from tests.integration.conftest import Outage, row

pytestmark = pytest.mark.django_db(transaction=True)


def run(*arguments: str) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def dirty() -> SessionStore:
    session = SessionStore()
    session["n"] = 0
    session.save()
    session["n"] = 1
    session.save()
    return session


def test_flushsessions_writes_what_is_due() -> None:
    dirty()

    assert re.fullmatch(r"nothing to write; 1 dirty left; \d+ ms\n", run("flushsessions"))


def test_flushsessions_all() -> None:
    session = dirty()

    assert run("flushsessions", "--all").startswith("1 updated; 0 dirty left; ")
    assert row(session.session_key) == {"n": 1}


def test_flushsessions_fails_loudly(outage: Outage) -> None:
    dirty()
    outage.begin()

    with pytest.raises(CommandError, match="1 sessions stay dirty: PostgreSQL cannot be asked"):
        run("flushsessions", "--all")


def test_flushsessions_tells_a_broken_store(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"DIRECTORY": "/nonexistent/place"}

    with pytest.raises(CommandError, match="Cannot create the session directory"):
        run("flushsessions")


def test_flushsessions_steps_aside(runtime: Runtime) -> None:
    dirty()
    out: list[str] = []
    with runtime.flusher._lock.held(wait=True):
        thread = threading.Thread(target=lambda: out.append(run("flushsessions")))
        thread.start()
        thread.join()

    assert out == ["Another flusher of this node is at work; nothing done.\n"]


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_flushsessions_loop_needs_a_time(seconds: str) -> None:
    with pytest.raises(CommandError, match="positive number of seconds"):
        run("flushsessions", "--loop", seconds)


def test_flushsessions_loop_writes_everything_when_it_is_stopped() -> None:
    session = dirty()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM)).start()
    try:
        out = run("flushsessions", "--loop", "0.05")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    assert out.count("nothing to write") >= 1
    assert out.splitlines()[-1].startswith("1 updated; 0 dirty left")
    assert row(session.session_key) == {"n": 1}


def test_flushsessions_loop_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store cannot be opened now, say: the service must not be gone when it can."""
    session = dirty()
    real = Flusher.flush_once
    calls: list[float] = []

    def first_fails(self: Flusher, now: float, *, everything: bool = False) -> FlushReport:
        calls.append(now)
        if len(calls) == 1:
            raise StoreUnavailableError("not now")
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, now, everything=everything)

    monkeypatch.setattr(Flusher, "flush_once", first_fails)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run("flushsessions", "--loop", "0.01")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    assert len(calls) >= 3
    assert row(session.session_key) == {"n": 1}


def test_flushsessions_prints_the_beat_entry() -> None:
    """What is printed is what `beat_schedule` returns, ready to paste."""
    name, _, value = run("flushsessions", "--beat").partition(" = ")

    assert name == "CELERY_BEAT_SCHEDULE"
    assert ast.literal_eval(value) == beat_schedule()


def test_clearsessions_works() -> None:
    """Django's own command."""
    session = dirty()
    Session.objects.create(
        session_key="longexpired", session_data="", expire_date="2020-01-01T00:00Z"
    )

    run("clearsessions")

    assert set(Session.objects.values_list("pk", flat=True)) == {session.session_key}


def test_clearsessions_while_postgresql_is_away(
    outage: Outage, capsys: pytest.CaptureFixture[str]
) -> None:
    """Django's command says it in one line, as a shell or cron is to see it."""
    outage.begin()

    with pytest.raises(SystemExit, match="1"):
        ManagementUtility(["manage.py", "clearsessions"]).execute()

    errors = capsys.readouterr().err
    assert errors.startswith(
        "NotClearedError: Expired sessions could not be deleted now: PostgreSQL"
    )
    assert "Traceback" not in errors


def test_help_says_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("flushsessions", "--help")

    text = " ".join(capsys.readouterr().out.split())
    assert "as the user, of the web processes" in text
    assert all(option in text for option in ("--all", "--loop", "--beat"))


# Tasks


def test_the_flush_task(runtime: Runtime) -> None:
    dirty()
    assert tasks.flush() == {"rows": 0, "remaining": 1, "failure": ""}


def test_the_flush_task_does_nothing_on_a_host_without_sessions(directory: Any) -> None:
    """A worker elsewhere gets the tick, too; it must not make a store."""
    assert tasks.flush() is None
    assert not directory.exists()


def test_the_clear_task(directory: Any) -> None:
    Session.objects.create(
        session_key="longexpired", session_data="", expire_date="2020-01-01T00:00Z"
    )

    tasks.clear_expired()

    assert not Session.objects.exists()
    assert not directory.exists()


def test_the_names_in_the_schedule_are_those_of_the_tasks() -> None:
    assert {entry["task"] for entry in beat_schedule().values()} == {FLUSH_TASK, CLEAR_TASK}
    assert tasks.flush.name == FLUSH_TASK
    assert tasks.clear_expired.name == CLEAR_TASK


def test_ticks_expire() -> None:
    """After an outage of the broker, one flush does the work of all that were missed."""
    entry = beat_schedule(5.0)["deferred-sessions-flush"]

    assert entry["schedule"] == entry["options"]["expires"] == 5.0
    assert tasks.flush.expires == 10.0
    assert tasks.flush.ignore_result


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the task would hand to Celery."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "celery.Task.apply_async", lambda self, *args, **options: calls.append(options)
    )
    return calls


def test_ticks_go_to_every_node(sent: list[dict[str, Any]]) -> None:
    """The exchange is declared by the publisher: on Redis the message is lost otherwise."""
    tasks.flush.apply_async()

    assert sent[0]["queue"].exchange == Exchange("deferred_sessions", type="fanout")
    assert sent[0]["declare"] == [Exchange("deferred_sessions", type="fanout")]


@pytest.mark.parametrize("option", ["queue", "exchange"])
def test_a_queue_of_ones_own_wins(sent: list[dict[str, Any]], option: str) -> None:
    tasks.flush.apply_async(**{option: "mine"})

    assert sent == [{option: "mine"}]


def test_every_worker_listens_to_ticks() -> None:
    """Whatever its `-Q` says."""
    app = Celery(broker="memory://")
    app.amqp.queues.select(["celery"])

    tasks._listen_to_ticks(instance=type("Worker", (), {"app": app}))

    exchanges = {queue.exchange.name for queue in app.amqp.queues.consume_from.values()}
    assert exchanges == {"celery", "deferred_sessions"}


def test_a_tick_in_time_needs_no_celery(tune: Callable[..., Runtime]) -> None:
    runtime = tune(FLUSH_INTERVAL=0.01)
    session = dirty()
    time.sleep(0.02)

    assert tasks.flush() == {"rows": 1, "remaining": 0, "failure": ""}
    assert row(session.session_key) == {"n": 1}
    assert runtime.store.status().dirty == 0


def test_flushsessions_as_another_user_than_the_site(
    tune: Callable[..., Runtime], tmp_path: Path
) -> None:
    """Root's own store would be empty: "nothing to write" would be a lie."""
    theirs = tmp_path / "deferred-sessions-99-0123456789ab"
    theirs.mkdir()
    os.chown(theirs, os.geteuid(), -1)
    runtime = tune(DIRECTORY=str(tmp_path / "deferred-sessions-0-0123456789ab"))

    with pytest.raises(CommandError, match="Run it as the user of the web processes"):
        call_command("flushsessions")
    assert not runtime.store.exists()


def test_the_flush_task_as_another_user(
    tune: Callable[..., Runtime], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deferred-sessions-99-0123456789ab").mkdir()
    tune(DIRECTORY=str(tmp_path / "deferred-sessions-0-0123456789ab"))

    assert tasks.flush() is None
    assert "Nothing is flushed: the sessions of this host belong to user" in caplog.text
