"""Whether this node can serve its visitors, and whether it is to get new ones.

Called by the health view and by `manage.py sessionproxy`. Invariant: looking never waits
for PostgreSQL and never asks it anything; what is known of it is what others found out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from deferred_sessions.flusher import Flusher
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy
from deferred_sessions.servers.fleet import Fleet

NOTE: Final = "draining"  # the name under which the node keeps since when it is drained
REST: Final = 100  # times what it took that the dirty sessions are left alone after a look


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A node at one moment. Times are in seconds."""

    is_draining: bool
    """It is to get no new visitors."""
    is_postgresql_away: bool | None
    """What the last attempt of this process, or flush of this node, found; None: neither yet."""
    flushed_ago: float | None
    """Since the last run of the flusher, in whichever process; None if there was none."""
    is_flush_late: bool
    """None for two intervals, though there is something to write."""
    sessions: int
    """Sessions in memory, and remembered deletions."""
    dirty: int
    """Those that PostgreSQL does not have as they are."""
    oldest_change_age: float
    """Since the oldest change that PostgreSQL does not have; 0.0 if none."""
    used: float
    """Share of the store that is in use."""
    unsynced: int | None
    """Bytes of the journal that a power loss would take now; None if there is no journal."""
    is_journal_behind: bool
    """Nobody syncs it."""

    @property
    def troubles(self) -> list[str]:
        """The names of what is not as it should be, though sessions are served."""
        found = {
            "postgresql": self.is_postgresql_away,
            "flush": self.is_flush_late,
            "journal": self.is_journal_behind,
        }
        return [name for name, is_found in found.items() if is_found]


class ConditionReader:
    """Looks at a node, and keeps whether it is drained."""

    def __init__(
        self, *, store: HostStore, servers: Fleet, flusher: Flusher, policy: Policy
    ) -> None:
        self._store = store
        self._servers = servers
        self._flusher = flusher
        self._policy = policy
        self._oldest: float | None = None
        self._look_again_at = 0.0

    def read(self, now: float) -> Condition:
        """Return the condition at `now`; makes the store if the node has none.

        Raises:
            StoreError: The store cannot be used, so no session can be served.
        """
        status = self._store.status()
        oldest = self._oldest_change() if status.dirty else None
        age = 0.0 if oldest is None else max(0.0, now - oldest)
        report = self._flusher.last_report()
        flushed_ago = None if report is None else max(0.0, now - report.at)
        since = age if flushed_ago is None else min(age, flushed_ago)
        journal = self._store.journal
        return Condition(
            is_draining=self.draining_since() is not None,
            is_postgresql_away=self._is_postgresql_away(now),
            flushed_ago=flushed_ago,
            is_flush_late=since > 2 * self._policy.interval,
            sessions=status.records,
            dirty=status.dirty,
            oldest_change_age=age,
            used=status.used / status.size,
            unsynced=None if journal is None else journal.unsynced(),
            is_journal_behind=journal is not None and _is_behind(journal, now),
        )

    def draining_since(self) -> float | None:
        """Return when this node began to be drained; None if it gets new visitors."""
        note = self._store.note(NOTE)
        return float(note) if note else None

    def drain(self, now: float) -> None:
        """Have the director send new visitors elsewhere; every process knows on return."""
        if self.draining_since() is None:
            self._store.set_note(NOTE, repr(now).encode())

    def resume(self) -> None:
        """Have new visitors again."""
        self._store.set_note(NOTE, b"")

    def _is_postgresql_away(self, now: float) -> bool | None:
        """Return what was found out last, by connecting or by a flush that had work to do."""
        found: list[tuple[float, bool]] = []
        breakers = [server.breaker for server in self._servers.live()]
        seen = [ago for breaker in breakers if (ago := breaker.seen_ago()) is not None]
        if seen:
            found.append((min(seen), any(breaker.is_broken for breaker in breakers)))
        report = self._flusher.last_report()
        if report is not None and (report.failure or report.rows):
            found.append((max(0.0, now - report.at), bool(report.failure)))
        return min(found)[1] if found else None

    def _oldest_change(self) -> float | None:
        """Return the time of the oldest change; looks seldom where there are many."""
        started = time.monotonic()
        if started >= self._look_again_at:
            self._oldest = self._store.oldest_change()
            ended = time.monotonic()
            self._look_again_at = ended + REST * (ended - started)
        return self._oldest


def _is_behind(journal: Journal, now: float) -> bool:
    return bool(journal.sync_interval) and journal.unsynced() > 0 and journal.is_behind(now)
