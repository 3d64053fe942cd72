"""A request's work on its session: load, change, save; by engine and size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from django.contrib.sessions.backends import cache, cached_db, db
from django.contrib.sessions.backends.base import SessionBase
from django.core.cache import caches

from benchmarks.measure import median, seconds, table, take_turns
from deferred_sessions.backend import SessionStore

SIZES = (300, 3_000, 30_000)  # bytes of JSON
SESSIONS = 100
ROUNDS = 15
CONTROL = "LocMemCache"


class RedisStore(cache.SessionStore):
    """Django's cache engine on Redis."""

    def __init__(self, session_key: str | None = None) -> None:
        super().__init__(session_key)
        self._cache = caches["redis"]


class CachedStore(cached_db.SessionStore):
    """Django's cached_db engine, on Redis if there is one."""

    def __init__(self, session_key: str | None = None) -> None:
        super().__init__(session_key)
        if "REDIS_URL" in os.environ:
            self._cache = caches["redis"]


# The engines and how many cycles of each make one round.
ENGINES: dict[str, tuple[Callable[..., SessionBase], int]] = {
    CONTROL: (cache.SessionStore, 2_000),
    "deferred_sessions": (SessionStore, 2_000),
    "Redis": (RedisStore, 300),
    "db": (db.SessionStore, 100),
    "cached_db": (CachedStore, 100),
}


def measure() -> Iterator[str]:
    """Yield one table for each kind of request."""
    engines = {name: engine for name, engine in ENGINES.items() if is_available(name)}
    kinds = {"load + change + save": change_and_save, "load only": load_only}
    for kind, work in kinds.items():
        rows = []
        for size in SIZES:
            medians = measure_size(engines, work, size)
            control = medians[CONTROL]
            rows += [
                (f"{size:,} bytes, {name}", f"{figure * 1e6:,.1f}", f"{figure / control:.2f}")
                for name, figure in medians.items()
            ]
        yield table((kind, "µs", f"ratio to {CONTROL}"), rows)


def is_available(name: str) -> bool:
    """Tell whether what this engine needs is running."""
    return name != "Redis" or "REDIS_URL" in os.environ


def measure_size(
    engines: dict[str, tuple[Callable[..., SessionBase], int]],
    work: Callable[[Callable[..., SessionBase], list[str], int], object],
    size: int,
) -> dict[str, float]:
    """Return each engine's median seconds per request."""
    candidates = {}
    for name, (engine, number) in engines.items():
        cycles = max(1, number * SIZES[0] * 3 // (SIZES[0] * 2 + size))
        keys = [stored(engine, size) for _ in range(SESSIONS)]
        candidates[name] = partial(per_cycle, partial(work, engine, keys), cycles)
    take_turns(candidates, 1)  # to warm up
    return {name: median(figures) for name, figures in take_turns(candidates, ROUNDS).items()}


def per_cycle(work: Callable[[int], object], cycles: int) -> float:
    """Return the seconds per cycle."""
    return seconds(partial(work, cycles)) / cycles


def change_and_save(engine: Callable[..., SessionBase], keys: list[str], cycles: int) -> None:
    """Do what a request does that changes its session."""
    for number in range(cycles):
        session = engine(keys[number % SESSIONS])
        session["counter"] = session["counter"] + 1
        session.save()


def load_only(engine: Callable[..., SessionBase], keys: list[str], cycles: int) -> None:
    """Do what a request does that only reads its session."""
    for number in range(cycles):
        engine(keys[number % SESSIONS])["counter"]


def stored(engine: Callable[..., SessionBase], size: int) -> str:
    """Store a session of about `size` bytes of JSON; return its key."""
    session = engine()
    session.update(content(size))
    session.save()
    return str(session.session_key)


def content(size: int) -> dict[str, Any]:
    """Return what a logged-in customer's session may hold, of about `size` bytes."""
    data: dict[str, Any] = {
        "_auth_user_id": "42",
        "_auth_user_backend": "django.contrib.auth.backends.ModelBackend",
        "_auth_user_hash": os.urandom(32).hex(),
        "counter": 0,
        "cart": {"12": 1, "44": 3},
    }
    number = 0
    while len(json.dumps(data, separators=(",", ":"))) < size:
        article = {"sku": f"A-{number}", "quantity": number, "price": 12.5}
        data[f"item{number}"] = article if number % 2 else "v" * 20
        number += 1
    return data
