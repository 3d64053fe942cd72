"""`sessionstats --watch`: one screen of figures, with how fast they grow.

Used by that command alone. Invariant: a frame is made from figures that were read already;
watching costs the site no more than that reading.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Final

from deferred_sessions.statistics import Counter, Sample, Statistics, per_second

CLEAR: Final = "\x1b[H\x1b[2J"  # the terminal, before a frame
MINUTE: Final = 60.0  # seconds
SHOWN: Final = (
    ("requests", Counter.REQUESTS),
    ("loads from memory", Counter.LOADS),
    ("loads from PostgreSQL", Counter.MISSES),
    ("updates", Counter.UPDATES),
    ("touches", Counter.TOUCHES),
    ("creations", Counter.CREATIONS),
    ("deletions", Counter.DELETIONS),
    ("writes to PostgreSQL", Counter.STATEMENTS),
    ("rows written", Counter.ROWS_WRITTEN),
    ("written at once", Counter.WRITES_THROUGH),
    ("merges", Counter.MERGES),
    ("conflicts", Counter.CONFLICTS),
    ("waits for locks", Counter.LOCK_WAITS),
    ("revoked elsewhere", Counter.REVOKED),
    ("evictions", Counter.EVICTIONS),
    ("flush failures", Counter.FLUSH_FAILURES),
)


class Watch:
    """Remembers what it has shown for a minute, to tell rates."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def frame(self, figures: Statistics) -> str:
        """Return what to show of `figures`."""
        self._samples.append(figures.sample())
        while len(self._samples) > 2 and figures.at - self._samples[1].at >= MINUTE:  # noqa: PLR2004
            self._samples.popleft()
        return "\n".join([*_state(figures), "", *self._rates(figures)])

    def _rates(self, figures: Statistics) -> Iterator[str]:
        first, last = self._samples[0], self._samples[-1]
        before = self._samples[-2] if len(self._samples) > 1 else first
        now, minute = per_second(before, last), per_second(first, last)
        yield f"{'':<22} {'now, /s':>10} {'last minute, /min':>18} {'in all':>14}"
        for title, counter in SHOWN:
            yield (
                f"{title:<22} {now[counter]:>10,.1f} {MINUTE * minute[counter]:>18,.0f} "
                f"{figures.counters[counter]:>14,}"
            )


def _state(figures: Statistics) -> Iterator[str]:
    at = time.strftime("%H:%M:%S", time.localtime(figures.at))
    store, flush = figures.store, figures.last_flush
    yield f"{figures.node} at {at}"
    yield f"{_poller(figures)}; {_flushed(figures)}"
    if flush is not None and flush.failure:
        yield f"The last flush failed: {flush.failure}"
    yield (
        f"{store.records:,} sessions in memory, {store.dirty:,} not in PostgreSQL as they are, "
        f"the oldest change for {figures.oldest_change_age:.0f} s"
    )
    hits = "" if figures.hit_rate is None else f"; memory answers {figures.hit_rate:.1%} of loads"
    yield (
        f"store {store.used / store.size:.0%} of {store.size >> 20} MiB used; "
        f"{figures.writes_avoided:,} writes avoided{hits}"
    )
    if (journal := figures.journal) is not None:
        yield (
            f"journal: {journal.active:,} bytes, {journal.unsynced:,} not synced, "
            f"{journal.retired:,} retired"
        )


def _poller(figures: Statistics) -> str:
    age = figures.poller_age
    if figures.is_poller_dead:
        seen = "was never seen" if age is None else f"was seen {age:.0f} s ago"
        return f"NO POLLER: it {seen}"
    return "no poller seen yet" if age is None else f"the poller came {age:.0f} s ago"


def _flushed(figures: Statistics) -> str:
    flush = figures.last_flush
    if flush is None:
        return "nothing was flushed yet"
    age = max(0.0, figures.at - flush.at)
    return f"the last flush, {age:.0f} s ago, wrote {flush.rows:,} rows in {flush.seconds:.3f} s"
