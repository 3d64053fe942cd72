"""The session engine that a site used before, as far as its sessions are to be taken over.

Made by `runtime` for `IMPORT_ENGINE`, used by `adoption`. Reads what Django's own engines
keep without their `load`, which hides a cache that is away, and replaces expired files by
new ones. Invariant: a failure of the old engine is a `ServerUnavailableError`, never "no
such session"; and it leaves an open transaction of the application as it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from django.contrib.sessions.backends.base import SessionBase
from django.contrib.sessions.exceptions import InvalidSessionKey
from django.db import connections, transaction
from django.utils import timezone

from deferred_sessions.exceptions import NotListableError, ServerUnavailableError

KEY: Final = re.compile(r"[0-9A-Za-z_-]{8,40}").fullmatch
EXPIRY: Final = "_session_expiry"


class OldSession(NamedTuple):
    """A live session of the old engine."""

    key: str
    data: dict[str, Any]
    expires_at: float

    def __repr__(self) -> str:
        return "<OldSession>"  # no key and no data: they are secrets


class OldEngine:
    """Any engine: what its `load` returns, for as long as a new session lives."""

    def __init__(self, store: type[SessionBase]) -> None:
        self._store = store

    def read(self, key: str) -> OldSession | None:
        """Return the live session of `key`; None if there is none, or nothing in it.

        Raises:
            ServerUnavailableError: The engine cannot tell.
        """
        with reached("read"):
            found = self._find(key)
        is_alive = found is not None and found.data and found.expires_at > time.time()
        return found if is_alive else None

    def read_many(self, keys: Iterable[str]) -> list[OldSession]:
        """Return those of `keys` that are live sessions.

        Raises:
            ServerUnavailableError: see `read`.
        """
        return [found for key in keys if (found := self.read(key)) is not None]

    def delete(self, key: str) -> None:
        """Delete the session of `key`, if there is one.

        Raises:
            ServerUnavailableError: It may still be there.
        """
        with reached("delete"):
            self._store(key).delete(key)

    def count(self) -> int | None:
        """Return about how many sessions there are; None if nobody knows."""
        return None

    def pages(self, size: int) -> Iterator[list[str]]:  # noqa: ARG002 - others use it
        """Yield the keys of all sessions, also of expired ones, up to `size` at a time.

        Raises:
            NotListableError: The engine knows sessions by their keys only.
            ServerUnavailableError: It cannot be asked.
        """
        raise NotListableError(
            f"The sessions of {self._store.__module__} cannot be listed. Set "
            "DEFERRED_SESSIONS['IMPORT_ENGINE'], which takes each over when it is used."
        )

    def _find(self, key: str) -> OldSession | None:
        store: Any = self._store(key)
        data = store.load()
        return OldSession(key, data, self._expiry(store, data, time.time()))

    @staticmethod
    def _expiry(store: Any, data: dict[str, Any], modified_at: float) -> float:
        """Return when a session ends that was last saved at `modified_at`."""
        modified = datetime.fromtimestamp(modified_at, tz=UTC)
        expires: datetime = store.get_expiry_date(
            modification=modified, expiry=data.get(EXPIRY) or store.get_session_cookie_age()
        )
        return expires.timestamp()


class DatabaseEngine(OldEngine):
    """`db` and its kin: a table. `cached_db` writes to it first, so it has everything."""

    def read_many(self, keys: Iterable[str]) -> list[OldSession]:
        """Return those of `keys` that are live sessions, with one query."""
        with reached("read"):
            return [found for found in self._found(session_key__in=list(keys)) if found.data]

    def count(self) -> int | None:
        """Return how many rows there are."""
        with reached("count"):
            return int(self._rows().count())

    def pages(self, size: int) -> Iterator[list[str]]:
        """Yield the keys of all rows, in their order."""
        after = ""
        while True:
            with reached("list"):
                rows = self._rows().filter(session_key__gt=after).order_by("session_key")
                page = list(rows.values_list("session_key", flat=True)[:size])
            if not page:
                return
            after = page[-1]
            yield page

    def _find(self, key: str) -> OldSession | None:
        return next(iter(self._found(session_key=key)), None)

    def _found(self, **condition: Any) -> Iterator[OldSession]:
        store = self._store()
        rows = self._rows().filter(expire_date__gt=timezone.now(), **condition)
        for key, text, expires in rows.values_list("session_key", "session_data", "expire_date"):
            yield OldSession(key, store.decode(text), expires.timestamp())

    def _rows(self) -> Any:
        store: Any = self._store
        return store.get_model_class().objects.all()


class FileEngine(OldEngine):
    """`file`: a directory with a file for each session."""

    def count(self) -> int | None:
        """Return how many files there are."""
        return sum(map(len, self.pages(1000)))

    def pages(self, size: int) -> Iterator[list[str]]:
        """Yield the keys of all files, in their order."""
        with reached("list"):
            store: Any = self._store()
            prefix = str(store.file_prefix)
            names = sorted(path.name for path in Path(store.storage_path).iterdir())
        keys = (name[len(prefix) :] for name in names if name.startswith(prefix))
        yield from _paged((key for key in keys if KEY(key)), size)

    def _find(self, key: str) -> OldSession | None:
        store: Any = self._store(key)
        try:
            path = Path(store._key_to_file())  # noqa: SLF001 - nothing else tells the file
            text, modified_at = path.read_text("ascii"), path.stat().st_mtime
        except (FileNotFoundError, InvalidSessionKey):
            return None
        data = store.decode(text) if text else {}
        return OldSession(key, data, self._expiry(store, data, modified_at))


class CacheEngine(OldEngine):
    """`cache`: Redis, Memcached, or what else CACHES says."""

    def pages(self, size: int) -> Iterator[list[str]]:
        """Yield the keys of all sessions, some of them twice, if this is Redis.

        Raises:
            NotListableError: It is not.
        """
        store: Any = self._store()
        prefix = store.cache_key_prefix
        full: str = store._cache.make_key(prefix)  # noqa: SLF001 - as the engine itself does
        client = _redis(store)
        if client is None or store._cache.make_key(f"{prefix}x") != f"{full}x":  # noqa: SLF001
            yield from super().pages(size)
        names = client.scan_iter(match=re.sub(r"([\\*?\[\]])", r"\\\1", full) + "*", count=size)
        keys = (bytes(name).decode()[len(full) :] for name in names)
        pages = _paged((key for key in keys if KEY(key)), size)
        while True:
            with reached("list"):
                page = next(pages, None)
            if page is None:
                return
            yield page

    def _find(self, key: str) -> OldSession | None:
        store: Any = self._store(key)
        data = store._cache.get(store.cache_key_prefix + key)  # noqa: SLF001 - `load` hides errors
        if data is None:
            return None
        return OldSession(key, data, self._expires_at(store, key, data))

    def _expires_at(self, store: Any, key: str, data: dict[str, Any]) -> float:
        """Return when the entry ends: exact with Redis, else as if it was saved just now."""
        client = _redis(store)
        if client is not None:
            name = store._cache.make_key(store.cache_key_prefix + key)  # noqa: SLF001
            if (left := client.pttl(name)) > 0:
                return time.time() + float(left) / 1000
        return self._expiry(store, data, time.time())


def old_engine(store: type[SessionBase]) -> OldEngine:
    """Return what reads the sessions of this engine."""
    if hasattr(store, "get_model_class"):
        return DatabaseEngine(store)
    if hasattr(store, "_key_to_file"):
        return FileEngine(store)
    if hasattr(store, "cache_key_prefix"):
        return CacheEngine(store)
    return OldEngine(store)


@contextmanager
def reached(what: str) -> Iterator[None]:
    """Turn whatever the old engine raises into one error; undo what it did to transactions."""
    try:
        with ExitStack() as savepoints:
            for connection in connections.all(initialized_only=True):
                if connection.in_atomic_block:
                    savepoints.enter_context(transaction.atomic(using=connection.alias))
            yield
    except Exception as error:
        raise ServerUnavailableError(
            f"The engine of before (IMPORT_ENGINE) could not {what} sessions: "
            f"{type(error).__name__}."
        ) from error


def _redis(store: Any) -> Any:
    """Return the client of the primary server, if the cache is Django's own for Redis."""
    get_client = getattr(getattr(store._cache, "_cache", None), "get_client", None)  # noqa: SLF001
    return None if get_client is None else get_client(write=True)


def _paged(keys: Iterator[str], size: int) -> Iterator[list[str]]:
    while page := list(islice(keys, size)):
        yield page
