"""Transactions on a host store, repeated where that helps, with room made where it is short.

The base of `store.HostStore`. Invariant: what a transaction raised, it did not do; and
nothing here waits for longer than it takes slow readers to let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, TypeVarTuple

import lmdb

from deferred_sessions.exceptions import StoreFullError, StoreUnavailableError
from deferred_sessions.memory import eviction, tables
from deferred_sessions.memory.directory import PAGE
from deferred_sessions.memory.environment import Databases, MappedFile
from deferred_sessions.memory.tables import StoreStatus

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Work = Callable[[lmdb.Transaction, Databases, *Ts], T]

FULL_WATER: Final = 0.92  # and above which nothing may grow: to remove takes pages, too
PAUSES: Final = (0.0, 0.001, 0.004, 0.016, 0.064)  # seconds between tries for room
PAGES_BESIDE: Final = 4  # of the indexes, written along with a record's own
SHARES: Final = 4  # of the room that is left; a transaction takes one
BATCH: Final = 256  # records per transaction, so that other writers wait < 1 ms


class Transactions:
    """Runs what `tables` and others do to the databases of one mapped file."""

    def __init__(self, file: MappedFile) -> None:
        self.on_evicted: Callable[[int], object] = lambda _: None
        """Called with a number after that many sessions were evicted."""
        self._file = file

    def status(self) -> StoreStatus:
        """Return the figures of the store; costs microseconds."""
        return self._read(tables.status)

    # The frame that repeats a transaction must not know the one that failed: as long as anybody
    # does, whoever closes the map waits for it. And a call more would cost as much as a read.

    def _read(self, work: Work[*Ts, T], *args: *Ts) -> T:
        while True:
            dbs, txn = self._file.databases or self._file.open(), None
            try:
                # By position (database, parent, write, buffers): names cost as much as a read.
                with dbs.env.begin(dbs.records, None, False) as txn:
                    return work(txn, dbs, *args)
            except lmdb.Error as error:
                txn = None
                self._cure(dbs, error)

    def _write(self, work: Work[*Ts, T], *args: *Ts) -> T:
        pauses = iter(PAUSES)
        while True:
            dbs, txn = self._file.databases or self._file.open(), None
            try:
                with self._file.writing, dbs.env.begin(dbs.records, None, True) as txn:
                    return work(txn, dbs, *args)
            except lmdb.MapFullError as error:
                txn = None
                if not self._make_room() and self._is_full():
                    raise StoreFullError(tables.FULL) from error
                self._wait_for_readers(next(pauses, None), error)
            except lmdb.Error as error:
                txn = None
                self._cure(dbs, error)

    def _in_parts(self, items: Sequence[T], work: Callable[[Sequence[T]], object]) -> None:
        """Do `work` on parts of `items`; on smaller ones where the room for them is short.

        LMDB writes changed pages to new places, and uses the old ones again only after one
        more transaction: so none may take more than a part of the pages that are left.
        """
        start = 0
        while start < len(items):
            status = self.status()
            left = (status.size - status.used) // PAGE
            each = PAGES_BESIDE + status.used // PAGE // max(1, status.records)
            count = max(1, min(BATCH, left // (SHARES * each)))
            work(items[start : start + count])
            start += count

    def _make_room(self) -> bool:
        """Evict a batch of clean sessions; return whether anything was gained."""
        dbs = self._file.databases or self._file.open()
        gained = dbs.env.reader_check() > 0  # a killed reader pins replaced pages
        batch, txn = BATCH, None
        while batch:
            try:
                with self._file.writing, dbs.env.begin(dbs.records, None, True) as txn:
                    evicted = eviction.evict(txn, dbs, batch)
            except lmdb.MapFullError:
                batch //= 4  # removing takes pages too: try fewer
            except lmdb.Error as error:
                txn = None
                self._cure(dbs, error)
                dbs = self._file.open()
            else:
                self.on_evicted(evicted)
                return evicted > 0 or gained
        return gained

    def _is_full(self) -> bool:
        status = self.status()
        return status.used > FULL_WATER * status.size

    def _wait_for_readers(self, pause: float | None, error: lmdb.Error) -> None:
        """Give slow readers time to let go of the pages that were replaced meanwhile."""
        if pause is None:
            raise StoreFullError(
                "A process that reads the session store holds on to replaced pages; is "
                "one of this host's processes stopped?"
            ) from error
        time.sleep(pause)

    def _cure(self, dbs: Databases, error: lmdb.Error) -> None:
        """Return if trying again may help: closed for a fork, or readers were killed."""
        # The traceback knows the transaction, and as long as anybody does, whoever
        # closes the map waits for it: let go before waiting for the map ourselves.
        error.with_traceback(None)
        if self._file.databases is not dbs:
            return
        if isinstance(error, lmdb.ReadersFullError) and dbs.env.reader_check():
            return
        raise StoreUnavailableError(
            f"The session store in {self._file.directory} failed: {error}"
        ) from error
