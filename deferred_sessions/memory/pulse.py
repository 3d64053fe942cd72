"""The pulse of a node: five words in mapped memory that all its processes watch.

Set by `membership` and `handover`; read for each session that is loaded, so a look costs
some nanoseconds and no lock. Invariant: a word that is lost makes somebody ask
PostgreSQL once more, or later; nothing else.

When a session entered memory is told by the clock of the host, which may be set back. So
the pulse keeps how far that clock was ever ahead of the time since the host was started:
the two together never go back.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import StoreUnavailableError
from deferred_sessions.memory.directory import make_private

_clock_gettime, _BOOTTIME = time.clock_gettime, time.CLOCK_BOOTTIME

_TICK: Final = 1.0  # seconds between two looks at the clock, at the most
FILE: Final = "pulse"
SIZE: Final = 5 * 8
BEAT, SUSPECT, GRANTS, WANTED, AHEAD = range(5)
_NOT_YET: Final = math.ulp(0.0)  # the last heartbeat of a node that owes its first one
_GRAIN: Final = 1e-6  # seconds; times of the clock are told apart


def moment() -> float:
    """Return seconds since the host was started, also those that it slept; no clock is set back."""
    return _clock_gettime(_BOOTTIME)


class Pulse:
    """When this node was last heard of; opened by the first use in each process."""

    def __init__(self, directory: Path, *, patience: float) -> None:
        self._path = directory / FILE
        self.patience = patience
        """Seconds without a heartbeat after which memory is not trusted any more."""
        self.reviving: set[str] = set()
        """The session servers on which this process is just reviving the node."""
        self._words: memoryview[float] | None = None

    def doubts(self, entered_at: float, at: float) -> bool:
        """Tell whether a session that entered memory then may be another node's by now.

        So it is if the node was found dead since, or was not heard of for longer than
        `patience` seconds. A node that never was has no others beside it.
        """
        words = self._words or self._open()
        beat = words[BEAT]
        if beat and not at - self.patience <= beat <= at + _TICK:  # later: before a reboot
            return True
        return entered_at <= words[SUSPECT]

    def is_late(self, at: float) -> bool:
        """Tell whether the node beats, but was not heard of for too long."""
        beat = (self._words or self._open())[BEAT]
        return bool(beat) and not at - self.patience <= beat <= at + _TICK

    def is_suspect(self, entered_at: float) -> bool:
        """Tell whether the node was found dead since."""
        return entered_at <= (self._words or self._open())[SUSPECT]

    def beat(self, at: float) -> None:
        """Note that the node was heard of, or that PostgreSQL could not be told."""
        (self._words or self._open())[BEAT] = at

    def expect(self) -> None:
        """Have the node be late until it beats, if it never did."""
        words = self._words or self._open()
        words[BEAT] = words[BEAT] or _NOT_YET

    def suspect_all(self) -> None:
        """Doubt all that is in memory, and all that enters, until `suspect`."""
        (self._words or self._open())[SUSPECT] = math.inf

    @property
    def suspects_all(self) -> bool:
        """All is doubted: a process is about to revive the node, or died in doing so."""
        return (self._words or self._open())[SUSPECT] == math.inf

    def suspect(self, now: float) -> None:
        """Doubt all that has entered memory, and nothing that asks for its `entry` from now on."""
        words = self._words or self._open()
        words[SUSPECT] = max(now, words[AHEAD] + moment())

    def watch_clock(self, now: float) -> None:
        """Take note of how far ahead the clock is."""
        words = self._words or self._open()
        words[AHEAD] = max(words[AHEAD], now - moment())

    def entry(self, now: float) -> float:
        """Return when a session enters memory whose row is about to be read: `now`, as a rule.

        Later than all that was suspected before, and not later than what will be suspected
        after, whatever the clock has been set to meanwhile.
        """
        self.watch_clock(now)
        words, at = self._words or self._open(), moment()
        suspect = words[SUSPECT]
        if now > suspect or suspect == math.inf:
            return now
        if words[AHEAD] + at <= suspect:  # suspected before a reboot
            words[AHEAD] = suspect - at + _GRAIN
        return words[AHEAD] + at

    @property
    def grants(self) -> float:
        """How often this node was told to look again for a lease."""
        return (self._words or self._open())[GRANTS]

    def granted(self) -> None:
        """Have everybody who waits for a lease look again. One process does this at a time."""
        (self._words or self._open())[GRANTS] += 1.0

    @property
    def wanted(self) -> float:
        """How many sessions other nodes ask for that requests of this one hold."""
        return (self._words or self._open())[WANTED]

    def want(self, count: int) -> None:
        """Note how many those are."""
        (self._words or self._open())[WANTED] = count

    def _open(self) -> memoryview[float]:
        try:
            self._words = self._map_file()
        except OSError as error:
            raise StoreUnavailableError(
                f"Cannot open the session store in {self._path.parent}: {error.strerror}. "
                "Make room, or name another DEFERRED_SESSIONS['DIRECTORY']."
            ) from error
        return self._words

    def _map_file(self) -> memoryview[float]:
        make_private(self._path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, SIZE)
            return memoryview(mmap.mmap(descriptor, SIZE)).cast("d")
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmap; the next use maps it again."""
        self._words = None
