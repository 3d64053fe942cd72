"""A save past a memory that has no room: straight to PostgreSQL.

Called by `tiers` when the host store is full of changes that PostgreSQL lacks. Invariant:
memory gives up what it had of the session only when PostgreSQL has committed all of it,
and only if nobody changed it there meanwhile.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import RowLockedError, SessionDeletedError, StoreFullError
from deferred_sessions.intake import Intake
from deferred_sessions.memory.cache import Entry
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.payload import Snapshot
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.saving import DELETED, Rest, Saving, has_moved_on
from deferred_sessions.servers.copies import Copies
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Columns
from deferred_sessions.writer import RecordWriter

NOT_NOW: Final = (
    "Memory has no room for this session, and others would not see what is written in an open "
    "transaction: save it after the transaction, or raise DEFERRED_SESSIONS['STORE_SIZE']."
)
ATTEMPTS: Final = 5  # at writing a row that others keep writing


class Bypass:
    """Saves sessions for which memory has no room."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        intake: Intake,
        writer: RecordWriter,
        copies: Copies,
        counters: Counters,
        policy: Policy,
    ) -> None:
        self._store = store
        self._servers = servers
        self._intake = intake
        self._writer = writer
        self._copies = copies
        self._counters = counters
        self._policy = policy

    def save(self, saving: Saving, now: float) -> Entry[Snapshot] | Saving:
        """Save straight to PostgreSQL; durable there when it returns.

        Returns:
            The session as PostgreSQL has it; or what to merge with, because somebody
            else changed it since it was loaded.

        Raises:
            SessionDeletedError: It was deleted, here or in PostgreSQL.
            StoreFullError: A transaction of the application is open. What is written in it
                others cannot see before it commits, nor can a lock keep them from the session
                until then.
            ServerUnavailableError, RowRefusedError, SessionBusy: Nothing was saved.
        """
        if self._servers.in_transaction():
            raise StoreFullError(NOT_NOW)
        for _ in range(ATTEMPTS):
            row = self._intake.leased(saving.key)
            known = self._store.get(saving.key)
            if row is None or (known is not None and known.is_tombstone):
                raise SessionDeletedError(DELETED)
            current = self._intake.found(row, now).record if known is None else known
            if has_moved_on(current, saving.base):
                return saving._replace(rest=Rest.MERGE, record=current)
            after = self._saved(current, saving, now)
            if after.version > current.version:
                after = after._replace(version=max(after.version, row.version + 1))
            if self._write(after, is_touch=after.version == current.version, now=now):
                self._counters.add(Counter.STORE_FULL)
                return self._hand_over(saving, known, after)
        raise RowLockedError("Others keep writing this session; it was not saved.")

    def _saved(self, current: SessionRecord, saving: Saving, now: float) -> SessionRecord:
        return lifecycle.saved(
            current, saving.snapshot.payload, saving.user_id, saving.expires_at, now, self._policy
        )

    def _write(self, record: SessionRecord, *, is_touch: bool, now: float) -> bool:
        """Write `record`; return whether PostgreSQL took it, where it belongs."""
        columns: Columns = self._writer.columns([Dirty.of(record)])
        shape = self._servers.shape()
        server = self._servers.at(record.key)
        with server.attempt():
            if not record.is_changed and is_touch:
                was_taken = server.touch(columns, now)
            else:
                was_taken = server.update(columns, now)
        if was_taken:
            self._copies.write(columns, now)
        return bool(was_taken) and self._servers.shape() == shape

    def _hand_over(
        self, saving: Saving, known: SessionRecord | None, written: SessionRecord
    ) -> Entry[Snapshot] | Saving:
        """Have memory forget what PostgreSQL has now, unless it has something newer."""
        left = self._store.give_up(saving.key, partial(_given_up, known, written))[1]
        if left is not None and has_moved_on(left, saving.base) and not left.is_tombstone:
            return saving._replace(rest=Rest.MERGE, record=left)
        return Entry(written.version, written.entered_at, saving.snapshot)


def _given_up(
    known: SessionRecord | None, written: SessionRecord, record: SessionRecord | None
) -> SessionRecord | None:
    """Forget what was known when the row was written; outdo it with what came after."""
    if record is None or record == known:
        return None
    if record.is_tombstone:
        return record
    if not record.is_dirty and record.version <= written.version:
        return None  # a load that has been overtaken
    return record._replace(version=max(record.version, written.version) + 1)
