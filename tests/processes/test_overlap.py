"""Requests of one visitor that overlap, in real processes with threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime
from tests.processes.conftest import Site, Visitor

PROCESSES, THREADS, INCREMENTS = 4, 3, 150
EXCLUSIVE = {"LOCKING": "exclusive", "LOCK_TIMEOUT": 60}
GUNICORN = {"options": ("--workers=2", "--threads=4"), "application": "testproject.wsgi"}
UVICORN = {
    "options": ("--workers=2", "--worker-class=uvicorn_worker.UvicornWorker"),
    "application": "testproject.asgi",
}

INCREMENT = """
import sys, threading
import django; django.setup()
from deferred_sessions.backend import SessionStore
key, process, threads, increments = sys.argv[1], *map(int, sys.argv[2:])
def work(name):
    for _ in range(increments):
        session = SessionStore(key)
        session[name] = session.get(name, 0) + 1
        session.save()
workers = [threading.Thread(target=work, args=(f"{process}.{n}",)) for n in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
"""


def test_d07_no_increment_of_different_keys_is_lost(site: Site) -> None:
    """D07: four processes with three threads each; Django's engines lose most of it."""
    session = SessionStore()
    session.save()
    counts = (str(THREADS), str(INCREMENTS))
    workers = [
        site.start("-c", INCREMENT, str(session.session_key), str(process), *counts)
        for process in range(PROCESSES)
    ]
    assert [worker.wait(120) for worker in workers] == [0] * PROCESSES

    expected = {f"{p}.{t}": INCREMENTS for p in range(PROCESSES) for t in range(THREADS)}
    assert SessionStore(session.session_key).load() == expected
    assert get_runtime().counters.totals()[Counter.CONFLICTS] == 0
    get_runtime().flusher.flush_once(time.time(), everything=True)
    assert Session.objects.get().get_decoded() == expected


def test_d07_the_same_over_http(site: Site) -> None:
    """Several tabs of one visitor, on three servers with threads."""
    servers = [site.web("--workers=1", "--threads=4") for _ in range(3)]
    visitor = Visitor()
    visitor.get(servers[0].url("/probe/count/"))

    def tab(number: int) -> None:
        for turn in range(20):
            visitor.get(servers[(number + turn) % 3].url(f"/probe/count/tab{number}/"))

    with ThreadPoolExecutor(6) as crowd:
        list(crowd.map(tab, range(6)))

    session = SessionStore(visitor.key).load()
    assert session == {"count": 1, **{f"tab{number}": 20 for number in range(6)}}


MODES = {
    "lock": """
        session = SessionStore(key)
        with session.lock("n", timeout=60):
            session["n"] = session.get("n", 0) + 1""",
    "exclusive": """
        with get_runtime().busy.request():
            session = SessionStore(key)
            session["n"] = session.get("n", 0) + 1
            session.save()""",
}

ONE_KEY = """
import sys, threading
import django; django.setup()
from deferred_sessions.backend import SessionStore
from deferred_sessions.runtime import get_runtime
key, process, threads, increments = sys.argv[1], *map(int, sys.argv[2:])
def work(name):
    for _ in range(increments):{}
workers = [threading.Thread(target=work, args=(f"{{process}}.{{n}}",)) for n in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
"""


@pytest.mark.parametrize("way", ["lock", "exclusive"])
def test_one_key_is_exact(make_site: Callable[..., Site], way: str) -> None:
    """B05, C05: twelve workers add to one number, each under its lock; or one at a time."""
    options = {"LOCKING": "exclusive", "LOCK_TIMEOUT": 60} if way == "exclusive" else {}
    site = make_site(**options)
    session = SessionStore()
    session.save()
    counts = (str(THREADS), str(INCREMENTS))
    program = ONE_KEY.format(MODES[way])
    workers = [
        site.start("-c", program, str(session.session_key), str(process), *counts)
        for process in range(PROCESSES)
    ]
    assert [worker.wait(120) for worker in workers] == [0] * PROCESSES

    assert SessionStore(session.session_key).load() == {"n": PROCESSES * THREADS * INCREMENTS}


@pytest.mark.parametrize(
    ("server", "path", "options"),
    [
        (GUNICORN, "/probe/locked/", {}),
        (GUNICORN, "/probe/exclusive/", {}),
        (GUNICORN, "/probe/count/", EXCLUSIVE),
        (UVICORN, "/probe/alocked/", {}),
        (UVICORN, "/probe/acount/", EXCLUSIVE),
    ],
    ids=["lock", "decorator", "exclusive", "lock-uvicorn", "exclusive-uvicorn"],
)
def test_one_key_is_exact_over_http(
    make_site: Callable[..., Site], server: Any, path: str, options: dict[str, Any]
) -> None:
    """Six tabs of one visitor count on one number."""
    site = make_site(**options)
    servers = [site.web(*server["options"], application=server["application"]) for _ in range(2)]
    visitor = Visitor()
    assert visitor.get(servers[0].url(path))["value"] == 1

    def tab(number: int) -> None:
        for turn in range(20):
            visitor.get(servers[(number + turn) % 2].url(path))

    with ThreadPoolExecutor(6) as crowd:
        list(crowd.map(tab, range(6)))

    assert SessionStore(visitor.key).load()["count"] == 121
