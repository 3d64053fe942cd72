"""What goes on in this node, in figures: counters, the store, the flusher.

Called by pages, commands and checks that show it to people. Invariant: reading never
waits for anybody and makes nobody wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from deferred_sessions.flusher import Flusher
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import StoreStatus
from deferred_sessions.report import FlushReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The figures of one node at one moment."""

    counters: dict[Counter, int]
    """Sums over all processes of the host since the store was made."""
    store: StoreStatus
    oldest_change_age: float
    """Seconds since the oldest change that PostgreSQL does not have; 0.0 if none."""
    last_flush: FlushReport | None
    """What the last run of the flusher did, in whichever process."""


class StatisticsReader:
    """Collects the figures of the node."""

    def __init__(self, *, store: HostStore, counters: Counters, flusher: Flusher) -> None:
        self._store = store
        self._counters = counters
        self._flusher = flusher

    def read(self, now: float) -> Statistics:
        """Return the figures at `now`; makes the store if the node has none."""
        oldest = self._store.oldest_change()
        return Statistics(
            counters=self._counters.totals(),
            store=self._store.status(),
            oldest_change_age=0.0 if oldest is None else max(0.0, now - oldest),
            last_flush=self._flusher.last_report(),
        )
