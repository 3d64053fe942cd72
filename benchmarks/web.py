"""Requests per second behind real web servers, and what the slowest visitors wait."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.engines import BARE, CONTROL, DB, NOTHING, OURS, REDIS, UNSHARED, available, engine
from benchmarks.measure import Figures, Goal, Plot, Scale, Table, median, medians, ratio, take_turns
from benchmarks.server import Server
from benchmarks.sessions import stored

VISITORS = 200
LOAD = 0.7  # of what the server can do
DIRTY = 10_000
REQUESTS = "each request changes its session, on a connection of its own"
COMPARED = (NOTHING, UNSHARED, BARE, OURS, REDIS, DB)  # in more rounds, for the goals
WRITING = "stores nothing, while the bare statement writes"
POLLER = """
import sys, time
from unittest.mock import patch
import django; django.setup()
from benchmarks.sessions import stored
from deferred_sessions.backend import SessionStore
from deferred_sessions.runtime import get_runtime
from deferred_sessions.servers import sql
from django.db import connection
import psycopg

def bare(keys):
    runtime = get_runtime()
    dirty, size = runtime.store.find_dirty(sorted(keys)), runtime.settings.batch_size
    columns = runtime.flusher._writer.columns
    parts = [dirty[start : start + size] for start in range(0, len(dirty), size)]
    return [runtime.server.update_parameters(columns(part), time.time()) for part in parts]

get_runtime().flusher.flush_once(time.time())  # agents know of a poller now
keys, clock = [stored(SessionStore, 300) for _ in range(int(sys.argv[1]))], time.time
for turn, _ in enumerate(sys.stdin, 1):
    with patch("time.time", lambda: clock() - get_runtime().settings.flush_interval - 1):
        for key in keys:  # they have been due for a second
            session = SessionStore(key)
            session["count"] = turn
            session.save()
    print("dirty", flush=True)
    batches = bare(keys)
    if sys.stdin.readline() == "bare\\n":
        with psycopg.Cursor(connection.connection) as cursor:
            for parameters in batches:
                cursor.execute(sql.UPDATE, parameters)
    else:
        report = get_runtime().flusher.flush_once(time.time())
        assert report.updated >= len(keys), report
    print("clean", flush=True)
