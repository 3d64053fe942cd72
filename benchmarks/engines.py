"""The engines that are compared, and what each of them needs."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Final, NamedTuple

from benchmarks.sessions import Engine

OURS: Final = "deferred_sessions"
CONTROL: Final = "LocMemCache"
NOTHING: Final = "stores nothing"
UNSHARED: Final = "a dictionary, not shared"
BARE: Final = "bare LMDB, no bookkeeping"
REDIS: Final = "cache (Redis)"
DB: Final = "db"


class Candidate(NamedTuple):
    """A session engine under measurement."""

    module: str
    """What SESSION_ENGINE names."""
    cycles: int
    """How many cycles make a round of some milliseconds."""
    needs: str = ""
    """A variable of the environment, or a package."""
    cache: str = ""
    """The cache it is to use."""


ENGINES: Final[dict[str, Candidate]] = {
    NOTHING: Candidate("benchmarks.nothing", 2_000),
    UNSHARED: Candidate("benchmarks.unshared", 2_000),
    BARE: Candidate("benchmarks.bare", 2_000),
    CONTROL: Candidate("django.contrib.sessions.backends.cache", 2_000, cache="default"),
    OURS: Candidate("deferred_sessions.backend", 2_000),
    "signed_cookies": Candidate("django.contrib.sessions.backends.signed_cookies", 400),
    REDIS: Candidate("django.contrib.sessions.backends.cache", 300, "REDIS_URL", cache="redis"),
    DB: Candidate("django.contrib.sessions.backends.db", 70),
    "cached_db (Redis)": Candidate(
        "django.contrib.sessions.backends.cached_db", 70, "REDIS_URL", cache="redis"
    ),
    "django-qsessions": Candidate("qsessions.backends.cached_db", 70, "qsessions", cache="redis"),
    "django-user-sessions": Candidate("user_sessions.backends.db", 70, "user_sessions"),
}


def available(*, quick: bool = False) -> list[str]:
    """Return the engines whose needs are there; only Django's and ours if it is to be quick."""
    return [
        name
        for name, candidate in ENGINES.items()
        if _has(candidate.needs) and not (quick and name.startswith("django-"))
    ]


def missing() -> dict[str, str]:
    """Return what is left out, and for want of what."""
    return {name: c.needs for name, c in ENGINES.items() if not _has(c.needs)}


def engine(name: str) -> Engine:
    """Return the session store of an engine."""
    candidate = ENGINES[name]
    store: Engine = import_module(candidate.module).SessionStore
    if not candidate.cache:
        return store
    from django.core.cache import caches  # noqa: PLC0415 - needs Django to be set up

    cache = caches[candidate.cache if candidate.cache in caches else "default"]

    class SessionStore(store):  # type: ignore[misc, valid-type]
        def __init__(self, session_key: str | None = None) -> None:
            super().__init__(session_key)
            self._cache = cache

    return SessionStore


def _has(need: str) -> bool:
    return not need or need in os.environ or (need.islower() and find_spec(need) is not None)
