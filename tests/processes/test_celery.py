"""A real Celery worker with beat: the poller on real brokers."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime
from deferred_sessions.schedule import CLEAR_TASK, FLUSH_TASK
from tests.processes.conftest import Site, Visitor, wait_until

TICK = 1.0
INTERVAL = 2.0

BROKERS = [
    "filesystem",
    pytest.param("REDIS_URL", marks=pytest.mark.broker("redis")),
    pytest.param("RABBITMQ_URL", marks=pytest.mark.broker("rabbitmq")),
]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment that names a broker; CI provides all of them."""
    environment = {"FLUSH_TICK": str(TICK), "BROKER_DIRECTORY": str(tmp_path / "broker")}
    for folder in ("messages", "control"):
        (tmp_path / "broker" / folder).mkdir(parents=True)
    if request.param == "filesystem":
        return {**environment, "BROKER_URL": "filesystem://"}
    if request.param not in os.environ:
        if "CI" in os.environ:
            pytest.fail(f"{request.param} is not set, but CI must test this broker.")
        pytest.skip(f"{request.param} is not set.")
    return {**environment, "BROKER_URL": os.environ[request.param]}


def start_worker(
    site: Site, environment: dict[str, str], *options: str, name: str = "one"
) -> subprocess.Popen[bytes]:
    return site.start(
        *("-m", "celery", "-A", "testproject", "worker", "--loglevel=INFO"),
        *("--concurrency=2", f"--hostname={name}@test", "--without-mingle", *options),
        env=environment,
        kill=True,
    )


def changed() -> SessionStore:
    session = SessionStore()
    session["n"] = 0
    session.save()
    session["n"] = 1
    session.save()
    return session


def is_flushed(session: SessionStore) -> bool:
    return bool(Session.objects.get(pk=session.session_key).get_decoded() == {"n": 1})


def test_worker_and_beat_flush_within_interval_and_one_tick(
    make_site: Callable[..., Site], broker: dict[str, str], tmp_path: Path
) -> None:
    """A05, D06: beat ticks, the worker on the host writes what is due, in time."""
    site = make_site(FLUSH_INTERVAL=INTERVAL)
    start_worker(site, broker, "--beat", f"--schedule={tmp_path / 'schedule'}")
    wait_until(get_runtime().flusher.last_report, what="the first tick")

    began = time.time()
    session = changed()
    due = time.time() + INTERVAL
    assert not is_flushed(session) or time.time() > began + INTERVAL

    ticks: set[float] = set()

    def a_tick_that_finds_it_due() -> bool:
        report = get_runtime().flusher.last_report()
        assert report is not None
        ticks.add(report.at)
        return report.at >= due and not report.failure

    # Told by what the ticks say of themselves: how late a busy machine makes them is not ours.
    wait_until(a_tick_that_finds_it_due, what="a tick after the interval")
    assert is_flushed(session)
    wait_until(lambda: a_tick_that_finds_it_due() and len(ticks) > 3, what="more ticks")
    assert min(b - a for a, b in itertools.pairwise(sorted(ticks))) < 2 * TICK


def test_the_tick_reaches_the_worker_of_every_node(
    make_site: Callable[..., Site], broker: dict[str, str], tmp_path: Path
) -> None:
    """A10: two nodes, one beat: the worker on each flushes the store of its own host.

    On Redis a Broadcast message is lost unless the publisher declares the exchange.
    """
    nodes = []
    for number in range(2):
        site = make_site(tmp_path / f"node{number}", FLUSH_INTERVAL=1.0)
        session = changed()
        nodes.append((site, session))
    for number, (site, _) in enumerate(nodes):
        # The second worker listens to a queue of its own only, as its operator told it.
        start_worker(site, broker, f"--queues=queue{number}", name=f"node{number}")
    site.start(
        *("-m", "celery", "-A", "testproject", "beat"),
        *("--schedule", str(tmp_path / "schedule"), "--pidfile="),
        env=broker,
        kill=True,
    )

    for _, session in nodes:
        wait_until(lambda session=session: is_flushed(session), what="the flush on each node")


PUBLISH = """
from kombu.exceptions import OperationalError
from testproject.celery import app
from deferred_sessions.tasks import flush
for _ in range(3):
    flush.delay()
channel = app.connection_for_write().channel()
try:
    print("waiting", channel.queue_declare("deferred_sessions", passive=True).message_count)
except channel.connection.client.channel_errors:
    print("waiting", 0)
"""


def test_ticks_that_no_worker_takes_pile_up_nowhere(site: Site, broker: dict[str, str]) -> None:
    """A queue that nobody reads would grow for as long as beat runs."""
    assert site.run("-c", PUBLISH, env=broker).split()[-2:] == ["waiting", "0"]


@pytest.fixture
def database_scheduler(make_site: Callable[..., Site]) -> Iterator[dict[str, str]]:
    """The environment of a site that keeps its schedule in tables, which are made for it."""
    if importlib.util.find_spec("django_celery_beat") is None:
        pytest.skip("django-celery-beat is not installed; it does not support this Django yet.")
    site, environment = make_site(), {"EXTRA_APPS": "django_celery_beat"}
    site.run("manage.py", "migrate", "django_celery_beat", env=environment)
    yield environment
    site.run("manage.py", "migrate", "django_celery_beat", "zero", env=environment)


@pytest.mark.parametrize("broker", ["filesystem"], indirect=True)
def test_django_celery_beat_takes_the_entry_from_the_settings(
    make_site: Callable[..., Site], broker: dict[str, str], database_scheduler: dict[str, str]
) -> None:
    """A05: a schedule kept in the database drives the poller as well.

    It does not take over the entry's `expires`; the one of the task itself stands in.
    """
    site = make_site(FLUSH_INTERVAL=1.0)
    environment = broker | database_scheduler
    start_worker(
        *(site, environment, "--beat"),
        *("--scheduler", "django_celery_beat.schedulers:DatabaseScheduler"),
    )
    session = changed()
    wait_until(lambda: is_flushed(session), what="the flush")

    listing = "from django_celery_beat.models import PeriodicTask as T; "
    listing += "print(*T.objects.values_list('task', flat=True))"
    entries = site.run("manage.py", "shell", "-c", listing, env=environment)
    assert {FLUSH_TASK, CLEAR_TASK} <= set(entries.split())


def test_web_workers_and_poller_together(make_site: Callable[..., Site], tmp_path: Path) -> None:
    """The whole: requests through several web workers, written by the poller behind them."""
    for folder in ("messages", "control"):
        (tmp_path / folder).mkdir()
    broker = {"BROKER_DIRECTORY": str(tmp_path), "FLUSH_TICK": "0.5"}
    site = make_site(FLUSH_INTERVAL=1.0)
    server = site.web("--workers=2")
    start_worker(site, broker, "--beat", f"--schedule={tmp_path / 'schedule'}")
    visitors = [Visitor() for _ in range(5)]
    for _ in range(20):
        for visitor in visitors:
            visitor.get(server.url("/probe/count/"))

    def stored() -> Any:
        return [Session.objects.get(pk=visitor.key).get_decoded()["count"] for visitor in visitors]

    wait_until(lambda: stored() == [20] * 5, what="the flush of all visitors")
    wait_until(lambda: get_runtime().store.status().dirty == 0, what="a clean store")