"""


def measure(scale: Scale) -> Iterator[Table | Goal | Plot]:
    """Yield a table for each kind of server."""
    if shutil.which("wrk") is None:
        return
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Every worker has a LocMemCache of its own.
        names = [name for name in available(quick=scale.quick) if name != CONTROL]
        scale.progress("starting web servers")
        servers = {name: server(stack, name, place) for name in names}
        figures = rates(servers, "/probe/count/", scale)
        yield from of_gunicorn(figures)
        yield from latencies(servers, figures, scale)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [NOTHING, BARE, OURS]
        servers = {name: server(stack, name, place, asynchronous=True) for name in names}
        figures = rates(servers, "/probe/acount/", scale)
        yield from of_uvicorn(figures)


def server(stack: ExitStack, name: str, place: Path, *, asynchronous: bool = False) -> Server:
    """Start a server with an engine, and sessions for it."""
    keys = [stored(engine(name), 300) for _ in range(VISITORS)]
    started = Server(name, keys, place, asynchronous=asynchronous)
    stack.callback(started.stop)
    return started


def rates(servers: dict[str, Server], path: str, scale: Scale) -> Figures:
    """Return the seconds per request of each server, by round; of those compared for more."""

    def ask(name: str) -> float:
        return 1 / servers[name].ask(path, 1).rate

    candidates: dict[str, Callable[[], float]] = {name: partial(ask, name) for name in servers}
    scale.progress(f"asking {len(servers)} servers for {path}")
    take_turns(candidates, 1)  # to warm up
    figures = take_turns(candidates, scale.of(5, 1))
    compared = {name: candidates[name] for name in COMPARED if name in candidates}
    for name, more in take_turns(compared, scale.of(10, 0)).items():
        figures[name] += more
    return figures


def of_gunicorn(figures: Figures) -> Iterator[Table | Goal | Plot]:
    """Yield what the figures of the synchronous servers show."""
    yield table_of(f"behind gunicorn, 2 workers, wrk; {REQUESTS}", figures)
    for name, what in (
        (OURS, "requests/s, gunicorn"),
        (UNSHARED, "a dictionary in place of this engine: a limit"),
        (BARE, "bare LMDB in its place, which outlives a worker: a limit"),
    ):
        for control, limit, against in (
            (NOTHING, 0.9, "of the engine that does nothing"),
            (REDIS, 3.0, "times the Redis cache"),
            (DB, 6.0, "times db"),
        ):
            if control in figures:
                value, spread = ratio(figures, control, name)
                yield Goal(f"{what}, {against}", value, limit, is_least=True, spread=spread)
    per_second = {name: 1 / value for name, value in medians(figures).items()}
    yield Plot("requests", "requests per second behind gunicorn", per_second, "requests/s")


def of_uvicorn(figures: Figures) -> Iterator[Table | Goal | Plot]:
    """Yield what the figures of the asynchronous servers show."""
    yield table_of(f"behind uvicorn, 2 workers, async view; {REQUESTS}", figures)
    for name, what in (
        (OURS, "requests/s, uvicorn"),
        (BARE, "bare LMDB in its place: a limit"),
    ):
        value, spread = ratio(figures, NOTHING, name)
        against = f"{what}, of the engine that does nothing"
        yield Goal(against, value, 0.9, is_least=True, spread=spread)


def table_of(title: str, figures: Figures) -> Table:
    """Return the requests per second of each engine, as a share of the one that does nothing."""
    middle = medians(figures)
    rows = [
        (name, f"{1 / value:,.0f}", f"{median(figures[NOTHING][: len(figures[name])]) / value:.2f}")
        for name, value in sorted(middle.items(), key=lambda item: item[1])
    ]
    return Table(title, ("engine", "requests/s", "share"), rows)


def latencies(servers: dict[str, Server], figures: Figures, scale: Scale) -> Iterator[Table | Goal]:
    """Yield the 99th percentile at 70 % load, without sessions and while many are flushed."""
    rate = LOAD / medians(figures)[OURS]
    duration, number = scale.of(5, 2), scale.of(DIRTY, DIRTY // 4)
    scale.progress(f"asking at {rate:,.0f} requests/s while {number:,} sessions are flushed")
    with Poller(number) as poller:

        def nothing() -> float:
            return servers[NOTHING].ask("/probe/count/", duration, rate=rate).p99

        def meanwhile(name: str, what: str) -> float:
            poller.make_dirty()
            timer = threading.Timer(duration / 5, poller.flush, [what])
            timer.start()
            p99 = servers[name].ask("/probe/count/", duration, rate=rate).p99
            timer.join()
            return p99

        candidates = {
            NOTHING: nothing,
            WRITING: partial(meanwhile, NOTHING, "bare"),
            OURS: partial(meanwhile, OURS, "flush"),
        }
        take_turns(candidates, 1)  # to warm up
        results = take_turns(candidates, scale.of(7, 1))
    rows = [(name, f"{value * 1000:.1f}") for name, value in medians(results).items()]
    title = f"99th percentile at {LOAD:.0%} load for {duration} s, in which {number:,} are flushed"
    yield Table(title, ("engine", "ms"), rows)
    value, spread = ratio(results, OURS, NOTHING)
    yield Goal("p99 at 70 % load while flushing, to no sessions", value, 1.5, spread=spread)
    value, spread = ratio(results, WRITING, NOTHING)
    what = "the same without sessions, while the bare statement writes: the limit"
    yield Goal(what, value, 1.5, spread=spread)


class Poller:
    """Another process that makes many sessions dirty, and flushes them, when it is told."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> Poller:
        self._process = subprocess.Popen(
            [sys.executable, "-c", POLLER, str(self._number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def make_dirty(self) -> None:
        """Return when the sessions are dirty."""
        self._tell("dirty")

    def flush(self, how: str) -> None:
        """Return when they are written: by a "flush", or by the "bare" statements alone."""
        self._tell("clean", how)

    def _tell(self, answer: str, word: str = "go") -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("The poller has no pipes.")
        stdin.write(f"{word}\n")
        stdin.flush()
        if stdout.readline() != f"{answer}\n":
            raise RuntimeError("The poller died.")
