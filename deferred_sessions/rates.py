"""How fast counters grow: from two samples, or along a series of them.

Called by the watching command and the dashboard. Invariant: pure; a counter that was set
back (the host was rebooted) counts as one that stood still, never as one that ran backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from deferred_sessions.figures import writes_avoided
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.history import Gauge, Sample

MINUTE: Final = 60.0  # seconds
GAP: Final = 3.5  # usual steps between two samples beyond which nothing is known
PER_MINUTE: Final = {
    "requests": Counter.REQUESTS,
    "updates": Counter.UPDATES,
    "writes": Counter.STATEMENTS,
    "rows": Counter.ROWS_WRITTEN,
    "merges": Counter.MERGES,
    "conflicts": Counter.CONFLICTS,
    "lock_waits": Counter.LOCK_WAITS,
}

Point = dict[str, float | None]


def grown(before: Sample, after: Sample) -> dict[Counter, int]:
    """Return by how much each counter grew between two samples."""
    return {c: max(0, after.counters[c] - before.counters[c]) for c in Counter}


def per_second(before: Sample, after: Sample) -> dict[Counter, float]:
    """Return how fast each counter grew between two samples."""
    seconds = max(1e-3, after.at - before.at)
    return {counter: count / seconds for counter, count in grown(before, after).items()}


def point(before: Sample, after: Sample) -> Point:
    """Return what a chart shows at the time of `after`."""
    growth, minutes = grown(before, after), max(1e-3, after.at - before.at) / MINUTE
    loads = growth[Counter.LOADS] + growth[Counter.MISSES]
    waits, statements = growth[Counter.LOCK_WAITS], growth[Counter.STATEMENTS]
    gauges = after.gauges
    return {
        "at": after.at,
        **{name: growth[counter] / minutes for name, counter in PER_MINUTE.items()},
        "avoided": writes_avoided(growth) / minutes,
        "hit_rate": growth[Counter.LOADS] / loads if loads else None,
        "batch": growth[Counter.ROWS_WRITTEN] / statements if statements else None,
        "lock_wait": growth[Counter.LOCK_WAIT_MILLISECONDS] / waits / 1000 if waits else None,
        "sessions": gauges[Gauge.SESSIONS],
        "dirty": gauges[Gauge.DIRTY],
        "oldest": gauges[Gauge.OLDEST_CHANGE_SECONDS],
        "flush_seconds": gauges[Gauge.LAST_FLUSH_SECONDS],
        "flush_rows": gauges[Gauge.LAST_FLUSH_ROWS],
        "used": gauges[Gauge.STORE_USED_BYTES],
        "journal": gauges[Gauge.JOURNAL_BYTES],
    }


def series(samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """Return the columns of a chart, one point for each sample but the first.

    Where samples are missing (nobody kept them) there is a point of nothing but its time.
    """
    steps = sorted(after.at - before.at for before, after in pairwise(samples))
    usual = steps[len(steps) // 2] if steps else 0.0
    points: list[Point] = []
    for before, after in pairwise(samples):
        if after.at - before.at > GAP * usual:
            points.append({"at": (before.at + after.at) / 2})
        points.append(point(before, after))
    names = points[-1] if points else {"at": None}
    return {name: [p.get(name) for p in points] for name in names}
