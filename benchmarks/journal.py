"""What the journal costs a save, and how long a recovery takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from django.test import override_settings

from benchmarks.measure import (
    Figures,
    Goal,
    Scale,
    Table,
    median,
    medians,
    ratio,
    seconds,
    take_turns,
)
from benchmarks.sessions import content, stored
from deferred_sessions import lifecycle
from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.journal import Journal
from deferred_sessions.policy import Policy
from deferred_sessions.record import encode
from deferred_sessions.runtime import get_runtime

CYCLES, SESSIONS, PROCESSES = 20_000, 100, 8  # cycles: several intervals between syncs
ROUNDS = 13  # of those who wait for the disk
SIZE = 300  # bytes
SYNCS = 300  # to know how long one takes
ROOM = 128 << 20  # bytes: nobody flushes, so nobody swaps, and a log that grows is another one
SHORTEST = 1e-6  # seconds of a sleep
SLOW = 0.002  # seconds that a sync takes longer on the disk that is simulated
SAVER = """
import os, sys, time
import django; django.setup()
from deferred_sessions.backend import SessionStore
from deferred_sessions.runtime import get_runtime
key, count, delay, pause = sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:5])
share = int(sys.argv[5])
real = os.fdatasync
if delay:
    os.fdatasync = lambda descriptor: (time.sleep(delay), real(descriptor))
SessionStore(key)["count"]
print("ready", flush=True)
for _ in sys.stdin:
    started = time.perf_counter()
    for number in range(count):
        session = SessionStore(key)
        session["count"] = session["count"] + 1
        session.save()
        if pause and number % share:
            time.sleep(pause)
        elif pause:
            get_runtime().store.journal.sync(time.time())
    print(time.perf_counter() - started, flush=True)
"""
CYCLER = """
import sys
from functools import partial
import django; django.setup()
from benchmarks.cycles import change_and_save, per_cycle
from benchmarks.sessions import stored
from deferred_sessions.backend import SessionStore
from deferred_sessions.runtime import get_runtime
keys = [stored(SessionStore, 300) for _ in range(int(sys.argv[1]))]
get_runtime().agent.start()
print("ready", flush=True)
for _ in sys.stdin:
    print(per_cycle(partial(change_and_save, SessionStore, keys), int(sys.argv[2])), flush=True)
"""
COMMITTER = """
import sys, time
import django; django.setup()
from django.db import connection
key, count = sys.argv[1], int(sys.argv[2])
statement = "UPDATE deferred_sessions_session SET session_data = %s, version = %s, owner = 'x'"
with connection.cursor() as cursor:
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for number in range(count):
            cursor.execute(f"{statement} WHERE session_key = %s", [sys.argv[3], number + 2, key])
        print(time.perf_counter() - started, flush=True)
"""


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield what is to be reached, and the figures behind it."""
    yield from of_saves(scale)
    yield from of_strict_saves(scale)
    yield from of_recovery(scale)


@contextmanager
def host(place: Path, **settings: Any) -> Iterator[None]:
    """Be a host with these settings; its journal is on the disk of the temporary directory."""
    own = {"DIRECTORY": f"{os.environ['SESSION_DIRECTORY']}-journal-{place.name}", **settings}
    with override_settings(DEFERRED_SESSIONS=own):
        yield


def of_saves(scale: Scale) -> Iterator[Table | Goal]:
    """Yield what a save costs with a journal that is synced ten times a second.

    Two processes with an agent each take turns; a few times, because no two are laid out alike.
    """
    scale.progress("saves with and without a journal")
    figures: dict[str, list[float]] = {}
    for _ in range(scale.of(3, 1)):
        with ExitStack() as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            own = {"without": {}, "with a journal": {"JOURNAL_DIRECTORY": f"{place}/journal"}}
            pair = {name: stack.enter_context(cycler(**settings)) for name, settings in own.items()}
            take_turns(pair, 1)  # until the agents have settled
            for name, times in take_turns(pair, scale.of(8, 1)).items():
                figures.setdefault(name, []).extend(times)
    rows = [(name, f"{value * 1e6:.1f}") for name, value in medians(figures).items()]
    yield Table("load + change + save, 300 bytes, synced every 0.1 s", ("journal", "µs"), rows)
    value, spread = ratio(figures, "with a journal", "without")
    yield Goal("save with a journal, to one without", value, 1.3, spread=spread)


