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
from deferred_sessions.acquisition import Acquisition
from deferred_sessions.adoption import Adoption
from deferred_sessions.encoding import RowEncoder
from deferred_sessions.exceptions import (
    RecordCorruptError,
    RowLockedError,
    RowRefusedError,
    ServerUnavailableError,
    StoreFullError,
)
from deferred_sessions.memory.pulse import Pulse
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.record import RECOVERED, SHUT, SessionRecord
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Row
from deferred_sessions.stand_in import StandIn
from deferred_sessions.writer import RecordWriter

security_logger = logging.getLogger("django.security.SuspiciousSession")  # as Django does

ATTEMPTS: Final = 4  # at reading a row while records are being removed from memory
UNCERTAIN: Final = "What the journal has of a session is not settled yet. Please try again."


class Found(NamedTuple):
    """A session that PostgreSQL has."""

    record: SessionRecord
    """What memory has of it now, if `is_kept`; else the row. May be a tombstone."""
    is_kept: bool
    is_readable: bool = True
    """The signature of the row holds; otherwise the payload is empty."""


class Intake:
    """Takes the leases of sessions, reads them from the session server, keeps them in memory."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        encoder: RowEncoder,
        acquisition: Acquisition,
        stand_in: StandIn,
        pulse: Pulse,
        writer: RecordWriter,
        adoption: Adoption | None,
    ) -> None:
        self._store = store
        self._servers = servers
        self._encoder = encoder
        self._acquisition = acquisition
        self._stand_in = stand_in
        self._pulse = pulse
        self._writer = writer
        self._adoption = adoption

    def take_in(self, key: str, now: float) -> Found | None:
        """Return the session that PostgreSQL has under `key`, or None; memory keeps it.

        What nobody here has ever known comes from the engine of before, if there is one.

        This node has its lease then. Not kept is what has expired, what cannot be verified
        (another process may have the right key), what an open transaction of the application
        may be alone to see, and what finds no room.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
            SessionBusy: Another node does not let go of it.
        """
        self._stand_in.check_in(now)
        found = self._take(key, now)
        if found is None and self._adoption is not None and self._store.get(key) is None:
            found = self._adopt(key, self._adoption, now)
        return found

    def _adopt(self, key: str, adoption: Adoption, now: float) -> Found | None:
        """Take over the session from the engine of before, or what others took over."""
        removals, entered_at = self._store.removals(key), self._pulse.entry(now)
        row = adoption.take_over(key, now)
        if row is not None:
            found, is_done = self._put(row, removals, entered_at, now)
            if is_done:
                return found
        return self._take(key, now)

    def _take(self, key: str, now: float) -> Found | None:
        found, is_done = None, False
        for _ in range(ATTEMPTS):
            found, is_done = self._take_once(key, now)
            if is_done:
                return found
        if found is None:  # which would say that there is no such session
            raise ServerUnavailableError(UNCERTAIN)
        return found

    def _take_once(self, key: str, now: float) -> tuple[Found | None, bool]:
        """Return what was found, and whether that will not change by trying again."""
        removals, known = self._store.removals(key), self._store.get(key)
        entered_at = self._pulse.entry(now)
        if known is not None and known.flags & RECOVERED:
            return self._judge(known, now)
        if known is not None and known.flags & SHUT:
            self._acquisition.stand_by(key)
            return Found(known, is_kept=False), False
        if known is not None and not self._is_doubtful(known):
            return Found(known, is_kept=True), True
        row = self._row(key)
        if known is not None and self._confirm(known, row, entered_at, now):
            return Found(known, is_kept=False), False
        return self._put(row, removals, entered_at, now)

    def _judge(self, known: SessionRecord, now: float) -> tuple[Found | None, bool]:
        """Have PostgreSQL judge what the journal had, under the fence it was saved under.

        So it stands if nobody has taken over since, and is refused and kept if somebody has.
        While PostgreSQL is away, or does not take it, it is all there is.
        """
        try:
            with self._servers.outside():
                self._writer.write([Dirty.of(known)], now)
        except (ServerUnavailableError, RowRefusedError):
            return Found(known, is_kept=True), True
        return None, False

    def _put(
        self, row: Row | None, removals: bytes, entered_at: float, now: float
    ) -> tuple[Found | None, bool]:
        """Put the row into memory, if it belongs there."""
        if row is None:
            return None, True
        found = self.found(row, entered_at)
        if not (found.is_readable and row.is_settled and row.expires_at > now):
            return found, True
        try:
            kept = self._store.keep(found.record, removals)
        except StoreFullError:
            return found, True
        if kept is None or self._is_doubtful(kept):
            return found, False
        return Found(kept, is_kept=True), True

    def exists(self, key: str, now: float) -> bool:
        """Tell whether PostgreSQL has a live session of this `key`.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        self._acquisition.find(key)
        return self._servers.retried(key, lambda server: server.exists(key, now))

    def leased(self, key: str) -> Row | None:
        """Return the row of `key`, whose lease this node has; None if there is none.

        Raises:
            ServerUnavailableError, SessionBusy: see `take_in`.
        """
        return self._acquisition.take(key)

    def _row(self, key: str) -> Row | None:
        """Return the row of `key`, with its lease.

        A lease is never taken within a transaction of the application, which may roll back,
        but beside it; what that transaction has done to the row is for itself alone.
        """
        server = self._servers.at(key)
        if not server.in_transaction():
            return self._acquisition.take(key)
        self._acquisition.find(key)
        row = server.read(key)
        if row is None or not row.is_settled or row.owner == server.owner():
            return row
        try:
            with server.apart():
                leased = self._acquisition.take(key)
        except RowLockedError:  # most likely by that transaction
            return row._replace(is_settled=False)
        return leased

    def _is_doubtful(self, record: SessionRecord) -> bool:
        return bool(record.flags & RECOVERED) or self._pulse.is_suspect(record.entered_at)

    def _confirm(
        self, known: SessionRecord, row: Row | None, entered_at: float, now: float
    ) -> bool:
        """Settle with its row what is doubtful; return whether memory has it for certain now."""
        if row is None and known.stored_version:
            return False  # deleted; the flusher or the revocations will find out how
        version, fence = (0, known.fence) if row is None else (row.version, row.fence)
        confirm = partial(lifecycle.confirmed, row_version=version, fence=fence, now=entered_at)
        if confirm(known) is None and known.is_changed:
            with self._servers.outside():
                self._writer.write([Dirty.of(known)], now)  # refused, stored, and forgotten
            return False
        after = self._store.update(
            known.key,
            lambda record: record and confirm(record) if self._is(known, record) else record,
        )[1]
        return after is not None

    @staticmethod
    def _is(known: SessionRecord, record: SessionRecord | None) -> bool:
        """Tell whether `record` is still doubtful as `known` was."""
        return record is not None and record.entered_at == known.entered_at

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
