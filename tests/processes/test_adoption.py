"""A site comes from another engine, under load, and goes back; nobody is logged out."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.backends.db import SessionStore as OldStore
from django.contrib.sessions.models import Session as OldRow
from django.db import connection
from django.utils.crypto import get_random_string

from deferred_sessions.models import Session
from testproject.brokers import redis
from tests.processes.conftest import Site, Visitor, Web, wait_until

DJANGO = "django.contrib.sessions.backends"
VISITORS = 8
MANY = 100_000


class Load:
    """Visitors who are logged in, and come to any of `webs`."""

    def __init__(self, web: Web) -> None:
        self.webs = [web]
        self.served = [0] * VISITORS
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._visitors = [logged_in(web) for _ in range(VISITORS)]
        self._threads = [threading.Thread(target=self._visit, args=[n]) for n in range(VISITORS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def go_on(self) -> None:
        """Return when every visitor has been served ten times more, or one has been let down."""
        goals = [served + 10 for served in self.served]
        wait_until(
            lambda: self.failures or all(s >= g for s, g in zip(self.served, goals, strict=True)),
            what="the visitors to be served",
        )

    def _visit(self, number: int) -> None:
        while not self._stop.is_set():
            web = random.choice(self.webs)
            try:
                user = self._visitors[number].get(web.url("/probe/who/"))["user"]
            except OSError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return
            if user != "ann":
                self.failures.append(f"logged out after {self.served[number]} requests")
                return
            self.served[number] += 1


def logged_in(web: Web) -> Visitor:
    visitor = Visitor()
    answer = visitor.get(web.url("/probe/login/"), data=b"username=ann&password=secret")
    assert answer["user"] == "ann"
    return visitor


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[str]:
    with redis(tmp_path / "redis") as url:
        yield url


@pytest.mark.parametrize("name", ["db", "cached_db"])
def test_a_site_comes_and_goes_back_under_load(
    make_site: Callable[..., Site], tmp_path: Path, cache: str, name: str
) -> None:
    """Old and new processes serve the same visitors for a while, in both directions."""
    User.objects.create_user("ann", password="secret")
    engine = f"{DJANGO}.{name}"
    old, new = make_site(tmp_path / "old"), make_site(tmp_path / "new", IMPORT_ENGINE=engine)
    old.more = {"CACHE_URL": cache, "SESSION_ENGINE": engine}
    new.more = {"CACHE_URL": cache}
    before = old.web("--workers=2")
    with Load(before) as load:
        load.go_on()
        leaver, late = logged_in(before), logged_in(before)

        now = new.web("--workers=2")
        load.webs.append(now)
        load.go_on()
        leaver.get(now.url("/probe/who/"))
        leaver.get(now.url("/probe/logout/"), data=b"")
        assert leaver.get(before.url("/probe/who/"))["user"] != "ann"
        load.webs.remove(before)
        load.go_on()
        before.process.terminate()
        before.process.wait()
        imported = new.run("manage.py", "importsessions")
        assert late.get(now.url("/probe/who/"))["user"] == "ann"
        load.go_on()
        assert Session.objects.filter(user_id__isnull=False).count() == VISITORS + 1

        newcomer = logged_in(now)
        exported = new.run("manage.py", "exportsessions", "--engine", engine)
        after = old.web("--workers=2")
        load.webs.append(after)
        load.go_on()
        load.webs.remove(now)
        load.go_on()
        now.process.terminate()
        now.process.wait()
        since = exported.split("--since ")[1].strip()
        again = new.run("manage.py", "exportsessions", "--engine", engine, "--since", since)
        load.go_on()
        assert newcomer.get(after.url("/probe/who/"))["user"] == "ann"
        assert leaver.get(after.url("/probe/who/"))["user"] != "ann"

    assert load.failures == []
    print(f"\n{name}: {sum(load.served)} requests of {VISITORS} visitors, nobody logged out")
    print("there:", imported, "back:", exported, "again:", again)


def test_an_import_of_many_is_killed_and_resumed(site: Site) -> None:
    """By `kill -9`, in the middle of a batch; the second run does the rest."""
    text = OldStore().encode({"_auth_user_id": "7", "cart": {"lamp": 1}})
    keys = [get_random_string(32).lower() for _ in range(MANY)]
    rows = [OldRow(pk=key, session_data=text, expire_date="2099-01-01T00:00Z") for key in keys]
    OldRow.objects.bulk_create(rows, batch_size=10_000)
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM deferred_sessions_adopted")
    command = ("manage.py", "importsessions", "--engine", f"{DJANGO}.db")

    started = time.monotonic()
    process = site.start(*command, kill=True)
    wait_until(lambda: Session.objects.count() > MANY / 5, what="a part of the sessions")
    process.send_signal(signal.SIGKILL)
    process.wait()
    part, seconds = Session.objects.count(), time.monotonic() - started
    assert MANY / 5 < part < MANY

    wait_until(lambda: not others(), what="PostgreSQL to notice")
    rest = site.run(*command)

    assert set(Session.objects.values_list("pk", flat=True)) == set(keys)
    assert Session.objects.filter(user_id="7").count() == MANY
    assert Session.objects.first().get_decoded() == {"_auth_user_id": "7", "cart": {"lamp": 1}}
    print(f"\nkilled after {seconds:.1f} s with {part:,} of {MANY:,}; resumed: {rest}")


def others() -> int:
    """Return how many statements of others are under way."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND state <> 'idle'"
        )
        return int(cursor.fetchone()[0])
