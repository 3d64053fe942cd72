"""Counters that all processes of a host share and that no crash resets.

Called on the request path, so counting costs one store into mapped memory and no
lock: each process has a slot of its own in one small file and only ever adds to it;
the value of a counter is the sum over the slots. Invariant: a slot is written by one
living process; the kernel frees it when that process ends, and its successor goes on
adding where it stopped.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from enum import IntEnum
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import StoreError
from deferred_sessions.memory import forks
from deferred_sessions.memory.directory import make_private

logger = logging.getLogger(__name__)

SLOTS: Final = 512  # processes of one host at a time; more share the last slot
SLOT_WORDS: Final = 32
WORD: Final = 8  # bytes
FILE_SIZE: Final = SLOTS * SLOT_WORDS * WORD
FILE: Final = "counters"


class Counter(IntEnum):
    """What is counted; the number is its place in the slot and is never reused."""

    REQUESTS = 0
    """Requests finished by this host's web processes."""
    LOADS = 1
    """Sessions loaded from memory."""
    MISSES = 2
    """Sessions that had to be asked for in PostgreSQL."""
    UPDATES = 3
    """Saves that changed a session."""
    TOUCHES = 4
    """Saves that changed nothing but the expiry."""
    CREATIONS = 5
    """Sessions created."""
    DELETIONS = 6
    """Sessions deleted."""
    ROWS_WRITTEN = 7
    """Rows inserted, updated or deleted in PostgreSQL."""
    STATEMENTS = 8
    """Statements that wrote to PostgreSQL."""
    FLUSHES = 9
    """Runs of the flusher that wrote something."""
    FLUSH_FAILURES = 10
    """Runs of the flusher that PostgreSQL could not take."""
    WRITES_THROUGH = 11
    """Saves written at once, because they must not wait."""
    WRITES_POSTPONED = 12
    """Saves that should have been written at once, but PostgreSQL was away."""
    VANISHED = 13
    """Dirty sessions found deleted in PostgreSQL by somebody else."""
    SUPERSEDED = 14
    """Dirty sessions found newer in PostgreSQL than here."""
    SET_ASIDE = 15
    """Records PostgreSQL refused, put off so that they do not block the others."""
    EVICTIONS = 16
    """Clean sessions removed from a full store."""
    STORE_FULL = 17
    """Saves that went straight to PostgreSQL, because the store was full."""
    MERGES = 18
    """Saves merged with the change of an overlapping request."""
    CONFLICTS = 19
    """Keys that overlapping requests both changed; the later save stood."""
    REVOKED = 20
    """Sessions in memory that somebody deleted or changed in PostgreSQL."""
    FENCED = 21
    """Changes refused, because the session had passed to another node; kept for inspection."""
    HANDED_OVER = 22
    """Sessions given up to other nodes."""
    LEASE_WAITS = 23
    """Sessions that a request had to wait for, because another node had them."""
    LOCK_WAITS = 27
    """Claims on sessions, or portions of them, that had to wait for others."""
    LOCK_WAIT_MILLISECONDS = 28
    """How long they waited, all together."""
    LOCK_TIMEOUTS = 29
    """Claims that gave up waiting."""


class Counters:
    """The counters of this host, opened by the first use in each process."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._descriptor = -1
        self._map: mmap.mmap | None = None
        self._words: memoryview | None = None
        self._offset = 0

    def add(self, counter: Counter, amount: int = 1) -> None:
        """Count `amount` more; visible to all processes at once.

        CPython does not switch threads within the addition, so no count is lost.
        """
        words = self._words or self._open()
        words[self._offset + counter] += amount

    def add_wait(self, seconds: float, was_in_vain: bool) -> None:
        """Count that somebody waited for a session that others held."""
        self.add(Counter.LOCK_WAITS)
        self.add(Counter.LOCK_WAIT_MILLISECONDS, round(1000 * seconds))
        if was_in_vain:
            self.add(Counter.LOCK_TIMEOUTS)

    def total(self, counter: Counter) -> int:
        """Return the sum over all processes, living and dead."""
        words = self._words or self._open()
        return sum(words[counter::SLOT_WORDS])

    def totals(self) -> dict[Counter, int]:
        """Return the sum over all processes, living and dead, for each counter."""
        return {counter: self.total(counter) for counter in Counter}

    def clear(self) -> None:
        """Set every counter to zero. For tests and the start of a demonstration."""
        words = self._words or self._open()
        for index in range(len(words)):
            words[index] = 0

    def close(self) -> None:
        """Give the slot back; the counts stay."""
        if self._words is not None:
            self._words.release()
            self._words = None
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def before_fork(self) -> None:
        """Keep the slot: it stays the parent's."""

    def after_fork(self, *, in_child: bool) -> None:
        """Have a child claim a slot of its own."""
        if in_child:
            self.close()

    def _open(self) -> memoryview:
        forks.watch(self)
        try:
            words = self._map_file()
        except (OSError, StoreError) as error:
            logger.warning(
                "Counting for this process only: %s",
                error,
                extra={"action": "counters_unavailable"},
            )
            words = memoryview(bytearray(SLOT_WORDS * WORD)).cast("Q")
            self._offset = 0
        self._words = words
        return words

    def _map_file(self) -> memoryview:
        make_private(self._path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o600)
        os.posix_fallocate(self._descriptor, 0, FILE_SIZE)
        self._map = mmap.mmap(self._descriptor, FILE_SIZE)
        self._offset = self._claim_slot() * SLOT_WORDS
        return memoryview(self._map).cast("Q")

    def _claim_slot(self) -> int:
        for slot in range(SLOTS - 1):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
            except (BlockingIOError, PermissionError):
                continue
            return slot
        return SLOTS - 1
