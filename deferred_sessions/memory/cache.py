"""The process cache: snapshots of sessions that this process used, each at a version.

Called by `tiers` on every load and save. Invariant: it never has the last word. An entry is
used only if `HostStore.look` finds it to be at exactly the version that the store holds,
from the same stay there, so that no change of another process is missed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

LARGE: Final = 4096  # bytes of payload from which a snapshot counts against the bytes
MAX_BYTES: Final = 64 << 20  # payloads of large snapshots; decoded they take a few times that


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
        self._large: dict[str, int] = {}  # bytes of each large one
        self._bytes = 0  # and of all of them
        self._entries: OrderedDict[str, Entry[T]] = OrderedDict()
        self.get: Callable[[str], Entry[T] | None] = self._entries.get
        """Returns the entry of a key, which may be out of date, or None."""

    def put(self, key: str, entry: Entry[T]) -> None:
        """Keep `entry` for `key`, in place of any other."""
        entries = self._entries
        entries[key] = entry
        entries.move_to_end(key)
        if len(entry[2].payload) > LARGE or key in self._large:
            self._weigh(key, len(entry[2].payload))
        if len(entries) > self._capacity:
            self._forget_oldest()

    def drop(self, key: str) -> None:
        """Forget the entry of `key`, if there is one."""
        self._entries.pop(key, None)
        self._bytes -= self._large.pop(key, 0)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._large.clear()
        self._bytes = 0

    def _weigh(self, key: str, size: int) -> None:
        """Take note of the size of a snapshot, and make room for it if it is large."""
        self._bytes -= self._large.pop(key, 0)
        if size <= LARGE:
            return
        self._large[key] = size
        self._bytes += size
        if self._bytes > self._max_bytes:
            self._bytes = sum(self._large.copy().values())  # threads may have put it wrong
        while self._entries and self._bytes > self._max_bytes:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        with suppress(KeyError):  # another thread may have been faster
            key, _ = self._entries.popitem(last=False)
            self._bytes -= self._large.pop(key, 0)
