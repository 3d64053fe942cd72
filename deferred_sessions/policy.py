"""When a dirty record is due: pure functions of a record's figures and the time.

Called by `lifecycle` for each change of a record. Invariant: as long as a record is
dirty its due time never depends on how often it is used, except to come *earlier*;
a session in constant use is written as often as any other.
"""

from __future__ import annotations

from typing import Final, NamedTuple

NEVER: Final = float("inf")

EXPIRY_SHARE: Final = 0.1
"""A touch is written when this share of the session's lifetime is left in PostgreSQL:
small enough to save nearly all writes, large enough that a lost host costs a visitor
no more than this share of the lifetime."""


class Policy(NamedTuple):
    """The thresholds that a project tunes."""

    interval: float
    """Seconds since the last write to PostgreSQL (`FLUSH_INTERVAL`)."""
    after_updates: int | None = None
    """Updates since then (`FLUSH_AFTER_UPDATES`); None = no such threshold."""
    after_requests: int | None = None
    """Requests since then (`FLUSH_AFTER_REQUESTS`); None = no such threshold."""

    def expiry_margin(self, lifetime: float) -> float:
        """Seconds before the stored expiry at which a longer one must be written."""
        return max(2 * self.interval, EXPIRY_SHARE * lifetime)

    def due_at(
        self,
        now: float,
        *,
        known: float,
        changed: bool,
        written_at: float,
        updates: int,
        requests: int,
        expires_at: float,
        stored_expires_at: float,
    ) -> float:
        """Return when the record must be written: whichever reason comes first.

        `known` is when it was due already, or NEVER: reasons only bring that forward.
        `changed` tells that PostgreSQL lacks the payload, not only the expiry.
        `written_at` is when the interval began, or NEVER if `known` allows for it; in
        the future only if the clock was set back.
        """
        if now < written_at < NEVER:
            written_at = now
        due_at = min(known, written_at + self.interval)
        if changed and self.has_reached_count(updates, requests):
            due_at = min(due_at, now)
        if 0 < stored_expires_at < expires_at:
            due_at = min(due_at, stored_expires_at - self.expiry_margin(expires_at - now))
        return due_at

    def has_reached_count(self, updates: int, requests: int) -> bool:
        """Tell whether N updates or N requests have come since the last write."""
        return (self.after_updates is not None and updates >= self.after_updates) or (
            self.after_requests is not None and requests >= self.after_requests
        )

    def cannot_wait(self, now: float, expires_at: float, stored_expires_at: float) -> bool:
        """Tell whether the stored expiry may bite before any poller comes.

        True for sessions that live shorter than the flush interval: with half of
        their lifetime left in PostgreSQL they are written at once.
        """
        if not 0 < stored_expires_at < expires_at:
            return False
        return stored_expires_at - now < min(self.interval, (expires_at - now) / 2)
