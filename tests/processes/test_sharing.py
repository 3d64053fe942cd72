"""Several server processes, one store: real gunicorn workers over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime
from tests.processes.conftest import Site, Visitor, wait_until


def test_b01_three_processes_serve_one_session_in_turn(site: Site) -> None:
    """B01: each uses what the one before stored."""
    servers = [site.web("--workers=1") for _ in range(3)]
    visitor = Visitor()

    answers = [visitor.get(server.url("/probe/count/")) for server in servers * 3]

    assert [answer["value"] for answer in answers] == list(range(1, 10))
    assert len({answer["pid"] for answer in answers}) == 3
    assert {answer["session"] for answer in answers[1:]} == {visitor.key}


def test_b03_the_store_is_mapped_into_every_process(site: Site) -> None:
    """B03: one memory-mapped file in the address space of each."""
    server = site.web("--workers=2")
    visitor = Visitor()
    seen = {visitor.get(server.url("/probe/count/"))["pid"] for _ in range(60)}

    for pid in seen:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        mapped = [line for line in maps if str(site.directory / "data.mdb") in line]
        assert mapped
        assert "rw-s" in mapped[0]


def test_a01_several_workers_one_database(site: Site) -> None:
    """A01: workers keep the sessions, PostgreSQL has copies, and they agree in the end."""
    servers = [site.web("--workers=1") for _ in range(3)]
    visitors = [Visitor() for _ in range(10)]

    def visit(visitor: Visitor) -> list[dict[str, int]]:
        return [visitor.get(server.url("/probe/count/")) for server in servers * 2]

    with ThreadPoolExecutor(10) as crowd:
        answers = list(crowd.map(visit, visitors))

    assert [[answer["value"] for answer in own] for own in answers] == [[1, 2, 3, 4, 5, 6]] * 10
    assert len({answer["pid"] for own in answers for answer in own}) == 3
    decoded = {s.pk: s.get_decoded() for s in Session.objects.all()}
    assert decoded == {visitor.key: {"count": 1} for visitor in visitors}
    get_runtime().flusher.flush_once(time.time(), everything=True)
    decoded = {s.pk: s.get_decoded() for s in Session.objects.all()}
    assert decoded == {visitor.key: {"count": 6} for visitor in visitors}


def test_counters_are_those_of_all_processes(site: Site) -> None:
    server = site.web("--workers=3")
    visitor = Visitor()
    for _ in range(30):
        visitor.get(server.url("/probe/count/"))

    def requests() -> int:
        return get_runtime().counters.totals()[Counter.REQUESTS]

    wait_until(lambda: requests() == 31, what="the end of the last; one asked whether it is up")
    totals = get_runtime().counters.totals()
    assert totals[Counter.UPDATES] == 29
    assert totals[Counter.CREATIONS] == 1


@pytest.mark.parametrize("threads", [1, 4])
def test_forked_after_first_use(site: Site, threads: int) -> None:
    """`gunicorn --preload`, where the master has used a session before it forks."""
    server = site.web(
        "--preload",
        "--workers=3",
        f"--threads={threads}",
        application="tests.processes.preloading",
    )
    visitor = Visitor()

    values = [visitor.get(server.url("/probe/count/"))["value"] for _ in range(30)]

    assert values == list(range(1, 31))


def test_a_restart_of_all_workers_loses_nothing(make_site: Callable[..., Site]) -> None:
    """Design 7: a deploy. The store outlives every process."""
    site = make_site()
    visitor = Visitor()
    for round_ in range(3):
        server = site.web("--workers=2")
        assert visitor.get(server.url("/probe/count/"))["value"] == round_ + 1
        site.stop()

    assert Session.objects.get().get_decoded() == {"count": 1}
    assert get_runtime().store.status().dirty == 1


def test_a_worker_that_works_before_the_store_exists(site: Site) -> None:
    """Many processes find no store at the same moment; one makes it."""
    servers = [site.start("-c", MAKE) for _ in range(8)]

    assert [server.wait(60) for server in servers] == [0] * 8
    assert get_runtime().store.status().records == 8


MAKE = """
import django; django.setup()
from deferred_sessions.backend import SessionStore
session = SessionStore(); session["a"] = 1; session.save()
assert SessionStore(session.session_key)["a"] == 1
"""
