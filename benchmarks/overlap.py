"""Updates that are kept when requests of one visitor overlap, by engine.

Workers in several processes and threads each load a session, add one to a number in it
and save it. What is missing at the end was lost: another worker's save undid it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from benchmarks.engines import BARE, CONTROL, NOTHING, OURS, REDIS, UNSHARED, available, engine
from benchmarks.measure import Goal, Scale, Table
from benchmarks.sessions import Engine

PROCESSES, THREADS, INCREMENTS = 4, 3, 150
UPDATES = PROCESSES * THREADS * INCREMENTS
WAYS = ("plain", "lock")
LEFT_OUT = (NOTHING, UNSHARED, CONTROL, BARE, "signed_cookies")  # share or merge nothing
FIRST = (OURS, REDIS)  # for a first impression


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield one table."""
    rows = []
    for name in available():
        if name in LEFT_OUT or (scale.quick and name not in FIRST):
            continue
        for way in WAYS if name == OURS else WAYS[:1]:
            scale.progress(f"overlapping requests, {name}")
            kept = [run(name, way, is_shared=is_shared) for is_shared in (False, True)]
            rows.append((f"{name}, under `lock`" if way == "lock" else name, *map(str, kept)))
            if name == OURS:
                updates = kept[0] if way == "plain" else kept[1]
                what = "updates kept, a key each" if way == "plain" else "one key under `lock`"
                yield Goal(f"{what}, of {UPDATES:,}", updates, UPDATES, is_least=True)
    workers = f"{PROCESSES} processes x {THREADS} threads x {INCREMENTS} = {UPDATES:,} updates"
    yield Table(f"updates that are kept: {workers}", ("engine", "a key each", "one key"), rows)


def run(name: str, way: str, *, is_shared: bool) -> int:
    """Return how many updates of one session were kept."""
    store = engine(name)
    session = store()
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
    content = store(key).items()
    return sum(value for part, value in content if part.startswith(("own", "shared")))


def work(store: Engine, way: str, key: str, part: str) -> None:
    """Do what one thread does."""
    for _ in range(INCREMENTS):
        session: Any = store(key)
        if way == "lock":
            with session.lock(part, timeout=60):
                session[part] = session.get(part, 0) + 1
        else:
            session[part] = session.get(part, 0) + 1
            session.save()


def main(name: str, way: str, key: str, part: str) -> None:
    """Be one of the processes."""
    parts = [part if part == "shared" else f"{part}.{number}" for number in range(THREADS)]
    threads = [threading.Thread(target=work, args=(engine(name), way, key, p)) for p in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    import django

    django.setup()
    main(*sys.argv[1:])
