"""Which record a save may replace, and what `tiers` answers when memory alone cannot finish it.

Used by `tiers` and `bypass`; `backend` acts on the answers. Invariant: a `Saving` says in
`rest` what is left to do, and holds all that doing it takes.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import SessionDeletedError
from deferred_sessions.memory.cache import Entry
from deferred_sessions.memory.tables import Again
from deferred_sessions.payload import Snapshot
from deferred_sessions.record import CLOSED, SHUT, SessionRecord

DELETED: Final = "The session was deleted before it was saved."


class Memory(Enum):
    """What memory says when it cannot say anything."""

    UNKNOWN = auto()
    """Memory knows nothing of this session; PostgreSQL may."""


class Rest(Enum):
    """What is left to do for a save that memory alone could not finish."""

    WRITE = auto()
    """Saved in memory, but PostgreSQL must have it before the request goes on."""
    ASK = auto()
    """Not in memory: PostgreSQL has to be asked whether the session still exists."""
    BYPASS = auto()
    """No room in memory: the save has to go straight to PostgreSQL."""
    SYNC = auto()
    """Saved in memory, but the journal must be on disk before the request goes on."""
    MERGE = auto()
    """Nothing was saved: somebody else changed the session since it was loaded."""


class Saving(NamedTuple):
    """A save that memory alone could not finish."""

    rest: Rest
    key: str
    snapshot: Snapshot
    user_id: str
    expires_at: float
    is_urgent: bool
    base: Entry[Snapshot] | None
    """The session as it was loaded; if only the disk is waited for, as it was saved."""
    record: SessionRecord | None = None
    """What memory holds now: the session as it was saved, or what to merge with."""

    def __repr__(self) -> str:
        return f"<Saving, to {self.rest.name}>"  # a session key is a secret


def has_moved_on(record: SessionRecord, base: Entry[Snapshot] | None) -> bool:
    """Tell whether `record` holds another session than `base`."""
    return (
        base is not None
        and (record.version != base[0] or record.entered_at != base[1])
        and record.payload != base[2].payload
    )


def obstacle_to(
    record: SessionRecord, base: Entry[Snapshot] | None
) -> tuple[Rest, SessionRecord | None] | None:
    """Return what is left to do if `record` is why nothing was saved; raise if it was deleted."""
    if record.is_tombstone:
        raise SessionDeletedError(DELETED)
    if record.flags & SHUT:
        return Rest.ASK, None
    return (Rest.MERGE, record) if has_moved_on(record, base) else None


def saved_over(
    again: Again, base: Entry[Snapshot] | None, record: SessionRecord | None
) -> SessionRecord | None:
    """Return what a save makes of `record`: the record itself if it may not take its place."""
    if record is None or record.flags & CLOSED or has_moved_on(record, base):
        return record
    _, _, payload, user_id, expires_at, _, now, policy = again
    return lifecycle.saved(record, payload, user_id, expires_at, now, policy)
