"""Several session servers: what flushing, copies, a dead server and its repair cost.

Three PostgreSQL servers of their own, on this machine: they share its cores with each other
and with what is measured, so beside each rate stands how busy the cores were.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks.measure import Figures, Goal, Scale, Table, medians, ratio, take_turns
from testproject.embedded import EmbeddedServer

ALIASES: Final = ("one", "two", "three")
CONNECT_TIMEOUT: Final = 2  # seconds
COPIED: Final = "COPIES 2"
DIRTY: Final = 10_000  # sessions of each flush
NODE = """
import json, os, sys, time
import django; django.setup()
from benchmarks.measure import take_turns
from benchmarks.sessions import content
from deferred_sessions.backend import SessionStore
from deferred_sessions.runtime import get_runtime
runtime = get_runtime()
if "--agent" in sys.argv:
    runtime.agent.start()
keys = []

def create(count):
    for _ in range(count):
        session = SessionStore()
        session.update(content(300))
        session.save()
        keys.append(session.session_key)
    flushed()

def busy():
    fields = [int(field) for field in open("/proc/stat").readline().split()[1:8]]
    return sum(fields) - fields[3] - fields[4], sum(fields)

def flush(turn):
    for key in keys:
        session = SessionStore(key)
        session["count"] = turn
        session.save()
    before, started = busy(), time.perf_counter()
    rows = flushed()
    seconds, after = time.perf_counter() - started, busy()
    return rows / seconds, (after[0] - before[0]) / max(1, after[1] - before[1])

def flushed():
    report = runtime.flusher.flush_once(time.time(), everything=True)
    assert not report.failure, report.failure
    return report.rows

def cycle(times):
    started = time.perf_counter()
    for number in range(times):
        session = SessionStore(keys[number % 1000])
        session["count"] = number
        session.save()
    return (time.perf_counter() - started) / times * 1e6

def requests(count):
    waits = []
    for _ in range(count):
        started = time.perf_counter()
        try:
            session = SessionStore()
            session["n"] = 1
            session.save()
        except Exception:
            pass
        waits.append(time.perf_counter() - started)
    return waits

print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), flush=True)
runtime.agent.stop()
os._exit(0)
"""
REGISTER: Final = """
    INSERT INTO deferred_sessions_server (server, number, phase, since)
    SELECT server, 1, 'in', now() FROM unnest(%s::text[]) AS server
"""
FILL: Final = """
    INSERT INTO deferred_sessions_session
           (session_key, session_data, expire_date, version, fence, owner, created_at, written_at)
    SELECT key, repeat('x', 400), now() + interval '14 days', 3, 1, NULL, now(), now()
      FROM unnest(%s::text[]) AS key
