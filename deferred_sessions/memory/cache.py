"""The process cache: snapshots of sessions that this process used, each at a version.

Called by `tiers` on every load and save. Invariant: an entry is used only at exactly
the version that the host store holds, and only as long as the record has not left the
store meanwhile, so that no change of another process is missed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Entry(NamedTuple, Generic[T]):
    """A snapshot, and which state of the record it is."""

    version: int
    entered_at: float
    snapshot: T


class SessionCache(Generic[T]):
    """The most recently used snapshots of this process.

    Each method is one or two operations that CPython does not interrupt, so threads
    may share it without a lock; the worst a race does is to forget an entry.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, Entry[T]] = OrderedDict()

    def get(self, key: str, version: int, entered_at: float) -> Entry[T] | None:
        """Return the entry of `key` at exactly `version` of that stay, or None."""
        entry = self._entries.get(key)
        if entry is None or entry[0] != version or entry[1] != entered_at:
            return None
        return entry

    def put(self, key: str, entry: Entry[T]) -> None:
        """Keep `entry` for `key`, in place of any other."""
        entries = self._entries
        entries[key] = entry
        entries.move_to_end(key)
        if len(entries) > self._capacity:
            entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
