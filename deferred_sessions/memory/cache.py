"""The process cache: snapshots of sessions that this process used, each at a version.

Called by `tiers` on every load and save. Invariant: an entry is used only at exactly
the version that the host store holds, and only as long as the record has not left the
store meanwhile, so that no change of another process is missed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class SessionCache(Generic[T]):
    """The most recently used snapshots of this process.

    Each method is one or two operations that CPython does not interrupt, so threads
    may share it without a lock; the worst a race does is to forget an entry.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, tuple[int, float, T]] = OrderedDict()

    def get(self, key: str, version: int, entered_at: float) -> T | None:
        """Return the snapshot of `key` at exactly `version` of that stay, or None."""
        entry = self._entries.get(key)
        if entry is None or entry[0] != version or entry[1] != entered_at:
            return None
        return entry[2]

    def put(self, key: str, version: int, entered_at: float, snapshot: T) -> None:
        """Keep `snapshot` as `version` of `key`, in place of any other version."""
        entries = self._entries
        entries[key] = (version, entered_at, snapshot)
        entries.move_to_end(key)
        if len(entries) > self._capacity:
            entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
