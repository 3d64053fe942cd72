"""PostgreSQL is killed under load, stays away for a while and comes back, again and again."""

from __future__ import annotations

import signal
import threading
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from deferred_sessions.backend import SessionStore
from testproject.embedded import EmbeddedServer
from tests.processes.conftest import Site, Visitor, Web, wait_until

KILLS = 3
VISITORS = 6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A PostgreSQL to be killed."""
    with EmbeddedServer(tmp_path / "postgres") as server:
        yield server


@pytest.fixture
def site(make_site: Callable[..., Site], server: EmbeddedServer) -> Site:
    site = make_site(FLUSH_INTERVAL=0.5)
    site.database = server.url
    site.run("manage.py", "migrate", "--verbosity=0")
    return site


class Load:
    """Visitors who come again and again; each knows what it was told last."""

    def __init__(self, web: Web, count: int) -> None:
        self._web = web
        self._stop = threading.Event()
        self.visitors = [Visitor() for _ in range(count)]
        self.told = [0] * count
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._visit, args=[n]) for n in range(count)]

    def __enter__(self) -> Load:
        for number, visitor in enumerate(self.visitors):
            self.told[number] = visitor.get(self._web.url("/probe/count/"))["value"]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def go_on(self) -> None:
        """Return when every visitor has been served ten times more."""
        goals = [told + 10 for told in self.told]
        wait_until(
            lambda: self.failures or all(t >= g for t, g in zip(self.told, goals, strict=True)),
            what="the visitors to be served",
        )

    def _visit(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                value = self.visitors[number].get(self._web.url("/probe/count/"))["value"]
                assert value == self.told[number] + 1
                self.told[number] = value
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            raise


def status(visitor: Visitor, url: str) -> int:
    """Return the status of the answer."""
    try:
        visitor.get(url)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def rows(url: str) -> dict[str, Any]:
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT session_key, session_data FROM deferred_sessions_session"
        ).fetchall()
    return {key: SessionStore().decode(data) for key, data in found}


def test_postgresql_is_killed_under_load(site: Site, server: EmbeddedServer) -> None:
    """Nobody in memory notices; logouts and creations hold; the unknown are asked to wait."""
    web = site.web("--workers=2")
    site.start("manage.py", "flushsessions", "--loop", "0.3")
    stranger, leaver = Visitor(), Visitor()
    stranger.get(web.url("/probe/count/"))
    leaver.get(web.url("/probe/count/"))
    left: list[str] = []
    new: list[Visitor] = []
    with Load(web, VISITORS) as load:
        for _ in range(KILLS):
            load.go_on()
            server.kill(signal.SIGQUIT)
            load.go_on()
            leaver.get(web.url("/probe/count/"))
            left.append(leaver.key)
            leaver.get(web.url("/probe/logout/"), data=b"")
            new.append(Visitor())
            assert new[-1].get(web.url("/probe/count/"))["value"] == 1
            unknown = Visitor()
            assert status(unknown, web.url("/probe/read/")) == 200
            site.run("-c", FORGET, stranger.key)
            assert status(stranger, web.url("/probe/count/")) == 503
            assert stranger.key
            server.start()
            load.go_on()
            wait_until(
                lambda: status(stranger, web.url("/probe/read/")) == 200,
                what="the breaker to close",
            )
        keys = [visitor.key for visitor in load.visitors]
    assert load.failures == []
    assert stranger.get(web.url("/probe/read/"))["value"] == 1

    expected = {key: {"count": told} for key, told in zip(keys, load.told, strict=True)}
    expected |= {visitor.key: {"count": 1} for visitor in (*new, stranger)}
    wait_until(lambda: rows(server.url) == expected, what="everything to land")
    assert not set(left) & set(rows(server.url))


FORGET = """
import os, sys
import django; django.setup()
from deferred_sessions.runtime import get_runtime
get_runtime().store.update(sys.argv[1], lambda _: None)
"""
