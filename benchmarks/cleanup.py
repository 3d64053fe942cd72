"""A million expired sessions are deleted while somebody writes to them.

A writer on a connection of its own extends one expired session after the other, as a node
does that has them in memory; how long it has to wait is what a visitor would feel.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
from django.db import connection
from django.utils import timezone

from benchmarks.measure import Goal, Scale, Table, seconds
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime

FILL = """
    INSERT INTO deferred_sessions_session (session_key, session_data, expire_date)
    SELECT md5(n::text), repeat('x', 400), now() - interval '1 s' * (2 + n %% 864000)
      FROM generate_series(1, %s) AS n
"""
EXTEND = """
    UPDATE deferred_sessions_session
       SET expire_date = now() + interval '1 day', version = version + 1, owner = 'writer#1',
           written_at = clock_timestamp()
     WHERE session_key = md5(%s::text)
"""


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield how long it takes, and how long the writer waits."""
    number = scale.of(1_000_000, 100_000)
    rows = []
    candidates: dict[str, Callable[[], object]] = {
        "one DELETE, as Django's": lambda: Session.objects.filter(
            expire_date__lt=timezone.now()
        ).delete(),
        "clearsessions": lambda: get_runtime().flusher.clear_expired(time.time()),
    }
    for name, clear in candidates.items():
        scale.progress(f"{name}: deleting {number:,} expired sessions")
        _fill(number)
        with Writer(number) as writer:
            took = seconds(clear)
        left = Session.objects.filter(expire_date__lt=timezone.now()).count()
        worst = max(writer.waits) * 1000
        rows.append((name, f"{took:.1f}", f"{worst:,.0f}", f"{len(writer.waits):,}", f"{left:,}"))
    header = ("", "seconds in all", "longest wait of a writer, ms", "its writes", "left over")
    yield Table(f"{number:,} expired sessions are deleted", header, rows)
    yield Goal("longest wait of a writer for clearsessions", worst, 500.0, unit=" ms")
    _fill(0)


def _fill(number: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE deferred_sessions_session")
        cursor.execute(FILL, [number])
        cursor.execute("VACUUM ANALYZE deferred_sessions_session")


class Writer:
    """Extends random sessions, and takes the time of each write."""

    def __init__(self, number: int) -> None:
        parameters: dict[str, Any] = connection.get_connection_params()
        for ours in ("context", "cursor_factory", "prepare_threshold"):
            parameters.pop(ours, None)
        self._connection = psycopg.connect(**parameters, autocommit=True)
        self._number = number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.waits: list[float] = []

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _write(self) -> None:
        while not self._stop.wait(0.001):
            key = str(random.randint(1, self._number))
            self.waits.append(seconds(lambda: self._connection.execute(EXTEND, [key])))  # noqa: B023
