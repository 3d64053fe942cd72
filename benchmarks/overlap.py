"""Updates that are kept when requests of one visitor overlap, by engine.

Workers in several processes and threads each load a session, add one to a number in it
and save it. What is missing at the end was lost: another worker's save undid it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from django.contrib.sessions.backends.base import SessionBase

from benchmarks.measure import table
from deferred_sessions.backend import SessionStore

PROCESSES, THREADS, INCREMENTS = 4, 3, 150
ENGINES = ("deferred_sessions", "db", "cached_db", "Redis")
WAYS = ("plain", "lock")


def measure() -> Iterator[str]:
    """Yield one table."""
    from benchmarks.engines import ENGINES as CLASSES  # noqa: PLC0415 - of one process only
    from benchmarks.engines import is_available  # noqa: PLC0415

    rows = []
    for name in filter(is_available, ENGINES):
        for way in WAYS if name == "deferred_sessions" else WAYS[:1]:
            engine = CLASSES[name][0]
            kept = [run(name, engine, way, is_shared=is_shared) for is_shared in (False, True)]
            rows.append((f"{name}, under `lock`" if way == "lock" else name, *map(str, kept)))
    updates = PROCESSES * THREADS * INCREMENTS
    workers = f"{PROCESSES} processes x {THREADS} threads x {INCREMENTS} = {updates:,} updates"
    yield table((workers, "kept, a key each", "kept, one key"), rows)


def run(name: str, engine: Callable[..., SessionBase], way: str, *, is_shared: bool) -> int:
    """Return how many updates of one session were kept."""
    session = engine()
    session["begun"] = True
    session.save()
    key = str(session.session_key)
    command = [sys.executable, "-m", "benchmarks.overlap", name, way, key]
    workers = [
        subprocess.Popen([*command, "shared" if is_shared else f"own{number}"])
        for number in range(PROCESSES)
    ]
    for worker in workers:
        worker.wait()
    return sum(value for part, value in engine(key).items() if part != "begun")


def work(engine: Callable[..., SessionBase], way: str, key: str, part: str) -> None:
    """Do what one thread does."""
    for _ in range(INCREMENTS):
        session: Any = engine(key)
        if way == "lock":
            with session.lock(part, timeout=60):
                session[part] = session.get(part, 0) + 1
        else:
            session[part] = session.get(part, 0) + 1
            session.save()


def main(name: str, way: str, key: str, part: str) -> None:
    """Be one of the processes."""
    from benchmarks.engines import ENGINES as CLASSES  # noqa: PLC0415

    engine = SessionStore if name == "deferred_sessions" else CLASSES[name][0]
    parts = [part if part == "shared" else f"{part}.{number}" for number in range(THREADS)]
    threads = [threading.Thread(target=work, args=(engine, way, key, p)) for p in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    import django

    django.setup()
    main(*sys.argv[1:])
