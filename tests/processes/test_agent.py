"""The agent in real web workers: elected, killed, replaced."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from django.db import connection

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime
from tests.processes.conftest import Site, Visitor, wait_until

NOTHING = b'["", 0, 0]'  # the note of an agent that has read nothing


def holder(path: Path) -> int | None:
    """Return the process that has `path` open for its lock, or None."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            try:
                if any(path == each.readlink() for each in (process / "fd").iterdir()):
                    return int(process.name)
            except OSError:
                continue
    return None


def has_read() -> bool:
    return get_runtime().store.note("revocations") is not None


def test_a_deleted_row_ends_the_session_within_a_second(site: Site) -> None:
    server = site.web("--workers=2")
    visitor = Visitor()
    assert visitor.get(server.url("/probe/count/"))["value"] == 1
    wait_until(has_read, what="the agent")
    assert visitor.get(server.url("/probe/count/"))["value"] == 2
    key = visitor.key
    assert get_runtime().store.head(key) is not None

    Session.objects.all().delete()
    wait_until(lambda: SessionStore(key).load() == {}, what="the end of the session", seconds=5)
    assert visitor.get(server.url("/probe/count/"))["value"] == 1
    assert visitor.key != key


def test_another_worker_takes_over(site: Site) -> None:
    server = site.web("--workers=3")
    visitor = Visitor()
    lock = site.directory / "agent.lock"

    def elected() -> int | None:
        visitor.get(server.url("/probe/count/"))
        return holder(lock)

    first = wait_until(elected, what="an election")
    wait_until(has_read, what="the first round")
    get_runtime().store.set_note("revocations", NOTHING)
    os.kill(first, signal.SIGKILL)
    wait_until(
        lambda: (
            elected() not in (None, first) and get_runtime().store.note("revocations") != NOTHING
        ),
        what="a successor",
    )


def test_the_agent_flushes_if_nobody_else_does(make_site: Callable[..., Site]) -> None:
    site = make_site(FLUSH_INTERVAL=0.5)
    server = site.web("--workers=2")
    visitor = Visitor()
    for _ in range(3):
        visitor.get(server.url("/probe/count/"))

    def decoded() -> object:
        row = Session.objects.filter(pk=visitor.key).first()
        return row and row.get_decoded()

    wait_until(lambda: decoded() == {"count": 3}, what="the flush")


def test_the_command_is_an_agent(site: Site) -> None:
    session = SessionStore()
    session["a"] = 1
    session.save()
    command = site.start("manage.py", "sessionagent")
    wait_until(has_read, what="the agent")
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE deferred_sessions_session")
    wait_until(lambda: SessionStore(session.session_key).load() == {}, what="the end")

    command.send_signal(signal.SIGTERM)
    assert command.wait(20) == 0