"""


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield what is to be reached, and the figures behind it."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scale.progress("three session servers")
        servers = {alias: stack.enter_context(EmbeddedServer(place / alias)) for alias in ALIASES}
        sites = Sites(place, servers)
        sites.migrate()
        yield from flushes(stack, sites, scale)
        yield from cycles(stack, sites, scale)
        yield from hanging(sites, scale)
        yield from repair(sites, scale)


class Sites:
    """Makes processes that use some of the servers."""

    def __init__(self, place: Path, servers: Mapping[str, EmbeddedServer]) -> None:
        self.place = place
        self.servers = servers
        self._made = 0

    def environment(self, aliases: tuple[str, ...], **settings: Any) -> dict[str, str]:
        """Return the environment of a node with a store of its own."""
        self._made += 1
        options = {
            "SERVERS": aliases,
            "NODE": f"n{self._made}",
            "STORE_SIZE": 64 << 20,
            "WRITE_ON_CREATE": False,
            **settings,
        }
        return {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "testproject.settings",
            "SESSION_DATABASES": json.dumps({alias: self.url(alias) for alias in ALIASES}),
            "SESSION_DIRECTORY": str(self.place / f"n{self._made}"),
            "DEFERRED_SESSIONS": json.dumps(options),
        }

    def url(self, alias: str) -> str:
        """Return where a server is."""
        return f"{self.servers[alias].url}?connect_timeout={CONNECT_TIMEOUT}"

    def migrate(self) -> None:
        """Make the tables."""
        environment = self.environment(ALIASES)
        for alias in ALIASES:
            command = [sys.executable, "manage.py", "migrate", "--verbosity=0", "--database", alias]
            subprocess.run(command, env=environment, check=True)

    def empty(self, *, trusted: bool = True) -> None:
        """Remove all sessions, nodes and what is known of the servers, but that they are in."""
        for alias in ALIASES:
            with psycopg.connect(self.url(alias), autocommit=True) as connection:
                for table in ("session", "node", "server", "waiter", "revocation"):
                    connection.execute(f"TRUNCATE deferred_sessions_{table}".encode())
                if trusted:
                    connection.execute(REGISTER.encode(), [list(ALIASES)])

    def fill(self, alias: str, keys: list[str]) -> None:
        """Put rows of these keys into a server."""
        with psycopg.connect(self.url(alias), autocommit=True) as connection:
            connection.execute(FILL.encode(), [keys])
            connection.execute("ANALYZE deferred_sessions_session")


class Node:
    """A process that does what it is told."""

    def __init__(self, environment: Mapping[str, str], *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NODE, *options],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __call__(self, *call: Any) -> Any:
        """Have the process call a function; return what that returned."""
        assert self._process.stdin is not None
        print(json.dumps(call), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def flushes(stack: ExitStack, sites: Sites, scale: Scale) -> Iterator[Table | Goal]:
    """Yield how fast changed sessions are written, to one server and to three."""
    scale.progress("flushing to one server, and to three")
    sites.empty()
    kinds = {"1 server": (ALIASES[:1], 1), "3 servers": (ALIASES, 1), COPIED: (ALIASES, 2)}
    nodes: dict[str, Node] = {}
    for kind, (aliases, copies) in kinds.items():
        environment = sites.environment(aliases, COPIES=copies)
        nodes[kind] = stack.enter_context(Node(environment))  # no agent: nobody tidies up
        nodes[kind]("create", DIRTY)
    cores: Figures = {kind: [] for kind in kinds}
    turn = iter(range(1, 1000))

    def rate(kind: str) -> float:
        rows, busy = nodes[kind]("flush", next(turn))
        cores[kind].append(busy)
        return float(rows)

    rivals = {kind: partial(rate, kind) for kind in kinds if kind != COPIED}
    take_turns(rivals, 1)  # to warm up
    copied = take_turns({COPIED: partial(rate, COPIED)}, scale.of(3, 1))
    figures = take_turns(rivals, scale.of(11, 1)) | copied
    rates, busy = medians(figures), medians(cores)
    yield Table(
        f"flush of {DIRTY:,} changed sessions of 300 bytes",
        ("session servers", "sessions per second", "of the cores in use"),
        [(kind, f"{rates[kind]:,.0f}", f"{busy[kind]:.0%}") for kind in kinds],
    )
    share, spread = ratio(figures, "3 servers", "1 server")
    yield Goal("flush to 3 servers, of the rate of 1", share, 0.9, is_least=True, spread=spread)
    for node in nodes.values():
        node.__exit__()


def cycles(stack: ExitStack, sites: Sites, scale: Scale) -> Iterator[Table | Goal]:
    """Yield what a load and a save cost."""
    scale.progress("load and save with one copy, and with two")
    sites.empty()
    nodes = {}
    for kind, (aliases, copies) in {
        "1 server": (ALIASES[:1], 1),
        "3 servers": (ALIASES, 1),
        "3 servers, COPIES 2": (ALIASES, 2),
    }.items():
        environment = sites.environment(aliases, COPIES=copies, FLUSH_INTERVAL=3600)
        nodes[kind] = stack.enter_context(Node(environment))
        nodes[kind]("create", 1000)
    figures = take_turns(
        {kind: lambda n=node: float(n("cycle", 5_000)) for kind, node in nodes.items()},
        scale.of(15, 1),
    )
    found = medians(figures)
    yield Table(
        "load, change and save a session of 300 bytes",
        ("session servers", "µs"),
        [(kind, f"{found[kind]:.1f}") for kind in nodes],
    )
    share, spread = ratio(figures, "3 servers, COPIES 2", "1 server")
    yield Goal("load and save with COPIES 2, to one server", share, 1.05, spread=spread)
    for node in nodes.values():
        node.__exit__()


def hanging(sites: Sites, scale: Scale) -> Iterator[Table | Goal]:
    """Yield what a server that takes connections and never answers costs a process."""
    scale.progress("a session server that hangs")
    sites.empty()
    environment = sites.environment(
        ALIASES, HEARTBEAT_INTERVAL=0.5, SERVER_TIMEOUT=1.0, WRITE_ON_CREATE=True
    )
    with Node(environment, "--agent") as agent:
        agent("requests", 20)
        process = sites.servers["two"].process
        processes = [process, *process.children(recursive=True)]
        for each in processes:
            each.send_signal(signal.SIGSTOP)
        try:
            with Node(environment) as fresh:  # it has no connection yet
                waits = fresh("requests", 300)
        finally:
            for each in reversed(processes):
                each.send_signal(signal.SIGCONT)
    waits.sort()
    late = [wait for wait in waits if wait > 0.5 * CONNECT_TIMEOUT]
    yield Table(
        "300 new sessions in a process that starts while one of three servers hangs",
        ("", "longest", "next", "median", "waited for the server"),
        [
            (
                "seconds",
                f"{waits[-1]:.3f}",
                f"{waits[-2]:.3f}",
                f"{waits[len(waits) // 2]:.4f}",
                str(len(late)),
            )
        ],
    )
    yield Goal("requests of a process that wait for a server that hangs", len(late), 1)


def repair(sites: Sites, scale: Scale) -> Iterator[Table | Goal]:
    """Yield how fast a server is filled that was added."""
    count = scale.of(300_000, 30_000)
    scale.progress(f"filling a server with its share of {count:,} sessions")
    sites.empty(trusted=False)
    keys = [secrets.token_hex(16) for _ in range(count)]
    from deferred_sessions.servers.placement import Placement  # noqa: PLC0415

    placement = Placement(dict.fromkeys(ALIASES[:2], 1.0))
    for alias in ALIASES[:2]:
        sites.fill(alias, [key for key in keys if placement.ranked(key)[0] == alias])
    with Node(sites.environment(ALIASES), "--agent"):
        copied, seconds = watch(sites)
    rate = copied / seconds
    yield Table(
        f"a third session server is added, {count:,} sessions",
        ("rows copied", "seconds", "rows per second"),
        [(f"{copied:,}", f"{seconds:.1f}", f"{rate:,.0f}")],
    )
    yield Goal("rows copied per second by a resync", rate, 20_000, is_least=True)


def watch(sites: Sites) -> tuple[int, float]:
    """Watch the agent fill the last server; return how many rows, and in how many seconds."""
    seen: list[tuple[int, float]] = []
    with psycopg.connect(sites.url(ALIASES[-1]), autocommit=True) as connection:
        while True:
            rows = connection.execute(
                "SELECT phase, position FROM deferred_sessions_server WHERE server = %s",
                [ALIASES[-1]],
            ).fetchall()
            if rows and rows[0][0] == "in":
                break
            if rows and rows[0][1]:
                copied = json.loads(rows[0][1])[3][1]
                if not seen or copied > seen[-1][0]:
                    seen.append((copied, time.perf_counter()))
            time.sleep(0.02)
    return seen[-1][0] - seen[0][0], seen[-1][1] - seen[0][1]
