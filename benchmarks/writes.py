"""What reaches PostgreSQL: statements per 1,000 requests.

Time is simulated: ten requests a second of 200 visitors, and a poller that comes every
ten seconds, as by default.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from django.db import connection
from freezegun import freeze_time

from benchmarks.engines import DB, OURS, available, engine
from benchmarks.measure import Goal, Plot, Scale, Table
from benchmarks.sessions import stored
from deferred_sessions.memory.counters import Counter
from deferred_sessions.runtime import get_runtime

VISITORS, REQUESTS = 200, 1_000
PER_SECOND, TICK = 10, 10
LIMITS = {"that change their session": 20.0, "that only read it, SESSION_SAVE_EVERY_REQUEST": 1.0}


def measure(scale: Scale) -> Iterator[Table | Goal | Plot]:
    """Yield one table."""
    rows, bars = [], {}
    shown = (OURS, DB) if scale.quick else (OURS, DB, "cached_db (Redis)")
    names = [name for name in available() if name in shown]
    for name in names:
        scale.progress(f"counting the writes of {name}")
        warm_up = scale.of(2, 1) * REQUESTS if name == OURS else 0  # until flushes are regular
        figures = [count(name, warm_up, changes=each) for each in (True, False)]
        rows.append((name, *(f"{figure:.1f}" for figure in figures)))
        bars[name] = figures[0]
        if name == OURS:
            for (what, limit), figure in zip(LIMITS.items(), figures, strict=True):
                yield Goal(f"writing statements per 1,000 requests {what}", figure, limit)
    header = ("engine", *(f"requests {what}" for what in LIMITS))
    yield Table("statements that write, per 1,000 requests of 200 visitors", header, rows)
    yield Plot("writes", "writing statements per 1,000 changing requests", bars, "statements")


def count(name: str, warm_up: int, *, changes: bool) -> float:
    """Return how many statements write, per 1,000 requests."""
    store, chance = engine(name), random.Random(3)
    with freeze_time() as clock:
        keys = [stored(store, 300) for _ in range(VISITORS)]

        def serve(requests: int) -> None:
            for number in range(requests):
                session = store(chance.choice(keys))
                session["count"] = session["count"] + 1 if changes else session["count"]
                session.save()
                clock.tick(1 / PER_SECOND)
                if number % (PER_SECOND * TICK) == 0:
                    get_runtime().flusher.flush_once(time.time())

        serve(warm_up)
        before, writing = _ours(), 0

        def look(execute: Callable[..., Any], statement: str, *arguments: Any) -> Any:
            nonlocal writing
            writing += statement.lstrip().startswith(("UPDATE", "INSERT", "DELETE"))
            return execute(statement, *arguments)

        with connection.execute_wrapper(look):
            serve(REQUESTS)
    # Ours go past Django's cursor, and are counted by us.
    return (_ours() - before if name == OURS else writing) * 1000 / REQUESTS


def _ours() -> int:
    return get_runtime().counters.totals()[Counter.STATEMENTS]
