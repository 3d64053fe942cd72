"""A session through the tiers: process cache, host store, session server.

Called by `backend`. Each operation comes in two halves, so that async code can do
the first without leaving the event loop and the second in a thread:

    memory only, microseconds          may ask PostgreSQL
    recall ──── UNKNOWN ──────────────▶ fetch
    remember ── a Saving ─────────────▶ settle

A save that finds the session changed by an overlapping request comes back as MERGE:
the caller merges (see `overlap`) and remembers again.

Invariant: a failure of PostgreSQL raises; it never looks like "no such session".
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Final, Literal

from deferred_sessions import lifecycle
from deferred_sessions.adoption import Adoption
from deferred_sessions.bypass import Bypass
from deferred_sessions.exceptions import SessionDeletedError, StoreFullError
from deferred_sessions.intake import Intake
from deferred_sessions.memory.cache import Entry, SessionCache
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.pulse import Pulse, moment
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Change
from deferred_sessions.payload import Codec, Snapshot
from deferred_sessions.policy import Policy
from deferred_sessions.record import DIRTY, RECOVERED, TOMBSTONE, SessionRecord
from deferred_sessions.saving import DELETED, Memory, Rest, Saving, obstacle_to, saved_over
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.write_through import WriteThrough

UNKNOWN: Final = (0, 0.0)  # the version and entry of no record
ATTEMPTS: Final = 5  # at saving a session that keeps being evicted meanwhile


class Tiers:
    """Load, save, create and delete sessions, from memory where possible."""

    def __init__(
        self,
        *,
        store: HostStore,
        pulse: Pulse,
        cache: SessionCache[Snapshot],
        codec: Codec,
        servers: Fleet,
        intake: Intake,
        bypass: Bypass,
        write_through: WriteThrough,
        counters: Counters,
        policy: Policy,
        write_on_create: bool,
        adoption: Adoption | None,
    ) -> None:
        self._store = store
        self._pulse = pulse
        self._cache = cache
        self._codec = codec
        self._servers = servers
        self._intake = intake
        self._bypass = bypass
        self._write_through = write_through
        self._counters = counters
        self._policy = policy
        self._write_on_create = write_on_create
        self._adoption = adoption

    # Load

    def recall(self, key: str, now: float) -> Entry[Snapshot] | Literal[Memory.UNKNOWN] | None:
        """Return the session of `key` from memory; None if it is known to be gone.

        Its snapshot is shared with other requests: copy it.
        """
        known = self._cache.get(key)
        version, entered_at = UNKNOWN if known is None else known[:2]
        found = self._store.look(key, version, entered_at)
        if (
            found is None
            or found.flags & RECOVERED
            or self._pulse.doubts(found.entered_at, moment())
        ):
            return Memory.UNKNOWN
        if found.flags & TOMBSTONE or found.expires_at <= now:
            self._cache.drop(key)
            return None
        self._counters.add(Counter.LOADS)
        if now - found.used_at >= lifecycle.USE_GRAIN:
            self._note_use(key, now)
        if isinstance(found, SessionRecord):
            known = self._entry(found)
            self._cache.put(key, known)
        return known

    def fetch(self, key: str, now: float) -> Entry[Snapshot] | None:
        """Return the session of `key` from PostgreSQL, and keep it in memory.

        Returns None if there is none, or it has expired.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        self._counters.add(Counter.MISSES)
        found = self._intake.take_in(key, now)
        if found is None or found.record.is_tombstone or found.record.expires_at <= now:
            return None
        return self._entry(found.record)

    def exists(self, key: str, now: float) -> bool | None:
        """Tell whether `key` is a live session; None if memory does not know."""
        record = self._store.get(key)
        if record is None:
            return None
        return not record.is_tombstone and record.expires_at > now

    def exists_in_server(self, key: str, now: float) -> bool:
        """Tell whether PostgreSQL, or the engine of before, has a live session of this `key`.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        if self._intake.exists(key, now):
            return True
        return self._adoption is not None and self.fetch(key, now) is not None

    # Save

    def remember(
        self,
        key: str,
        snapshot: Snapshot,
        user_id: str,
        expires_at: float,
        now: float,
        *,
        is_urgent: bool,
        base: Entry[Snapshot] | None,
    ) -> Entry[Snapshot] | Saving:
        """Save in memory, where all processes of the host see it at once.

        A change that `is_urgent` must not wait for the flusher: login, logout, expiry.
        With a `base` it is saved only in place of exactly that; without, of anything.

        Returns:
            The session as memory has it now, if that was all; else what is left to do.

        Raises:
            SessionDeletedError: The session was deleted meanwhile; nothing is changed.
        """
        version, entered_at = UNKNOWN if base is None else base[:2]
        again = (
            version, entered_at, snapshot.payload, user_id, expires_at,
            now - lifecycle.USE_GRAIN, now, self._policy,
        )  # fmt: skip
        change: Change | None
        try:
            if is_urgent or base is None or snapshot is base[2]:
                change = self._store.update(key, partial(saved_over, again, base))
            else:
                change = self._store.save(key, again, partial(saved_over, again, base))
        except StoreFullError:
            return Saving(Rest.BYPASS, key, snapshot, user_id, expires_at, is_urgent, base)
        if change is None and not self._store.is_strict:
            return self._remembered(key, version + 1, entered_at, snapshot)
        left = Saving(Rest.ASK, key, snapshot, user_id, expires_at, is_urgent, base)
        if change is None:
            saved = self._remembered(key, version + 1, entered_at, snapshot)
            return left._replace(rest=Rest.SYNC, base=saved)
        return self._left(left, change, now)

    def _left(self, saving: Saving, change: Change, now: float) -> Entry[Snapshot] | Saving:
        """Return the session if this `change` of its record was all; else what is left to do."""
        before, after = change
        if before is None or after is None:
            return saving
        if after is before and (obstacle := obstacle_to(after, saving.base)):
            return saving._replace(rest=obstacle[0], record=obstacle[1])
        is_urgent, policy = saving.is_urgent, self._policy
        if after.version == before.version:
            self._counters.add(Counter.TOUCHES)
            is_urgent = False
            entry = Entry(after.version, after.entered_at, saving.snapshot)
        else:
            entry = self._remembered(saving.key, after.version, after.entered_at, saving.snapshot)
        if is_urgent or (
            after.stored_expires_at - now < policy.interval
            and policy.cannot_wait(now, after.expires_at, after.stored_expires_at)
        ):
            return saving._replace(rest=Rest.WRITE, record=after, is_urgent=is_urgent)
        if self._store.is_strict:
            return saving._replace(rest=Rest.SYNC, base=entry)
        return entry

    def _remembered(
        self, key: str, version: int, entered_at: float, snapshot: Snapshot
    ) -> Entry[Snapshot]:
        """Keep a change that was saved."""
        # Not Entry(...), which costs as much as all the rest.
        entry: Entry[Snapshot] = tuple.__new__(Entry, (version, entered_at, snapshot))
        self._counters.add(Counter.UPDATES)
        self._cache.put(key, entry)
        return entry

    def known_record(self, key: str, now: float) -> SessionRecord | None:
        """Return what memory has of a live session; None if it knows nothing of it.

        Raises:
            SessionDeletedError: It was deleted, or has expired.
        """
        record = self._store.get(key)
        if record is not None and (record.is_tombstone or record.expires_at <= now):
            raise SessionDeletedError(DELETED)
        if record is None or record.flags & RECOVERED:
            return None
        return None if self._pulse.doubts(record.entered_at, moment()) else record

    def newest(self, key: str, now: float) -> SessionRecord:
        """Return the session as memory has it, or else PostgreSQL.

        Raises:
            SessionDeletedError: It was deleted, or has expired.
            ServerUnavailableError: Not in memory, and PostgreSQL cannot be asked.
        """
        record = self.known_record(key, now)
        if record is None:
            found = self._intake.take_in(key, now)
            if found is None or found.record.is_tombstone or found.record.expires_at <= now:
                raise SessionDeletedError(DELETED)
            record = found.record
        return record

    def persist(self, key: str, now: float) -> None:
        """Write what memory has of the session to PostgreSQL, if that lacks any of it.

        The expiry alone is not worth a write.

        Raises:
            SessionDeletedError: PostgreSQL has no such session, or another one.
            ServerUnavailableError, RowRefusedError: Nothing was written.
        """
        record = self._store.get(key)
        if record is not None and record.is_changed:
            self._write_through.persist(record, now)

    def settle(self, saving: Saving, now: float) -> Entry[Snapshot] | Saving:
        """Finish what memory alone could not; the rest of it may be to MERGE.

        Raises:
            SessionDeletedError: The session is not in PostgreSQL either.
            ServerUnavailableError: Nothing was saved.
            StoreFullError, RowRefusedError: see `Bypass.save`; nothing was saved.
        """
        result: Entry[Snapshot] | Saving = saving
        for _ in range(ATTEMPTS):
            if isinstance(result, Entry) or result.rest is not Rest.ASK:
                break
            found = self._intake.take_in(saving.key, now)
            if found is None:
                raise SessionDeletedError(DELETED)
            if not found.is_kept:
                break
            _, key, snapshot, user_id, expires_at, is_urgent, base, _ = saving
            result = self.remember(
                key, snapshot, user_id, expires_at, now, is_urgent=is_urgent, base=base
            )
        if isinstance(result, Entry) or result.rest is Rest.MERGE:
            return result
        if result.rest is Rest.SYNC and result.base is not None:
            self._store.make_durable(now)
            return result.base
        if result.record is None:
            return self._bypass.save(result, now)
        self._write_through.write(result.record, now)
        self._store.make_durable(now)
        return Entry(result.record.version, result.record.entered_at, result.snapshot)

    # Create and delete

    def create(
        self, key: str, snapshot: Snapshot, user_id: str, *, expires_at: float, now: float
    ) -> Entry[Snapshot] | None:
        """Create a session in PostgreSQL and in memory; None if the key is taken.

        When it returns the session, it is in PostgreSQL, unless a transaction of the
        application is open (then memory repeats the insert should it roll back), the
        server is away (then memory keeps it, if `CREATE_WHEN_DOWN`), or
        `WRITE_ON_CREATE` is off.

        Raises:
            ServerUnavailableError, RowLockedError: Away, and `CREATE_WHEN_DOWN` is off.
            RowRefusedError: PostgreSQL does not want this data.
            StoreFullError: Neither PostgreSQL nor memory could take it.
        """
        record = lifecycle.created(
            key, snapshot.payload, user_id, expires_at=expires_at, now=now, policy=self._policy
        )._replace(entered_at=self._pulse.entry(now))
        if self._store.get(key) is not None:
            return None
        shape = self._servers.shape()
        if self._write_on_create:
            inserted = self._write_through.insert(record, now)
            if inserted is None:
                return None
            record = inserted
        try:
            before, _ = self._store.update(key, lambda known: known or record)
        except StoreFullError:
            if record.is_dirty and not self._servers.in_transaction():
                raise
            before = None  # PostgreSQL has it; the next load finds it there
        self._counters.add(Counter.CREATIONS)
        if before is not None:
            return None
        if self._servers.shape() != shape:
            self._write_through.write_where_it_belongs(record, now)
        self._store.make_durable(now)
        return Entry(record.version, record.entered_at, snapshot)

    def delete(self, key: str, now: float) -> SessionRecord | None:
        """Delete the session in memory and in PostgreSQL, whether it exists or not.

        Returns what memory had of it until then.

        Memory forgets it first and remembers the deletion, so that no load or save
        that is under way brings it back; if PostgreSQL is away, or the application's
        transaction rolls back, the flusher deletes it there later. The engine of before
        (`IMPORT_ENGINE`) forgets it, too; if it cannot, that is logged, and nothing is taken
        over from it.

        Raises:
            StoreFullError: Memory or journal have no room to remember it, and PostgreSQL is
                away, or it happens inside a transaction of the application.
        """
        if self._adoption is None:
            return self._delete(key, now)
        self._adoption.bar(key, now)
        try:
            return self._delete(key, now)
        finally:
            self._adoption.delete(key)

    # Inside

    def _delete(self, key: str, now: float) -> SessionRecord | None:
        self._counters.add(Counter.DELETIONS)
        self._cache.drop(key)
        try:
            return self._bury(key, now)
        except StoreFullError:
            # PostgreSQL remembers deletions, too: with it alone nobody has to stay logged in
            # because a disk is full.
            if not self._write_through.delete_for_good(key, now):
                raise
            buried = partial(self._buried, key, now)
            return self._store.bury_unlogged(key, buried)[0]

    def _bury(self, key: str, now: float) -> SessionRecord | None:
        burial = partial(lifecycle.deleted, key=key, now=now, policy=self._policy)
        before, tombstone = self._store.bury(key, lambda known: known and burial(known))
        if tombstone is None and self._write_through.delete_unknown(key, now):
            # What a load that was faster has put into memory meanwhile goes, too.
            return self._store.bury(key, lambda known: known and burial(known))[0]
        if tombstone is None:
            due_now = partial(lifecycle.due_again, due_at=now)
            before = self._store.bury(key, lambda known: due_now(burial(known)))[0]
        elif tombstone.is_dirty:
            self._write_through.write(tombstone, now)
            found = self._store.head(key)
            if found is not None and not found.flags & DIRTY:
                return before  # PostgreSQL has it, on a disk of its own
        self._store.make_durable(now)
        return before

    def _buried(self, key: str, now: float, record: SessionRecord | None) -> SessionRecord | None:
        burial = partial(lifecycle.deleted, key=key, now=now, policy=self._policy)
        return record and lifecycle.buried(burial(record), now=now)

    def _entry(self, record: SessionRecord) -> Entry[Snapshot]:
        return Entry(record.version, record.entered_at, self._codec.decode(record.payload))

    def _note_use(self, key: str, now: float) -> None:
        with suppress(StoreFullError):  # it only orders eviction
            self._store.update(key, lambda known: known and lifecycle.used(known, now=now))
