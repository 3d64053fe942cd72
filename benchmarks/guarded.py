"""The bare LMDB of `bare`, with the least that keeps what this project's engine promises.

A session has a version and an expiry, in front of its bytes; one that has expired is none; a save
looks whether somebody else saved since, and in that case has both merged; and who changes a
session first notes it in an index, so that a poller finds it. No tiers, no settings, no counters,
one function each: shows what of the share of `bare` is left then.
"""

from __future__ import annotations

import json
import os
import struct
import time
from typing import Any

from django.contrib.sessions.backends.base import SessionBase
from django.utils.crypto import get_random_string

from benchmarks.bare import ENCODED, SessionMiddleware, opened

__all__ = ["SessionMiddleware", "SessionStore"]
HEAD = struct.Struct("<QQddd")  # version, stored version, expires, stored expiry, due
AGE = 1_209_600.0  # seconds
INTERVAL = 60.0  # seconds until a change is due


class SessionStore(SessionBase):
    """Decodes with each load, encodes with each save."""

    _version = 0

    def load(self) -> dict[str, Any]:
        """Return the session; one that was never saved has the content of all."""
        with opened(os.getpid()).begin(buffers=True) as txn:
            found = txn.get(str(self._session_key).encode())
            if found is None:
                session: dict[str, Any] = json.loads(ENCODED)
                return session
            version, _, expires_at, _, _ = HEAD.unpack_from(found)
            encoded = bytes(found[HEAD.size :])
        if expires_at <= time.time():
            return {}
        self._version = version
        return dict(json.loads(encoded))

    async def aload(self) -> dict[str, Any]:
        """Do what `load` does."""
        return self.load()

    def save(self, must_create: bool = False) -> None:  # noqa: ARG002 - Django's signature
        """Put it where all processes of the host find it, if nobody else was faster."""
        session = self._get_session()  # type: ignore[attr-defined]
        encoded, now = json.dumps(session, separators=(",", ":")).encode(), time.time()
        self._session_key = self._session_key or get_random_string(32)
        name = self._session_key.encode()
        with opened(os.getpid()).begin(write=True) as txn:
            found = txn.get(name)
            version, stored, expires_at, due_at = 0, 0, 0.0, 0.0
            if found is not None:
                version, stored, _, expires_at, due_at = HEAD.unpack_from(found)
                if version != self._version and found[HEAD.size :] != encoded:
                    encoded = json.dumps({**json.loads(found[HEAD.size :]), **session}).encode()
            if not due_at:
                due_at = now + INTERVAL
                txn.put(struct.pack(">d", due_at) + name, b"")
            head = HEAD.pack(version + 1, stored, now + AGE, expires_at, due_at)
            txn.put(name, head + encoded)
        self._version = version + 1

    def create(self) -> None:
        """Make a key."""
        self._session_key = get_random_string(32)
