"""The flush beside the bare statement it consists of, on the same PostgreSQL.

The bare statement gets its arrays ready-made: what is measured is PostgreSQL and the
connection. The flush finds what is due, encodes it, sends it and marks it clean; it does that
beside PostgreSQL, on the same processors: what that alone costs, a neighbour shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import LiteralString

import psycopg
from django.db import connection, transaction

from benchmarks.measure import Goal, Scale, Table, medians, ratio, seconds, take_turns
from benchmarks.sessions import content
from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime, get_runtime
from deferred_sessions.servers import sql
from deferred_sessions.servers.rows import Columns
from deferred_sessions.writer import RecordWriter

FEW, MANY = 1_000, 10_000
SIZE = 300
NEIGHBOUR = """
import django; django.setup()
from deferred_sessions.policy import NEVER
from deferred_sessions.runtime import get_runtime
flusher = get_runtime().flusher
print("ready", flush=True)
while True:
    for batch in flusher._batches(NEVER):
        flusher._writer.columns(batch)
"""


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield a table of rates, and one of what many updates do to the table."""
    rows = []
    for number, rounds in ((FEW, 3), (scale.of(MANY, MANY // 4), 9)):
        scale.progress(f"flushing {number:,} sessions")
        bench = Bench(number)
        figures = take_turns(
            {
                "bare, at once": bench.one_statement,
                "bare, in batches": bench.bare_statement,
                "with a neighbour": bench.beside_another,
                "flush": bench.flush,
            },
            scale.of(rounds, 1),
        )
        rates = (f"{number / value:,.0f}" for value in medians(figures).values())
        rows.append((f"{number:,} dirty", *rates))
    yield Table("rows per second, 300-byte sessions", ("sessions", *figures), rows)
    for name, what in (
        ("flush", f"flush of {number:,}"),
        ("with a neighbour", "bare in batches, while a neighbour finds and encodes: a limit"),
    ):
        share, spread = ratio(figures, "bare, at once", name)
        against = f"{what}, of the rows/s of the bare statement"
        yield Goal(against, share, 0.7, is_least=True, spread=spread)
    yield from wear(bench, scale)


def wear(bench: Bench, scale: Scale) -> Iterator[Table | Goal]:
    """Yield what 200,000 updates leave of the table."""
    times = scale.of(20, 2)
    number = len(bench.keys)
    scale.progress(f"flushing {number:,} sessions {times} times more")
    with connection.cursor() as cursor:
        cursor.execute("VACUUM FULL deferred_sessions_session")
    first, updates, hot = _table()
    for _ in range(times):
        bench.flush(vacuum=False)
    last, all_updates, all_hot = _table()
    share = (all_hot - hot) / max(1, all_updates - updates)
    yield Table(
        f"the table after {times * number:,} flushed updates, without a vacuum",
        ("size before, bytes", "size after", "HOT updates"),
        [(f"{first:,}", f"{last:,}", f"{share:.3f}")],
    )
    yield Goal("share of HOT updates", share, 0.95, is_least=True)
    yield Goal("size of the table after them, to its first", last / first, 1.5)


def _table() -> tuple[int, int, int]:
    """Return the size of the table, its updates and those that were HOT."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute("SELECT pg_stat_clear_snapshot()")
        cursor.execute(
            "SELECT pg_relation_size(relid), n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
            "WHERE relname = 'deferred_sessions_session'"
        )
        size, updates, hot = cursor.fetchone()
    return size, updates, hot


class Bench:
    """`number` sessions that get dirty again and again."""

    def __init__(self, number: int) -> None:
        self._runtime: Runtime = get_runtime()
        self._runtime.store.clear()
        Session.objects.all().delete()
        self._data = content(SIZE)
        with transaction.atomic():  # one commit for all
            self.keys = sorted(self._create() for _ in range(number))
        self._runtime.flusher.flush_once(time.time(), everything=True)
        self._turn = 0

    def flush(self, *, vacuum: bool = True) -> float:
        """Make all dirty, flush; return the seconds of the flush."""
        self._make_dirty()
        later = time.time() + self._runtime.settings.policy.interval + 1
        taken = seconds(partial(self._flush, later))
        if vacuum:
            self._vacuum()
        return taken

    def bare_statement(self) -> float:
        """Make all dirty, write with the statement alone, in the flusher's batches."""
        return self._bare(self._runtime.settings.batch_size)

    def beside_another(self) -> float:
        """The same, while another process does without a pause what a flush does beside it."""
        with subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        ) as neighbour:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()
            try:
                return self.bare_statement()
            finally:
                neighbour.kill()

    def one_statement(self) -> float:
        """The same with all rows in one statement, for which PostgreSQL may choose its plan."""
        return self._bare(len(self.keys), sql.UPDATE.replace("ANY(ARRAY[new.key])", "new.key"))

    def _create(self) -> str:
        session = SessionStore()
        session.update(self._data)
        session.save()
        return str(session.session_key)

    def _make_dirty(self) -> None:
        self._turn += 1
        for key in self.keys:
            session = SessionStore(key)
            session["count"] = self._turn
            session.save()

    def _flush(self, now: float) -> None:
        report = self._runtime.flusher.flush_once(now)
        if report.updated != len(self.keys):
            raise RuntimeError(f"The flush did not write everything: {report}")

    def _bare(self, size: int, statement: LiteralString = sql.UPDATE) -> float:
        self._make_dirty()
        writer: RecordWriter = self._runtime.flusher._writer  # noqa: SLF001
        dirty = sorted(self._runtime.store.find_dirty(self.keys))
        batches = [dirty[start : start + size] for start in range(0, len(dirty), size)]
        columns = [writer.columns(batch) for batch in batches]
        taken = seconds(partial(self._execute, statement, columns))
        writer.mark_written(dirty, time.time())
        self._vacuum()
        return taken

    def _execute(self, statement: LiteralString, batches: Sequence[Columns]) -> None:
        connection.ensure_connection()
        with psycopg.Cursor(connection.connection) as cursor:
            for columns in batches:
                cursor.execute(statement, self._parameters(columns))
                if cursor.rowcount != len(columns.key):
                    raise RuntimeError("The statement did not write everything.")

    def _parameters(self, columns: Columns) -> Sequence[object]:
        return self._runtime.server.update_parameters(columns, time.time())

    def _vacuum(self) -> None:
        """Let every turn find a table like the one before did."""
        with connection.cursor() as cursor:
            cursor.execute("VACUUM deferred_sessions_session")