@contextmanager
def cycler(**settings: Any) -> Iterator[Callable[[], float]]:
    """Be a process of a host of its own that has an agent; returns its seconds per cycle."""
    directory = f"{os.environ['SESSION_DIRECTORY']}-cycler-{len(settings)}"
    environment = {"SESSION_DIRECTORY": directory, "DEFERRED_SESSIONS": json.dumps(settings)}
    try:
        with workers(CYCLER, [[str(SESSIONS), str(CYCLES)]], environment) as turn:
            yield turn
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def of_strict_saves(scale: Scale) -> Iterator[Table | Goal]:
    """Yield how many saves per second are on disk when they return."""
    scale.progress("saves that wait for the disk")
    count, many = scale.of(500, 100), f"{PROCESSES} processes"
    ceiling = f"{many} that sleep instead"
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        logs = {"JOURNAL_DIRECTORY": f"{place}/journal", "JOURNAL_SIZE": ROOM}
        stack.enter_context(host(Path(place), **logs))
        pause = longest_sleep(lone_sync(Path(place, "log")))
        candidates = {
            "1 process": savers(1, 2 * count),
            many: savers(PROCESSES, count),
            ceiling: savers(PROCESSES, count, interval=0.1, pause=pause),
            "PostgreSQL, a commit each, 1 process": committers(1, 2 * count),
            f"PostgreSQL, a commit each, {many}": committers(PROCESSES, count),
            "1 process, simulated disk": savers(1, count // 5, delay=SLOW),
            f"{many}, simulated disk": savers(PROCESSES, count // 5, delay=SLOW),
        }
        turns = {name: stack.enter_context(each) for name, each in candidates.items()}
        take_turns(turns, 1)  # to warm up
        figures = take_turns(turns, scale.of(ROUNDS, 1))
    rates = {name: 1 / value for name, value in medians(figures).items()}
    rows = [(name, f"{rate:,.0f}") for name, rate in rates.items()]
    title = (
        "updates that are on disk when they return (simulated disk: each sync 2 ms longer; to "
        f"sleep: {pause * 1e3:.2f} ms, with which it takes as long as a sync, and each "
        f"{PROCESSES}th save syncs)"
    )
    yield Table(title, ("saved by", "per second"), rows)
    what = f"saves/s of {many} that wait for the disk, to one process"
    yield at_least(figures, many, "1 process", 4, what)
    yield at_least(figures, ceiling, "1 process", 4, f"{what}; if they only slept: a limit")
    slow = (f"{many}, simulated disk", "1 process, simulated disk")
    yield at_least(figures, *slow, 4, f"{what}; simulated disk")
    for who in ("1 process", many):
        commit = f"PostgreSQL, a commit each, {who}"
        what = f"saves/s of {many} that wait for the disk, to single-row commits of {who}"
        yield at_least(figures, many, commit, 5, what)
        yield at_least(figures, ceiling, commit, 5, f"{what}; if they only slept: a limit")


def lone_sync(path: Path) -> float:
    """Return the seconds that a sync of a short write takes if nobody else wants anything."""
    with path.open("wb") as file:
        file.write(bytes(SYNCS * SIZE))
        file.flush()
        os.fsync(file.fileno())
        taken = []
        for number in range(SYNCS):
            os.pwrite(file.fileno(), b"x" * SIZE, number * SIZE)
            taken.append(seconds(partial(os.fdatasync, file.fileno())))
    return median(taken)


def longest_sleep(duration: float) -> float:
    """Return for how long to sleep to be back after `duration`: the kernel is late by its slack."""
    late = median([seconds(partial(time.sleep, SHORTEST)) for _ in range(SYNCS)])
    return max(SHORTEST, duration - late)


def at_least(figures: Figures, name: str, control: str, limit: float, what: str) -> Goal:
    """Return the goal that `name` does so many times as much in a second as `control`."""
    value, spread = ratio(figures, control, name)
    return Goal(what, value, limit, is_least=True, spread=spread)


@contextmanager
def savers(
    processes: int, count: int, *, delay: float = 0.0, interval: float = 0.0, pause: float = 0.0
) -> Iterator[Callable[[], float]]:
    """Be processes that save at the same time; returns the seconds per save.

    Syncs take longer by `delay`; who does not wait for them may sleep for a `pause` instead:
    no process can wait for less than a sync takes while another one takes over, which is what
    that costs, nor can a sync be for more saves than there are processes.
    """
    own = get_runtime().settings
    settings = {
        "JOURNAL_DIRECTORY": str(own.journal_directory),
        "JOURNAL_SIZE": ROOM,
        "SYNC_INTERVAL": interval,
    }
    environment = {
        "SESSION_DIRECTORY": str(own.directory),
        "DEFERRED_SESSIONS": json.dumps(settings),
    }
    arguments = [str(count), str(delay), str(pause), str(processes)]
    each = [[stored(SessionStore, SIZE), *arguments] for _ in range(processes)]
    with workers(SAVER, each, environment) as turn:
        yield lambda: turn() / (processes * count)


@contextmanager
def committers(processes: int, count: int) -> Iterator[Callable[[], float]]:
    """Be processes that commit each update of a row; returns the seconds per update."""
    arguments = [str(count), SessionStore().encode(content(SIZE))]
    each = [[stored(SessionStore, SIZE), *arguments] for _ in range(processes)]
    with workers(COMMITTER, each, {}) as turn:
        yield lambda: turn() / (processes * count)


@contextmanager
def workers(
    script: str, arguments: Sequence[Sequence[str]], environment: Mapping[str, str]
) -> Iterator[Callable[[], float]]:
    """Be processes that begin at the same time, when told; returns what the slowest one says."""
    started: list[subprocess.Popen[str]] = []

    def turn() -> float:
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(float(_line(process.stdout)) for process in started)

    try:
        for each in arguments:
            process = subprocess.Popen(
                [sys.executable, "-c", script, *each],
                env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        for process in started:
            _line(process.stdout)
        yield turn
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _line(told: IO[str] | None) -> str:
    line = told.readline() if told is not None else ""
    if not line:
        raise RuntimeError("A process that is measured has died.")
    return line


def of_recovery(scale: Scale) -> Iterator[Table | Goal]:
    """Yield how long it takes to rebuild memory from a full log."""
    number = scale.of(1_000_000, 50_000)
    scale.progress(f"recovering {number:,} records")
    with tempfile.TemporaryDirectory() as place:
        logs, store = Path(place, "journal"), Path(place, "store")
        store.mkdir(mode=0o700)
        payload = get_runtime().codec.encode(content(SIZE)).payload
        now, policy = time.time(), Policy(60.0)
        with host(Path(place), JOURNAL_DIRECTORY=str(logs), STORE_SIZE=1 << 30):
            runtime = get_runtime()
            identity = runtime.store.journal.identity if runtime.store.journal else ""
            journal = Journal(
                logs, store=store, size=256 << 20, sync_interval=0.1, identity=identity
            )
            journal.restart(1, [], now)
            for turn in range(number):
                key = f"{turn * 2654435761 % 2**32:032x}"
                record = lifecycle.created(
                    key, payload, "42", expires_at=now + 9e5, now=now, policy=policy
                )
                journal.append(key.encode(), encode(record))
            journal.close()
            taken = seconds(runtime.store.open)
            found = runtime.store.status().dirty
        shutil.rmtree(store)
    if found != number:
        raise RuntimeError(f"{found:,} of {number:,} records were recovered.")
    row = (f"{number:,}", f"{taken:.1f}", f"{number / taken:,.0f}")
    yield Table("recovery of memory", ("records", "s", "records/s"), [row])
    yield Goal(f"recovery of {number:,} records", median([taken]), 15, unit=" s")
