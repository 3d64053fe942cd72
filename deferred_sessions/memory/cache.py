"""The process cache: snapshots of sessions that this process used, each at a version.

Called by `tiers` on every load and save. Invariant: an entry is used only at exactly
the version that the host store holds, and only as long as the record has not left the
store meanwhile, so that no change of another process is missed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

MAX_BYTES: Final = 64 << 20  # payloads of all snapshots; decoded they take a few times that


class Sized(Protocol):
    """What the cache keeps, known by the bytes it was made from."""

    payload: bytes


T = TypeVar("T", bound=Sized)


class Entry(NamedTuple, Generic[T]):
    """A snapshot, and which state of the record it is."""

    version: int
    entered_at: float
    snapshot: T

    def __repr__(self) -> str:
        return f"<Entry of version {self.version}>"


class SessionCache(Generic[T]):
    """The most recently used snapshots of this process, within two limits.

    Each method is one or a few operations that CPython does not interrupt, so threads
    may share it without a lock; the worst a race does is to forget an entry.
    """

    def __init__(self, capacity: int, max_bytes: int = MAX_BYTES) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._bytes = 0  # of payloads; a race may put it wrong until the next trim
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
        before = entries.get(key)
        entries[key] = entry
        entries.move_to_end(key)
        self._bytes += len(entry[2].payload) - (len(before[2].payload) if before else 0)
        if self._bytes > self._max_bytes or len(entries) > self._capacity:
            self._trim()

    def drop(self, key: str) -> None:
        """Forget the entry of `key`, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= len(entry[2].payload)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._bytes = 0

    def _trim(self) -> None:
        if self._bytes > self._max_bytes:
            self._bytes = sum(len(entry[2].payload) for entry in list(self._entries.values()))
        while self._entries and (
            self._bytes > self._max_bytes or len(self._entries) > self._capacity
        ):
            try:
                _, entry = self._entries.popitem(last=False)
            except KeyError:  # another thread was faster
                return
            self._bytes -= len(entry[2].payload)
