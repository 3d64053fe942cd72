"""Rows of PostgreSQL on their way into memory.

Called by `tiers` for what memory does not know, and by `bypass`. Invariant: memory keeps
only what every other transaction would read as well, and never an older state in place
of a later one that has left memory meanwhile.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Final, NamedTuple

from deferred_sessions import lifecycle
from deferred_sessions.encoding import RowEncoder
from deferred_sessions.exceptions import (
    RecordCorruptError,
    ServerUnavailableError,
    StoreFullError,
)
from deferred_sessions.memory.store import HostStore
from deferred_sessions.record import RECOVERED, SessionRecord
from deferred_sessions.servers.rows import Row
from deferred_sessions.servers.server import SessionServer

security_logger = logging.getLogger("django.security.SuspiciousSession")  # as Django does

ATTEMPTS: Final = 3  # at reading a row while records are being removed from memory


class Found(NamedTuple):
    """A session that PostgreSQL has."""

    record: SessionRecord
    """What memory has of it now, if `is_kept`; else the row. May be a tombstone."""
    is_kept: bool
    is_readable: bool = True
    """The signature of the row holds; otherwise the payload is empty."""


class Intake:
    """Reads sessions from the session server and keeps them in memory."""

    def __init__(self, store: HostStore, server: SessionServer, encoder: RowEncoder) -> None:
        self._store = store
        self._server = server
        self._encoder = encoder

    def take_in(self, key: str, now: float) -> Found | None:
        """Return the session that PostgreSQL has under `key`, or None; memory keeps it.

        Not kept is what has expired, what cannot be verified (another process may have
        the right key), what an open transaction of the application may be alone to see,
        and what finds no room.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        found = None
        for _ in range(ATTEMPTS):
            removals = self._store.removals()
            row = self._read(key)
            if isinstance(row, Found):
                return row
            if row is None:
                return None
            found = self.found(row, now)
            if not (found.is_readable and row.is_settled and row.expires_at > now):
                return found
            try:
                kept = self._store.keep(found.record, removals)
            except StoreFullError:
                return found
            if kept is not None:
                return Found(kept, is_kept=True)
        return found

    def _read(self, key: str) -> Row | Found | None:
        """Return the row; or what the journal had, if that is the later one, or all there is."""
        known = self._store.get(key)
        if known is None or not known.flags & RECOVERED:
            return self._server.read(key)
        try:
            row = self._server.read(key)
        except ServerUnavailableError:
            return Found(known, is_kept=True)
        confirm = partial(lifecycle.confirmed, row_version=0 if row is None else row.version)
        after = self._store.update(key, lambda record: record and confirm(record))[1]
        return row if after is None else Found(after, is_kept=True)

    def found(self, row: Row, now: float) -> Found:
        """Return what `row` holds as a clean record; an empty session if it is unreadable."""
        try:
            payload, is_readable = self._encoder.to_payload(row.data), True
        except RecordCorruptError:
            security_logger.warning("Session data corrupted")
            payload, is_readable = b"", False
        record = lifecycle.loaded(
            row.key,
            payload,
            row.user_id,
            version=max(1, row.version),  # anybody may write anything into a row
            fence=max(0, row.fence),
            created_at=row.created_at,
            expires_at=row.expires_at,
            written_at=row.written_at,
            now=now,
        )
        return Found(record, is_kept=False, is_readable=is_readable)
