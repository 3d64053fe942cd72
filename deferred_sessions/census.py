"""Counts the sessions of a host: how many, whose, how large, how old, how many unsaved.

Called by `sessionstats` with the records of a scan. Invariant: it looks at one record at a
time and keeps none, so a scan of a million sessions needs no more memory than one of ten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from deferred_sessions.record import SessionRecord

SIZES: Final = (256, 1024, 4096, 16_384, 65_536, 1 << 20)  # bytes; a bin ends below each
AGES: Final = (60, 600, 3600, 86_400, 604_800)  # seconds
MOST: Final = 10  # users with the most sessions


@dataclass(slots=True)
class Census:
    """What a scan found."""

    sessions: int = 0
    """Live ones."""
    expired: int = 0
    tombstones: int = 0
    """Remembered deletions."""
    dirty: int = 0
    """Sessions and deletions that PostgreSQL does not have as they are."""
    logged_in: int = 0
    payload: int = 0
    """Bytes of all payloads."""
    largest: int = 0
    oldest_change: float | None = None
    """Seconds since the oldest change that PostgreSQL lacks."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Live sessions by the size of their payload."""
    ages: Counter[str] = field(default_factory=Counter)
    """Live sessions by the time since they were created."""
    users: Counter[str] = field(default_factory=Counter)
    """Live sessions by user id."""

    def busiest(self) -> list[tuple[str, int]]:
        """Return the users with the most sessions."""
        return self.users.most_common(MOST)


def take_census(records: Iterable[SessionRecord], now: float) -> Census:
    """Count `records` as they are at `now`."""
    census = Census()
    for record in records:
        if record.is_dirty:
            census.dirty += 1
        if record.changed_at:
            age = max(0.0, now - record.changed_at)
            census.oldest_change = max(age, census.oldest_change or 0.0)
        if record.is_tombstone:
            census.tombstones += 1
        elif record.expires_at <= now:
            census.expired += 1
        else:
            _count(census, record, now)
    return census


def _count(census: Census, record: SessionRecord, now: float) -> None:
    size = len(record.payload)
    census.sessions += 1
    census.payload += size
    census.largest = max(size, census.largest)
    census.sizes[_bin(size, SIZES, _bytes)] += 1
    census.ages[_bin(now - record.created_at, AGES, _seconds)] += 1
    if record.user_id:
        census.logged_in += 1
        census.users[record.user_id] += 1


def bins() -> tuple[list[str], list[str]]:
    """Return the names of the bins of sizes and of ages, in order."""
    return [_name(n, SIZES, _bytes) for n in range(len(SIZES) + 1)], [
        _name(n, AGES, _seconds) for n in range(len(AGES) + 1)
    ]


def _bin(value: float, edges: tuple[int, ...], text: Callable[[int], str]) -> str:
    return _name(sum(value >= edge for edge in edges), edges, text)


def _name(place: int, edges: tuple[int, ...], text: Callable[[int], str]) -> str:
    return f"< {text(edges[place])}" if place < len(edges) else f">= {text(edges[-1])}"


def _bytes(number: int) -> str:
    return f"{number >> 20} MiB" if number >> 20 else f"{number / 1024:g} KiB"


def _seconds(number: int) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if number >= length:
            return f"{number // length} {unit}"
    return f"{number} s"
