"""Keeps the journal: sync, swap, and the reset of what is not needed any more.

Called by the agent, and by the flusher after each run. Invariant: a log is reset only when
no change from before the swap is missing in PostgreSQL; what stands in the way is flushed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.store import HostStore


class JournalKeeper:
    """The duties of a node towards its journal; there may be none."""

    def __init__(self, *, store: HostStore, flush: Callable[[float], object], age: float) -> None:
        self._store = store
        self._flush = flush
        self._age = age
        self._lock = ProcessLock(store.directory / "journal.lock")

    @property
    def interval(self) -> float | None:
        """Seconds between two syncs; None if there is no journal, or savers sync."""
        journal = self._store.journal
        return journal.sync_interval or None if journal is not None else None

    def sync_once(self, now: float) -> None:
        """Have on disk what was saved until now."""
        if self._store.journal is not None and self._store.exists():
            self._store.open()
            self._store.journal.sync(now)

    def keep_once(self, now: float) -> None:
        """Sync, reset the retired log if it can be, and swap if it is time to."""
        journal = self._store.journal
        if journal is None or not self._store.exists():
            return
        self._store.open()
        with self._lock.held(wait=False) as is_held:
            if not is_held:
                return
            journal.sync(now)
            self._reset_if_done(journal)
            if not self._is_time(journal, now):
                return
            if journal.retired():
                self._flush(now)
                self._reset_if_done(journal)
            if not journal.retired():
                header = journal.prepare()
                journal.sync(now)  # so that the swap, for which savers wait, has little to sync
                self._store.swap_journal(header, now)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Keep the logs from being swapped and reset for the block, for who reads them."""
        if not self._store.exists():
            yield
            return
        with self._lock.held(wait=True):
            yield

    def _is_time(self, journal: Journal, now: float) -> bool:
        age = abs(now - journal.swapped_at())  # the clock may have been set back
        return journal.is_large() or (age >= self._age and not journal.is_empty())

    def _reset_if_done(self, journal: Journal) -> None:
        generation = journal.generation()
        if journal.retired() and not self._store.needs_log(generation - 1):
            self._store.reset_journal(generation)
