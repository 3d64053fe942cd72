"""What operators are told: the API, samples, Prometheus, the watching command, log events."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client, RequestFactory
from prometheus_client.parser import text_string_to_metric_families

from deferred_sessions import statistics
from deferred_sessions.exceptions import LockTimeoutError
from deferred_sessions.prometheus import metrics
from deferred_sessions.runtime import Runtime
from deferred_sessions.statistics import Counter, Gauge
from tests.integration.conftest import change, created, dirty
from tests.plugins.postgres import database_url

pytestmark = pytest.mark.django_db(transaction=True)


def test_the_api_tells_how_things_are(runtime: Runtime) -> None:
    now = time.time()
    dirty(2)
    figures = statistics.read(now + 10)
    assert figures.store.dirty == 2
    assert figures.counters[Counter.UPDATES] == 2
    assert figures.writes_avoided == 2  # two creations, two updates, two statements
    assert figures.hit_rate == 1.0
    assert figures.gauges()[Gauge.DIRTY] == 2
    assert figures.interval == 60.0
    assert figures.journal is None


def test_who_flushed_and_whether_the_poller_lives(runtime: Runtime) -> None:
    now = time.time()
    assert statistics.read(now).poller_age is None
    assert not statistics.read(now).is_poller_dead
    dirty(1)
    assert statistics.read(now + 121).is_poller_dead  # somebody should have come by now
    assert runtime.agent.flush_if_forgotten_once(now + 121)
    figures = statistics.read(now + 122)
    assert figures.last_flush is not None
    assert (figures.last_flush.by, figures.is_poller_dead) == ("agent", True)

    runtime.flusher.flush_once(now + 200)
    figures = statistics.read(now + 210)
    assert (figures.poller_age, figures.is_poller_dead) == (10.0, False)
    runtime.flusher.clear_expired(now + 250)
    assert statistics.read(now + 251).poller_age == 51.0  # that was no poller
    assert statistics.read(now + 321).is_poller_dead


def test_the_agent_keeps_samples(runtime: Runtime) -> None:
    now = 1_000_000_000.0
    assert runtime.agent.sample_figures_once(now)
    assert not runtime.agent.sample_figures_once(now + 5)
    created(a=1)
    assert runtime.agent.sample_figures_once(now + 10)
    kept = statistics.history(60, now + 20)
    assert [sample.at for sample in kept] == [now, now + 10]
    assert [sample.counters[Counter.CREATIONS] for sample in kept] == [0, 1]
    assert kept[1].gauges[Gauge.SESSIONS] == 1


def test_the_journal_is_among_the_figures(tune: Callable[..., Runtime], directory: object) -> None:
    tune(JOURNAL_DIRECTORY=f"{directory}-journal")
    dirty(1)
    journal = statistics.read().journal
    assert journal is not None
    assert journal.active > journal.unsynced > 0


def test_waiting_for_a_lock_is_counted(runtime: Runtime) -> None:
    session = created(a=1)
    other = runtime.claims.hold(session.session_key or "", frozenset({"cart"}), "me", 1.0)
    assert other is not None
    assert statistics.read().counters[Counter.LOCK_WAITS] == 0
    with pytest.raises(LockTimeoutError):
        runtime.claims.hold(session.session_key or "", frozenset({"cart"}), "you", 0.02)
    counters = statistics.read().counters
    assert (counters[Counter.LOCK_WAITS], counters[Counter.LOCK_TIMEOUTS]) == (1, 1)
    assert counters[Counter.LOCK_WAIT_MILLISECONDS] == 20
    runtime.claims.release(other)
    held = runtime.claims.hold(session.session_key or "", frozenset({"cart"}), "you", 0.02)
    assert held is not None
    assert statistics.read().counters[Counter.LOCK_WAITS] == 1
    runtime.claims.release(held)


def test_prometheus_reads_every_figure(runtime: Runtime) -> None:
    session = change(created(a=1), a=2)
    response = metrics(RequestFactory().get("/metrics"))
    text = response.content.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {
        f"deferred_sessions_{figure.name.lower()}" for figure in [*Counter, *Gauge]
    }
    (updates,) = families["deferred_sessions_updates"].samples
    assert (updates.name, updates.value) == ("deferred_sessions_updates_total", 1.0)
    assert families["deferred_sessions_dirty"].samples[0].value == 1.0
    assert families["deferred_sessions_dirty"].type == "gauge"
    assert str(session.session_key) not in text
    assert "no-store" in response["Cache-Control"]


def test_a_scrape_uses_neither_session_nor_database(
    runtime: Runtime, django_assert_num_queries: Any
) -> None:
    browser = Client()
    with django_assert_num_queries(0):
        response = browser.get("/metrics")
    assert response.status_code == 200
    assert not response.cookies
    assert browser.post("/metrics").status_code == 405


def test_a_scrape_of_a_broken_store_is_a_503(
    tune: Callable[..., Runtime], directory: object
) -> None:
    tune(DIRECTORY="/proc/nowhere")
    assert metrics(RequestFactory().get("/metrics")).status_code == 503


def test_the_command_watches(runtime: Runtime, directory: object) -> None:
    dirty(3)
    runtime.flusher.flush_once(time.time(), everything=True)
    process = subprocess.Popen(
        [sys.executable, "manage.py", "sessionstats", "--watch", "0.05"],
        env=_environment(directory),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while sum(line.startswith("updates") for line in lines) < 2:
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    text = "".join(lines)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert "3 sessions in memory, 0 not in PostgreSQL" in text
    assert re.search(r"the poller came \d+ s ago", text)
    assert "wrote 3 rows" in text


def test_a_watch_needs_time() -> None:
    created(a=1)
    with pytest.raises(CommandError, match="positive"):
        call_command("sessionstats", watch=0.0, stdout=io.StringIO())


def _environment(directory: object) -> dict[str, str]:
    import os

    return {
        **os.environ,
        "DATABASE_URL": database_url(),
        "SESSION_DIRECTORY": str(directory),
        "DEFERRED_SESSIONS": '{"STORE_SIZE": 16777216}',
        "PYTHONUNBUFFERED": "1",
    }
