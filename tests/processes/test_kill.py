"""`kill -9` at any instruction, any number of times: nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
from typing import Any

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime
from tests.processes.conftest import Site, Visitor, wait_until

KILLS = 50


def decoded(key: str | None) -> Any:
    row = Session.objects.filter(pk=key).first()
    return None if row is None else row.get_decoded()


def test_workers_killed_between_save_and_flush(site: Site) -> None:
    """50 kills at random moments; every acknowledged save is there, and reaches PostgreSQL."""
    session = SessionStore()
    session["n"] = 0
    session.save()
    key, acknowledged = session.session_key, 0
    chance = random.Random(7)

    for turn in range(KILLS):
        child, pipe = _fork_worker(key)
        if turn % 2:  # else it may die before it has saved at all
            _wait_for_acknowledgement(pipe)
        delay = chance.uniform(0.0, 0.01)
        acknowledged = max(acknowledged, _read_acknowledgements(pipe, delay))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        acknowledged = max(acknowledged, _read_acknowledgements(pipe, 0.0))
        os.close(pipe)
        stored = SessionStore(key)["n"]
        assert acknowledged <= stored <= acknowledged + 1
        acknowledged = stored  # or two deaths before the word got out would add up

    assert acknowledged >= KILLS // 2
    report = get_runtime().flusher.flush_once(time.time(), everything=True)
    assert (report.updated, report.remaining) == (1, 0)
    assert decoded(key) == {"n": SessionStore(key)["n"]}


def test_many_writers_killed_at_once(site: Site) -> None:
    """Four writers on sessions of their own, killed together, eight times over."""
    keys = []
    for _ in range(4):
        session = SessionStore()
        session["n"] = 0
        session.save()
        keys.append(session.session_key)
    last = dict.fromkeys(keys, 0)

    for _ in range(8):
        workers = {key: _fork_worker(key) for key in keys}
        for _child, pipe in workers.values():
            _wait_for_acknowledgement(pipe)
        for child, _pipe in workers.values():
            os.kill(child, signal.SIGKILL)
        for key, (child, pipe) in workers.items():
            os.waitpid(child, 0)
            last[key] = max(last[key], _read_acknowledgements(pipe, 0.0))
            os.close(pipe)
            stored = SessionStore(key)["n"]
            assert last[key] <= stored <= last[key] + 1
            last[key] = stored

    assert min(last.values()) > 0
    get_runtime().flusher.flush_once(time.time(), everything=True)
    assert [decoded(key)["n"] for key in keys] == [SessionStore(key)["n"] for key in keys]


def test_gunicorn_workers_killed_under_load(site: Site) -> None:
    """Over HTTP: what a visitor was told is what the next worker knows."""
    server = site.web("--workers=2")
    visitor, told = Visitor(), 0
    for turn in range(10):
        for _ in range(5):
            told = visitor.get(server.url("/probe/count/"))["value"]
        victim = server.workers()[turn % 2]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda victim=victim: victim not in server.workers(), what="the death")
        wait_until(lambda: len(server.workers()) == 2, what="the replacement")

    assert told == 50
    assert visitor.get(server.url("/probe/read/"))["value"] == 50
    get_runtime().flusher.flush_once(time.time(), everything=True)
    assert decoded(visitor.key) == {"count": 50}


def test_a_flusher_killed_in_the_middle(site: Site) -> None:
    """Whatever it had committed or marked, the next flusher finishes the work."""
    keys = []
    for number in range(2000):
        session = SessionStore()
        session["n"] = -1
        session._session_key = f"session{number:09d}"
        session.save(must_create=True)
        keys.append(session.session_key)
    chance = random.Random(11)

    for turn in range(5):
        for number, key in enumerate(keys):
            session = SessionStore(key)
            session["n"] = number + turn
            session.save()
        flusher = site.start("-c", FLUSH, stdout=subprocess.PIPE)
        assert flusher.stdout is not None
        flusher.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.03))
        flusher.kill()
        flusher.wait()

        report = get_runtime().flusher.flush_once(time.time(), everything=True)
        assert (report.remaining, report.failure, report.vanished) == (0, "", 0)
        rows = {s.pk: s.get_decoded()["n"] for s in Session.objects.all()}
        assert rows == {key: number + turn for number, key in enumerate(keys)}


def test_two_flushers_at_once(site: Site) -> None:
    """Two commands flush the same store: nothing is lost, nothing is written twice."""
    keys = []
    for number in range(500):
        session = SessionStore()
        session["n"] = number
        session.save()
        session["n"] = number + 1000
        session.save()
        keys.append(session.session_key)

    flushers = [
        site.start("manage.py", "flushsessions", "--all", stdout=subprocess.PIPE) for _ in range(2)
    ]
    outputs = [flusher.communicate()[0].decode() for flusher in flushers]

    assert [flusher.returncode for flusher in flushers] == [0, 0]
    assert sum("500 updated" in output for output in outputs) == 1
    assert [decoded(key)["n"] for key in keys] == [number + 1000 for number in range(500)]
    assert set(Session.objects.values_list("version", flat=True)) == {2}


def test_killed_readers_do_not_fill_the_store(site: Site) -> None:
    """A reader that is killed pins old pages; they are freed when room is short."""
    session = SessionStore()
    session["n"] = "x" * 1000
    session.save()
    store = get_runtime().store
    for _ in range(5):
        child = os.fork()
        if child == 0:
            store.open()
            assert store._file.databases is not None
            _transaction = store._file.databases.env.begin()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)

    for number in range(30_000):
        session["n"] = f"{number:01000d}"
        session.save()

    assert SessionStore(session.session_key)["n"] == f"{29_999:01000d}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_flushsessions_loop_ends_well(site: Site, number: int) -> None:
    session = SessionStore()
    session["n"] = 0
    session.save()
    session["n"] = 1
    session.save()
    loop = site.start("manage.py", "flushsessions", "--loop", "0.1", stdout=subprocess.PIPE)
    assert loop.stdout is not None
    assert loop.stdout.readline().startswith(b"nothing to write; 1 dirty left")

    loop.send_signal(number)

    assert b"1 updated; 0 dirty left" in loop.communicate()[0]
    assert loop.returncode == 0
    assert decoded(session.session_key) == {"n": 1}


FLUSH = """
import time, django; django.setup()
from deferred_sessions.runtime import get_runtime
flusher = get_runtime().flusher
get_runtime().store.open()
print("ready", flush=True)
flusher.flush_once(time.time(), everything=True)
"""


def _fork_worker(key: str | None) -> tuple[int, int]:
    """Fork a process that counts up in the session; it writes each count it has saved."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        os.set_blocking(reader, False)
        return child, reader
    try:
        while True:
            session = SessionStore(key)
            session["n"] += 1
            session.save()
            os.write(writer, b"%d\n" % session["n"])
    finally:
        os._exit(1)


def _wait_for_acknowledgement(pipe: int) -> None:
    """Wait until a worker has saved at least once."""
    assert select.select([pipe], [], [], 30.0)[0]


def _read_acknowledgements(pipe: int, seconds: float) -> int:
    """Return the last count that was acknowledged within `seconds`."""
    last, rest, deadline = 0, b"", time.monotonic() + seconds
    while True:
        try:
            chunk = os.read(pipe, 65536)
        except BlockingIOError:
            chunk = b""
        if chunk:
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            if lines:
                last = int(lines[-1])
        elif time.monotonic() >= deadline:
            return last
