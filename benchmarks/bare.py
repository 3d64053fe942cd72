"""A session engine that keeps encoded sessions in a bare LMDB, shared by the host's processes.

The least that an engine can do whose sessions outlive a killed worker: no expiry, no due times, no
leases, nothing for PostgreSQL. Shows what share of the engine that does nothing is left then.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import lmdb
from django.contrib.sessions.backends.base import SessionBase
from django.utils.crypto import get_random_string

from benchmarks.nothing import CONTENT, SessionMiddleware

__all__ = ["SessionMiddleware", "SessionStore"]
ENCODED = json.dumps(CONTENT, separators=(",", ":")).encode()
OPTIONS: dict[str, Any] = {"sync": False, "writemap": True, "map_async": True, "meminit": False}


@functools.cache
def opened(process: int) -> lmdb.Environment:  # noqa: ARG001 - LMDB must not cross a fork
    """Return the store, opened as ours is."""
    return lmdb.open(f"{os.environ['SESSION_DIRECTORY']}-bare", 64 << 20, **OPTIONS)


class SessionStore(SessionBase):
    """Decodes with each load, encodes with each save."""

    def load(self) -> dict[str, Any]:
        """Return the session; one that was never saved has the content of all."""
        with opened(os.getpid()).begin(buffers=True) as txn:
            found = txn.get(str(self._session_key).encode())
            session: dict[str, Any] = json.loads(ENCODED if found is None else bytes(found))
        return session

    async def aload(self) -> dict[str, Any]:
        """Do what `load` does."""
        return self.load()

    def save(self, must_create: bool = False) -> None:  # noqa: ARG002 - Django's signature
        """Put it where all processes of the host find it."""
        self._session_key = self._session_key or get_random_string(32)
        session = self._get_session()  # type: ignore[attr-defined]
        encoded = json.dumps(session, separators=(",", ":")).encode()
        with opened(os.getpid()).begin(write=True) as txn:
            txn.put(self._session_key.encode(), encoded)

    def create(self) -> None:
        """Make a key."""
        self._session_key = get_random_string(32)
