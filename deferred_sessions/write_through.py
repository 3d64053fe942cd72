"""What must not wait for the flusher: creations, deletions, logins.

Called by `tiers`. Invariant: if PostgreSQL cannot take it now, it stays dirty in memory
and due at once; and a failure here leaves an open transaction of the application as it
was.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import (
    RowLockedError,
    RowRefusedError,
    ServerUnavailableError,
    SessionBusy,
    SessionDeletedError,
)
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.outcome import Outcome
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.servers.copies import Copies
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Columns
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.writer import RecordWriter

logger = logging.getLogger(__name__)

LOG_INTERVAL: Final = 60.0  # seconds between messages of the same outage
PASSED_ON: Final = (
    "The session has passed to another node, which may have changed it; what could not be written "
    "is kept in the table of refused writes. Try again."
)


class WriteThrough:
    """Writes single records to PostgreSQL while a request waits."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        writer: RecordWriter,
        copies: Copies,
        counters: Counters,
        policy: Policy,
        create_when_down: bool,
    ) -> None:
        self._store = store
        self._servers = servers
        self._writer = writer
        self._copies = copies
        self._counters = counters
        self._policy = policy
        self._create_when_down = create_when_down
        self._logged_at = -LOG_INTERVAL

    def write(self, record: SessionRecord, now: float) -> None:
        """Write `record` now; if PostgreSQL is away, keep it dirty and due at once.

        Inside a transaction of the application it stays dirty as well, so that the
        flusher makes sure: nobody can tell whether the transaction will commit.

        Raises:
            SessionBusy: The session has passed to another node.
        """
        try:
            with self._servers.at(record.key).attempt():
                outcome = self._writer.write_through(record, now)
        except (ServerUnavailableError, RowRefusedError) as error:
            self._store.update(
                record.key, lambda known: known and lifecycle.due_again(known, due_at=now)
            )
            self._log_postponed(error, now)
        else:
            if outcome.fenced:
                raise SessionBusy(PASSED_ON)
            self._counters.add(Counter.WRITES_THROUGH)

    def write_where_it_belongs(self, record: SessionRecord, now: float) -> None:
        """Write a session anew that was sent to its server when that had just ceased to be it."""
        again = partial(lifecycle.forgotten, now=now)
        kept = self._store.update(record.key, lambda known: known and again(known))[1]
        if kept is None:  # memory has no room
            self.insert(record, now)
        elif not kept.is_tombstone:
            self.write(kept, now)

    def persist(self, record: SessionRecord, now: float) -> None:
        """Write `record` now, or say why not.

        Raises:
            SessionDeletedError: It was deleted there, or changed by somebody else.
            SessionBusy: It has passed to another node.
            ServerUnavailableError, RowRefusedError: Nothing was written.
        """
        outcome = self._servers.retried(record.key, partial(self._persist, record, now))
        if outcome.fenced:
            raise SessionBusy(PASSED_ON)
        if outcome.vanished or outcome.superseded:
            raise SessionDeletedError("The session was deleted or replaced in PostgreSQL.")
        self._counters.add(Counter.WRITES_THROUGH)

    def _persist(self, record: SessionRecord, now: float, server: SessionServer) -> Outcome:
        with server.attempt():
            return self._writer.write_through(record, now)

    def insert(self, record: SessionRecord, now: float) -> SessionRecord | None:
        """Insert a new session; None if its key is taken.

        Returns:
            The record: clean if PostgreSQL has it, dirty if that is not certain yet.

        Raises:
            ServerUnavailableError, RowLockedError: Away, and `CREATE_WHEN_DOWN` is off.
            RowRefusedError: PostgreSQL does not want this data.
        """
        columns = self._writer.columns([Dirty.of(record)])
        try:
            inserted = self._inserted(columns, now)
        except (ServerUnavailableError, RowLockedError) as error:
            if not self._create_when_down:
                raise
            self._log_postponed(error, now)
            return lifecycle.due_again(record, due_at=now)
        if not inserted:
            return None
        self._counters.add(Counter.ROWS_WRITTEN)
        self._counters.add(Counter.STATEMENTS)
        if self._servers.in_transaction():
            return record
        if self._copies.write(columns, now):
            return lifecycle.due_again(record._replace(stored_version=record.version), due_at=now)
        return lifecycle.written(
            record,
            version=record.version,
            expires_at=record.expires_at,
            now=now,
            policy=self._policy,
        )

    def delete_unknown(self, key: str, now: float) -> bool:
        """Delete a row that memory knows nothing of; return whether that is certain.

        Raises nothing: what is not certain has to be remembered.
        """
        shape = self._servers.shape()
        try:
            server = self._servers.at(key)
            with server.attempt():
                deleted = server.delete([key])
        except (ServerUnavailableError, RowRefusedError) as error:
            self._log_postponed(error, now)
            return False
        if self._servers.in_transaction():
            return False
        is_everywhere = not self._copies.delete([key])
        if deleted:
            self._counters.add(Counter.ROWS_WRITTEN)
            self._counters.add(Counter.STATEMENTS)
            self._store.count_removal()  # a load under way must not keep what it has read
        # Another node may yet bring it to a server that does not have it in this moment.
        is_certain = self._servers.is_whole() and self._servers.shape() == shape
        return is_everywhere and is_certain

    def delete_for_good(self, key: str, now: float) -> bool:
        """Delete a row that may not be there yet, for a node that cannot remember it on disk.

        Returns whether that is certain, and PostgreSQL remembers it. Raises nothing.
        """
        try:
            server = self._servers.at(key)
            with server.attempt():
                server.remember_deletion([key])
        except (ServerUnavailableError, RowRefusedError) as error:
            self._log_postponed(error, now)
            return False
        return self.delete_unknown(key, now)

    def _inserted(self, columns: Columns, now: float) -> int:
        """Insert the session; wait for the next server only if memory alone may not keep it."""

        def insert(server: SessionServer) -> int:
            with server.attempt():
                return server.insert(columns, now)

        key = columns.key[0]
        if self._create_when_down:
            return insert(self._servers.at(key))
        return self._servers.retried(key, insert)

    def _log_postponed(self, error: Exception, now: float) -> None:
        self._counters.add(Counter.WRITES_POSTPONED)
        if now - self._logged_at < LOG_INTERVAL:  # an outage would fill the log
            return
        self._logged_at = now
        logger.warning(
            "Sessions that must not wait are kept in memory for now: %s",
            error,
            extra={"action": "write_postponed"},
        )
