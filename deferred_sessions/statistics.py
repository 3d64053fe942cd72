"""The figures of this host, for everybody: pages, monitoring, scripts.

    from deferred_sessions import statistics

    figures = statistics.read()
    figures.counters[statistics.Counter.UPDATES]

Called by the faces of this package and by projects. Invariant: what is here stays: names
are added, none is taken away, and every figure is a sum over all processes of the host.
"""

from __future__ import annotations

import time

from deferred_sessions.figures import JournalFigures, Statistics
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.history import Gauge, Sample
from deferred_sessions.memory.tables import StoreStatus
from deferred_sessions.rates import per_second, series
from deferred_sessions.report import FlushReport
from deferred_sessions.runtime import get_runtime

__all__ = [
    "Counter",
    "FlushReport",
    "Gauge",
    "JournalFigures",
    "Sample",
    "Statistics",
    "StoreStatus",
    "history",
    "per_second",
    "read",
    "series",
]


def read(now: float | None = None) -> Statistics:
    """Return the figures of this host as they are now; takes well under a millisecond.

    With many thousands of sessions that are not in PostgreSQL yet it is milliseconds,
    because the oldest of them is looked for. `now` is Unix time, for tests.

    Raises:
        StoreError: The store cannot be opened, or made if there is none.
    """
    return get_runtime().statistics.read(time.time() if now is None else now)


def history(seconds: float = 3600.0, now: float | None = None) -> list[Sample]:
    """Return the figures of the last so many seconds, oldest first.

    There is a sample for every ten seconds of the last hour; who asks for more gets one for
    every five minutes of the last day. The agent keeps them: without one there are none.
    They outlive processes, but not the host.

    Raises:
        StoreError: The directory of the store is not what it should be.
    """
    return get_runtime().statistics.history(seconds, time.time() if now is None else now)
