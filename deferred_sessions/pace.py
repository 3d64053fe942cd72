"""Gives way to requests: while processors are short, a poller does little at a time, and pauses.

Called by `flusher` for runs that nobody waits for. Invariant: where processors are free, or no
requests are served, nothing is waited for; and all pauses of a run have a bound, because others
may wait for its end.

Linux tells how long a thread was ready to run and had to wait for a processor
(https://docs.kernel.org/scheduler/sched-stats.html); where nobody does, there are no pauses. A
lower priority would not do: who is not given a processor cannot give back a lock either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from deferred_sessions.memory.counters import Counter, Counters

T = TypeVar("T")

SHORT: Final = 0.1  # of the time that a thread was ready to run it had to wait: that is too much
AS_LONG: Final = 8  # times as long as the batch took: a ninth of a processor is left to a poller
LONGEST: Final = 0.2  # seconds of one pause
PART: Final = 16  # of a batch, at a time: what PostgreSQL takes for it, a request may have to wait
STATISTICS: Final = Path("/proc/thread-self/schedstat")


class Look(NamedTuple):
    """How things stand for this thread. Times are seconds."""

    at: float
    ran: float = 0.0
    """How long it has run in all."""
    waited: float = 0.0
    """How long it was ready to, and had to wait for a processor."""
    served: int = 0
    """Sessions that requests of this host have loaded in all."""


def look(counters: Counters) -> Look:
    """Return how things stand now."""
    ran, waited = 0, 0
    with suppress(OSError, ValueError):
        ran, waited, _ = map(int, STATISTICS.read_text().split())
    return Look(time.monotonic(), ran / 1e9, waited / 1e9, counters.total(Counter.LOADS))


class Pace:
    """The pace of one run."""

    def __init__(
        self,
        look: Callable[[], Look],
        *,
        patience: float,
        batch_size: int,
        may_pause: Callable[[], bool],
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._look = look
        self._may_pause = may_pause
        self._left = patience
        self._sleep = sleep
        self._batch_size = batch_size
        self._is_short = False

    def batch_size(self) -> int:
        """Return how many sessions the next batch is to have."""
        return -(-self._batch_size // PART) if self._is_short else self._batch_size

    def between(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`; pause after each one where that gives way to requests."""
        before = self._look()
        for batch in batches:
            yield batch
            now = self._look()
            self._is_short = self._gives_way(before, now)
            if self._is_short:
                pause = min(AS_LONG * (now.at - before.at), LONGEST, self._left)
                self._left -= pause
                self._sleep(pause)
            before = self._look()

    def _gives_way(self, before: Look, now: Look) -> bool:
        """Tell whether requests may have had to wait for what was done between two looks."""
        ran, waited = now.ran - before.ran, now.waited - before.waited
        is_short = now.served != before.served and waited > SHORT * (ran + waited)
        return is_short and self._left > 0 and self._may_pause()
