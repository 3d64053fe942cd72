"""The host store: the records of one host, shared by all its processes.

Called by `tiers`, `writer`, `flusher` and `statistics`. Invariant: each change is one
write transaction that keeps a record and its place in the indexes together; when a
call returns, the change outlives the death of any process (not of the host).

Readers never wait. A transition that is passed in must be pure and quick: it runs
inside the write transaction that all processes of the host queue for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import StoreError
from deferred_sessions.lifecycle import TOMBSTONE_LIFETIME
from deferred_sessions.memory import eviction, handing, tables
from deferred_sessions.memory.directory import PAGE, other_owners
from deferred_sessions.memory.environment import Databases, Log, MappedFile
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.log_file import Header
from deferred_sessions.memory.recovery import forget, recover_if_needed
from deferred_sessions.memory.tables import Again, Change, Dirty, Transition
from deferred_sessions.memory.transactions import BATCH, Transactions
from deferred_sessions.record import Head, SessionRecord

logger = logging.getLogger(__name__)

HIGH_WATER: Final = 0.85  # share of the map in use above which sessions are evicted
CROWDED_WATER: Final = 0.75  # and above which it matters that most of them are dirty
COMPLAINT_INTERVAL: Final = 60.0  # seconds between messages about a disk that fails
LOOK_SHARE: Final = 1 / 1024  # of the map: how much a process writes between two looks


class HostStore(Transactions):
    """Records by session key, with an index by due time and one by last use.

    The constructor does no I/O; the map is opened by the first use in each process.
    """

    def __init__(
        self, directory: Path, *, size: int, identity: str, journal: Journal | None = None
    ) -> None:
        self.directory = directory
        self.journal = journal
        """Where changes go that a crash of the host must not take, or None."""
        self.is_strict = journal is not None and not journal.sync_interval
        """A save is acknowledged when it is on disk."""
        recover = partial(_recovered, journal)
        super().__init__(MappedFile(directory, size=size, identity=identity, recover=recover))
        self._look_after = size * LOOK_SHARE
        self._written = 0  # bytes, roughly, since the last look at the level of the map
        self._may_grow = True
        self._complained_at = 0.0

    def exists(self) -> bool:
        """Tell whether this host has a store already; never makes one."""
        return self._file.exists()

    def owners_elsewhere(self) -> list[int]:
        """Return the users other than this one who have this project's store on the host."""
        return other_owners(self.directory)

    def open(self) -> None:
        """Map the store now instead of at the first use; makes it if there is none.

        Raises:
            UnsafeDirectoryError, StoreUnavailableError, StoreMismatchError: see there.
        """
        self._file.open()

    def close(self) -> None:
        """Unmap the store; the next use opens it again."""
        if self.journal is not None:
            self.journal.close()  # first: who opens the store from here on takes it again
        self._file.close()

    def make_durable(self, now: float) -> None:
        """Return when what was saved is on disk, if a save is to promise that."""
        if self.journal is not None and self.is_strict:
            self.journal.wait(now)

    def swap_journal(self, header: Header, now: float) -> None:
        """Go on in the other log of the journal, between two changes; `header` is what it has."""
        if self.journal is not None:
            self._write(lambda _txn, _dbs, journal: journal.swap(header, now), self.journal)

    def reset_journal(self, generation: int) -> None:
        """Give the space of the log before this one back, which nobody needs."""
        if self.journal is not None:
            self._write(lambda _txn, _dbs, journal: journal.reset(generation), self.journal)

    def needs_log(self, generation: int) -> bool:
        """Tell whether only this log of the journal, or an older one, may have some change.

        Looks at the index entries of dirty records until it finds one.
        """
        return self._read(tables.is_needed, generation)

    # Records

    def get(self, key: str) -> SessionRecord | None:
        """Return the record of `key`, also a tombstone or an expired one, or None."""
        return self._read(tables.get, key)

    def head(self, key: str) -> Head | None:
        """Return the fixed part of the record of `key`, in half the time of `get`."""
        return self._read(tables.head, key)

    def look(self, key: str, version: int, entered_at: float) -> Head | SessionRecord | None:
        """Return the record of `key`, or None; only its head if it is the one that is known."""
        return self._read(tables.look, key, version, entered_at)

    def update(self, key: str, transition: Transition) -> Change:
        """Replace the record of `key` by what `transition` makes of it, atomically.

        A transition that returns the same object, or None for None, writes nothing;
        one that returns None for a record removes it.

        Returns:
            The record before and after.

        Raises:
            StoreFullError: No room, even after eviction; nothing was changed.
        """
        if not self._may_grow:
            self._look()
        change = self._write(tables.update, key, transition, self._may_grow)
        if change[1] is not None:
            self._written += PAGE + len(change[1].payload)
            if self.journal is not None and self.journal.is_behind(time.time()):
                self._sync(self.journal)
            if self._written > self._look_after:
                self._look()
        return change

    def save(self, key: str, again: Again, transition: Transition) -> Change | None:
        """Do `update`; return None if the change was the one that `again` says.

        Raises:
            StoreFullError: No room, even after eviction; nothing was changed.
        """
        if not self._may_grow:
            self._look()
        change = self._write(tables.save, key, again, transition, self._may_grow)
        if change is None or change[1] is not None:
            self._written += PAGE + len(again[2])
            if self.journal is not None and self.journal.is_behind(again[6]):
                self._sync(self.journal)
            if self._written > self._look_after:
                self._look()
        return change

    def bury(self, key: str, transition: Transition) -> Change:
        """Do `update` for a deletion, which may use the room kept back for removing."""
        return self._write(tables.update, key, transition, True)

    def bury_unlogged(self, key: str, transition: Transition) -> Change:
        """Do `bury` past a journal that takes nothing; PostgreSQL must know of the deletion."""
        return self._write(tables.update_unlogged, key, transition)

    def give_up(self, key: str, transition: Transition) -> Change:
        """Do `update` for a session that was saved past memory; loads under way keep nothing."""
        change = self._write(tables.give_up, key, transition)
        if self.journal is not None and self.journal.is_behind(time.time()):
            self._sync(self.journal)  # if it is full, no other save syncs what it has
        return change

    def removals(self, key: str) -> bytes:
        """Return what tells `keep` what was removed since; ask before you ask PostgreSQL."""
        return self._read(tables.removals, key)

    def count_removal(self) -> None:
        """Have rows that were read before now not be kept any more."""
        self._write(tables.count_removal)

    def keep(self, record: SessionRecord, removals: bytes) -> SessionRecord | None:
        """Put `record`, which PostgreSQL has, unless memory knows better.

        `removals` must have been read before the row was. The row may then have been
        overtaken by a save, a flush and an eviction: so nothing is kept that was read
        before some record was removed.

        Returns:
            What memory has of the session now, also a tombstone; None if nothing.

        Raises:
            StoreFullError: No room, even after eviction.
        """
        if not self._may_grow:
            self._look()
        kept = self._write(tables.keep, record, removals, self._may_grow)
        if kept is record:
            self._written += PAGE + len(record.payload)
        return kept

    def update_many(self, transitions: Mapping[str, Transition]) -> None:
        """Do `update` for many keys that PostgreSQL confirmed, some hundred at a time.

        For what makes records smaller or cleaner: there is always room for that. What the
        journal does not take stays as it is, dirty and due.
        """
        self._in_parts(
            list(transitions.items()), lambda part: self._write(tables.update_many, part)
        )

    def clean_many(self, written: Sequence[Dirty], now: float) -> list[str]:
        """Mark records as written at `now`, all that PostgreSQL lacked of them.

        Returns:
            The keys of the records that have changed since they were found; they are
            left as they are.
        """
        others: list[str] = []
        self._in_parts(
            written,
            lambda part: others.extend(self._write(tables.clean_many, part, now)),
        )
        return others

    def due(self, now: float, *, limit: int, after: bytes = b"") -> list[Dirty]:
        """Return those `limit` records that have been due for longest, in order of keys.

        Fewer if they are large. Costs what it returns, not what is stored. `after` is the
        entry of the latest one that the caller has seen already. A record that cannot be read is
        taken out of the index, kept, and logged: it must not hold up the others.
        """
        found, unreadable = self._read(tables.due, now, limit, after)
        if unreadable:
            self._write(tables.take_out, unreadable)
            logger.error(
                "%d records of the session store cannot be read; they stay where they "
                "are, but are not written to PostgreSQL.",
                len(unreadable),
                extra={"action": "records_unreadable"},
            )
        return found

    def find_dirty(self, keys: Sequence[str]) -> list[Dirty]:
        """Return those of `keys` that are dirty, due or not."""
        return self._read(tables.find, keys)

    def scan(self) -> Iterator[SessionRecord]:
        """Yield all records by key, those of each page as they stood at one instant.

        One snapshot for all would keep replaced pages from being used again meanwhile.
        """
        after = ""
        while page := self._read(tables.page, after, BATCH):
            yield from page
            after = page[-1].key

    # On the way to other nodes

    def hand_over(self, leases: Mapping[str, int], entered_before: float) -> list[str]:
        """Give up sessions (fences by key) that others ask for; return the keys of those gone.

        Stays what is dirty and what entered memory since `entered_before`: whoever has just
        loaded it shall get to use it. What is gone cannot come back before `handed_over`.
        """
        return self._write(handing.hand_over, leases, entered_before)

    def handed_over(self, leases: Mapping[str, int]) -> None:
        """PostgreSQL has passed on these leases (fences by key)."""
        self._write(handing.unmark, leases)

    def handing_over(self) -> dict[str, int]:
        """Return the leases that are being given up, perhaps by a process that has died."""
        return self._read(handing.marked)

    def is_handing_over(self, key: str) -> bool:
        """Tell whether the session of `key` is being given up in this moment."""
        return self._read(handing.is_leaving, key)

    def shut(self, keys: Iterable[str]) -> None:
        """Have saves of these sessions wait until `reopen`, or until they have left.

        Until then PostgreSQL can be brought level with them. Loads go on.
        """
        self._write(handing.shut, keys)

    def reopen(self) -> None:
        """Have saves go on, also those of sessions that were shut by a process that has died."""
        if self._read(handing.is_any_shut):
            self._write(handing.reopen)

    # Room

    def evict(self, count: int) -> int:
        """Remove up to `count` clean records, those not used for longest first.

        Confirmed tombstones go before sessions: PostgreSQL remembers the deletion.

        Returns:
            How many were removed; 0 if all that is left is dirty.
        """
        evicted = self._write(eviction.evict, count)
        self.on_evicted(evicted)
        return evicted

    def sweep(self, now: float) -> int:
        """Forget the tombstones that have done their duty; return how many."""
        total = swept = self._write(eviction.sweep, now - TOMBSTONE_LIFETIME, BATCH)
        while swept == BATCH:
            swept = self._write(eviction.sweep, now - TOMBSTONE_LIFETIME, BATCH)
            total += swept
        return total

    def clear_dead_readers(self) -> int:
        """Free the reader slots of killed processes, which pin replaced pages."""
        return (self._file.databases or self._file.open()).env.reader_check()

    def is_crowded(self) -> bool:
        """Tell whether there is little left that could be evicted to make room."""
        status = self.status()
        return status.used > CROWDED_WATER * status.size and status.dirty > status.records / 2

    def incarnation(self) -> str:
        """Return the random name that this store got when it was made."""
        return (self._file.databases or self._file.open()).incarnation

    def node(self, default: str) -> str:
        """Return the name of this node, which is not set: the one that its journal began with."""
        return default if self.journal is None else self.journal.ownership.node(default)

    def clear(self) -> None:
        """Remove every record. For tests: what was dirty is lost."""
        self._write(tables.clear)

    def oldest_change(self) -> float | None:
        """Return the time of the oldest payload change PostgreSQL lacks, or None.

        Looks at every dirty record's index entry, so it is for operators, not requests.
        """
        return self._read(tables.oldest_change)

    # Notes

    def note(self, name: str) -> bytes | None:
        """Return what some process of this host noted under `name`, or None."""
        return self._read(tables.note, name)

    def set_note(self, name: str, value: bytes, *, voids_loads: bool = False) -> None:
        """Leave `value` under `name` for the processes of this host.

        With `voids_loads`, nothing is kept that was read before: see `keep`.
        """
        self._write(tables.set_note, name, value, voids_loads)

    def _sync(self, journal: Journal) -> None:
        """Sync, as nobody else does; what was saved is in memory, whatever the disk says."""
        now = time.time()
        try:
            journal.sync(now)
        except StoreError:
            if abs(now - self._complained_at) > COMPLAINT_INTERVAL:  # clocks are set back
                self._complained_at = now
                logger.exception("A save is not on disk.", extra={"action": "journal_failed"})

    def _look(self) -> None:
        """Look at the level of the map; evict a little if it is high, stop growth if full."""
        self._written = 0
        status = self.status()
        if status.used > HIGH_WATER * status.size:
            self._make_room()
        self._may_grow = not self._is_full()


def _recovered(journal: Journal | None, dbs: Databases) -> Log | None:
    """Have in the store what its journal has; return what logs its changes."""
    if journal is None:
        forget(dbs)
        return None
    journal.let_go()  # what is open may be of the store that was here before
    try:
        recover_if_needed(journal, dbs, time.time())
    except BaseException:
        journal.close()
        raise
    return journal
