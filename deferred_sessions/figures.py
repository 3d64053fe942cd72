"""What goes on in this node, in figures: counters, the store, the flusher, the journal.

Called by `statistics`, which is for everybody, and by the agent, which keeps a sample every
ten seconds. Invariant: reading never waits for anybody and makes nobody wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from deferred_sessions.flusher import Flusher
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.history import STEP, Gauge, History, Sample
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import StoreStatus
from deferred_sessions.report import AGENT, FlushReport

PATIENCE: Final = 2  # flush intervals without a poller until it counts as dead


class JournalFigures(NamedTuple):
    """The journal at a glance. All sizes are bytes."""

    generation: int
    """How many logs there have been."""
    active: int
    """Size of the log that is written to."""
    retired: int
    """Size of the one that waits for PostgreSQL to have all of it."""
    unsynced: int
    """What a crash of the host would take."""
    age: float
    """Seconds since the logs were swapped."""

    @classmethod
    def of(cls, journal: Journal, now: float) -> JournalFigures:
        """Return the figures of `journal` at `now`."""
        return cls(
            generation=journal.position()[0],
            active=journal.size(),
            retired=journal.retired(),
            unsynced=journal.unsynced(),
            age=max(0.0, now - journal.swapped_at()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The figures of one node at one moment."""

    at: float
    """Unix seconds."""
    counters: dict[Counter, int]
    """Sums over all processes of the host since the store was made."""
    store: StoreStatus
    oldest_change_age: float
    """Seconds since the oldest change that PostgreSQL does not have; 0.0 if none."""
    last_flush: FlushReport | None
    """What the last run of the flusher did, in whichever process."""
    journal: JournalFigures | None
    """None without a journal."""
    node: str
    """The name of this node, as it stands in the rows it wrote."""
    interval: float
    """FLUSH_INTERVAL, in seconds."""

    @property
    def poller_age(self) -> float | None:
        """Seconds since a poller flushed; None if none ever has."""
        polled_at = 0.0 if self.last_flush is None else self.last_flush.polled_at
        return max(0.0, self.at - polled_at) if polled_at else None

    @property
    def is_poller_dead(self) -> bool:
        """No poller has flushed for two intervals, though there has been something to flush."""
        patience = PATIENCE * self.interval
        if self.poller_age is not None:
            return self.poller_age > patience
        was_replaced = self.last_flush is not None and self.last_flush.by == AGENT
        return was_replaced or self.oldest_change_age > patience

    @property
    def hit_rate(self) -> float | None:
        """Share of the loads that memory answered, 0.0 to 1.0; None before the first."""
        hits, misses = self.counters[Counter.LOADS], self.counters[Counter.MISSES]
        return hits / (hits + misses) if hits + misses else None

    @property
    def writes_avoided(self) -> int:
        """How many more statements an engine would have needed that writes at once."""
        return writes_avoided(self.counters)

    def gauges(self) -> dict[Gauge, float]:
        """Return what goes up and down, as samples keep it."""
        flush = self.last_flush or FlushReport()
        journal = self.journal or JournalFigures(0, 0, 0, 0, 0.0)
        return {
            Gauge.SESSIONS: self.store.records,
            Gauge.DIRTY: self.store.dirty,
            Gauge.OLDEST_CHANGE_SECONDS: self.oldest_change_age,
            Gauge.STORE_BYTES: self.store.size,
            Gauge.STORE_USED_BYTES: self.store.used,
            Gauge.LAST_POLL_TIMESTAMP_SECONDS: flush.polled_at,
            Gauge.LAST_FLUSH_TIMESTAMP_SECONDS: flush.at,
            Gauge.LAST_FLUSH_SECONDS: flush.seconds,
            Gauge.LAST_FLUSH_ROWS: flush.rows,
            Gauge.LAST_FLUSH_FAILED: bool(flush.failure),
            Gauge.JOURNAL_BYTES: journal.active,
            Gauge.JOURNAL_UNSYNCED_BYTES: journal.unsynced,
        }

    def sample(self) -> Sample:
        """Return the figures as history keeps them."""
        return Sample(self.at, self.counters, self.gauges())


class FiguresReader:
    """Collects the figures of the node."""

    def __init__(
        self,
        *,
        store: HostStore,
        counters: Counters,
        flusher: Flusher,
        history: History,
        interval: float,
        node: str,
    ) -> None:
        self._store = store
        self._counters = counters
        self._flusher = flusher
        self._history = history
        self._interval = interval
        self._node = node
        self._sampled = -1  # ten seconds, by number

    def read(self, now: float) -> Statistics:
        """Return the figures at `now`; makes the store if the node has none."""
        oldest = self._store.oldest_change()
        journal = self._store.journal
        return Statistics(
            at=now,
            counters=self._counters.totals(),
            store=self._store.status(),
            oldest_change_age=0.0 if oldest is None else max(0.0, now - oldest),
            last_flush=self._flusher.last_report(),
            journal=None if journal is None else JournalFigures.of(journal, now),
            node=self._node,
            interval=self._interval,
        )

    def sample_once(self, now: float) -> bool:
        """Keep the figures of these ten seconds, unless they are kept; tell whether it did."""
        number = int(now // STEP)
        if number == self._sampled:
            return False
        self._history.record(self.read(now).sample())
        self._sampled = number
        return True

    def history(self, seconds: float, now: float) -> list[Sample]:
        """Return the samples of the last so many seconds, oldest first."""
        return self._history.read(now - seconds, now)


def writes_avoided(counters: dict[Counter, int]) -> int:
    """Return how many statements less there were than saves, creations and deletions."""
    at_once = (Counter.UPDATES, Counter.TOUCHES, Counter.CREATIONS, Counter.DELETIONS)
    return max(0, sum(counters[c] for c in at_once) - counters[Counter.STATEMENTS])
