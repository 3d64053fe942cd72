"""What one run of the flusher did: a value that faces show and processes exchange.

Made by `flusher`. Invariant: the numbers are of records, each counted under the last
thing that became of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

POLLER: Final = "poller"
AGENT: Final = "agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushReport:
    """What one run of the flusher did."""

    at: float = 0.0
    """When it ran, Unix seconds."""
    seconds: float = 0.0
    """How long it took."""
    inserted: int = 0
    """Sessions PostgreSQL had not had before."""
    updated: int = 0
    """Changed sessions written."""
    touched: int = 0
    """Sessions of which only the expiry was written."""
    deleted: int = 0
    """Deletions made good."""
    repeated: int = 0
    """Found written already, by an attempt that could not say so."""
    vanished: int = 0
    """Found deleted in PostgreSQL by somebody else."""
    superseded: int = 0
    """Found newer in PostgreSQL, written by somebody else."""
    fenced: int = 0
    """Refused, because the session has passed to another node; changes are kept for inspection."""
    outdated: int = 0
    """Found older in PostgreSQL than it had confirmed; written at the next run."""
    incomplete: int = 0
    """Written, but not to all copies; written again at the next run."""
    locked: int = 0
    """Put off, because a transaction of the application holds the row."""
    set_aside: int = 0
    """Put off, because PostgreSQL refused the data."""
    remaining: int = 0
    """Dirty records left, due or not."""
    failure: str = ""
    """Why the run ended early; everything it did not write is still due."""
    by: str = POLLER
    """Who ran it: a poller, the agent in its place, or what else needed a flush."""
    polled_at: float = 0.0
    """When a poller ran last, Unix seconds; 0.0 if none ever has."""
    skipped: bool = False
    """Another flusher of this node was at work; nothing was done."""

    @property
    def rows(self) -> int:
        """Rows inserted, updated or deleted."""
        return self.inserted + self.updated + self.touched + self.deleted
