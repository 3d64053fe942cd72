"""What it costs to find out which session servers hold a key, and how even the shares are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from statistics import median

from benchmarks.measure import Goal, Scale, Table
from deferred_sessions.servers.placement import Placement

MOST = 5.0  # microseconds for three servers; a load and a save take three times that
KEYS = [f"{number:032x}" for number in range(10_000)]
SERVERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield one table."""
    scale.progress("placement")
    rows = []
    for count in (1, 2, 3, 8):
        equal = dict.fromkeys(SERVERS[:count], 1.0)
        placement = Placement(equal)
        seconds = median(took(placement) for _ in range(5))
        weighted = median(took(Placement({**equal, "one": 2.0})) for _ in range(5))
        shares = Counter(placement.ranked(key)[0] for key in KEYS)
        even = len(KEYS) / count
        worst = max(abs(share - even) for share in shares.values()) / even
        rows.append((str(count), f"{seconds:.2f} µs", f"{weighted:.2f} µs", f"{worst:.1%}"))
        if count == 3:  # noqa: PLR2004
            yield Goal("rank of a key on three servers", seconds, MOST, unit=" µs")
    header = ("session servers", "rank of a key", "with weights", "farthest from an even share")
    yield Table("placement: 10,000 keys", header, rows)


def took(placement: Placement) -> float:
    """Return microseconds per key."""
    started = time.perf_counter()
    for key in KEYS:
        placement.ranked(key)
    return (time.perf_counter() - started) / len(KEYS) * 1e6
