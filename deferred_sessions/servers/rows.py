"""What goes to a session server and comes back from it.

Used by `server` and its callers. Invariant: a repr shows neither keys nor data, which
are secrets.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """A session as PostgreSQL keeps it. Times are Unix seconds."""

    key: str
    data: str
    """What Django's `SessionStore.encode` makes: signed text."""
    expires_at: float
    version: int
    fence: int
    user_id: str
    created_at: float
    written_at: float
    is_settled: bool
    """Any other transaction that begins now would read the same."""

    def __repr__(self) -> str:
        return f"<Row of version {self.version}>"  # no key and no data: they are secrets


class Columns(NamedTuple):
    """Sessions to be written, column by column, sorted by key against deadlocks."""

    key: list[str]
    data: list[str]
    expires_at: list[float]
    version: list[int]
    fence: list[int]
    user_id: list[str]
    created_at: list[float]

    def __repr__(self) -> str:
        return f"<Columns of {len(self.key)} sessions>"


class State(NamedTuple):
    """What PostgreSQL holds of a session that it did not take."""

    version: int
    fence: int
    owner: str
    expires_at: float
    data: str

    def __repr__(self) -> str:
        return f"<State of version {self.version}>"


class Revocation(NamedTuple):
    """Something that was done to a row other than by a flush."""

    number: int
    transaction: int
    """The identifier that PostgreSQL gave to the transaction; ordered by its beginning."""
    key: str | None
    """None stands for all sessions."""
    node: str
    """Who did it, if it was one of us."""
    made_at: float
    """When its transaction began."""

    def __repr__(self) -> str:
        return f"<Revocation {self.number}>"


class Revocations(NamedTuple):
    """What was revoked, as far as it is committed."""

    rows: list[Revocation]
    horizon: int
    """The oldest transaction that was still open: read on from there the next time."""
    server: str
    """Which server process said so; another one may have forgotten commits of this one."""
