"""Keeps a process from connecting to a session server that is away, request by request.

Used by `server` before it connects. After a failure nobody tries for a moment, then one
tries for all; each failure makes the next pause longer. Invariant: a pause is never longer
than `LONGEST`, and one success ends it.

A circuit breaker, as Nygard describes it in "Release It!" (2007); the pauses are drawn at
random, so that the processes of a site do not all come back in the same instant.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

FIRST: Final = 0.25  # seconds of the first pause; each is twice as long as the one before
LONGEST: Final = 5.0  # seconds


class Breaker:
    """Whether to try; shared by the threads of a process, and harmless if two try at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._failures = 0
        self._closed_until = 0.0
        self._seen_at: float | None = None

    @property
    def is_broken(self) -> bool:
        """The last attempt to connect failed."""
        return self._failures > 0

    def seen_ago(self) -> float | None:
        """Return seconds since the last attempt to connect, however it ended; None if none."""
        return None if self._seen_at is None else max(0.0, self.clock() - self._seen_at)

    def pause(self) -> float:
        """Return how many seconds to leave the server alone; 0 asks the caller to try.

        Until the caller tells what came of it, the others are told to wait.
        """
        if not self._failures:
            return 0.0
        now = self.clock()
        if now < self._closed_until:
            return self._closed_until - now
        self._closed_until = now + LONGEST
        return 0.0

    def failed(self, took: float = 0.0) -> None:
        """Take note that the server could not be reached, and how many seconds that took.

        The pause is as long at least: of a server that hangs, a process hears at every second
        attempt's time at most.
        """
        self._failures += 1
        self._seen_at = self.clock()
        longest = min(LONGEST, max(2.0 * took, FIRST * 2.0 ** min(self._failures - 1, 10)))
        self._closed_until = self.clock() + longest * random.uniform(0.5, 1.0)  # noqa: S311

    def succeeded(self) -> None:
        """Take note that the server could be reached."""
        self._failures = 0
        self._seen_at = self.clock()
