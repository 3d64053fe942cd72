"""What goes to a session server and comes back from it.

Used by `server` and its callers. Invariant: a repr shows neither keys nor data, which
are secrets.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

USER_KEY: Final = "_auth_user_id"
"""Where Django's login puts who it is."""
MAX_USER_ID: Final = 255  # characters; as wide as the column


def as_text(user_id: object) -> str:
    """Return who is logged in, as far as the column can hold it."""
    text = str(user_id).replace("\0", "")[:MAX_USER_ID]
    return text if text.isascii() else text.encode(errors="replace").decode()


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
    owner: str
    """The node that has the lease; "" if nobody has."""
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


class Position(NamedTuple):
    """How far a row is."""

    version: int
    fence: int
    written_at: float


class Refusal(NamedTuple):
    """A write that came too late: the session had passed to another node."""

    key: str
    fence: int
    version: int
    changed_keys: str
    """JSON, a list."""
    data: str
    owner: str
    owner_fence: int

    def __repr__(self) -> str:
        return f"<Refusal of version {self.version}>"


class Answer(Enum):
    """What PostgreSQL says to who asks for a lease."""

    GRANTED = "granted"
    QUEUED = "queued"
    """Another node has it, and was told."""
    FULL = "full"
    """Too many nodes wait for it already."""
    AGAIN = "again"
    """It changed hands in this very moment: ask again at once."""
    GONE = "gone"
    """There is no such session."""


class Grant(NamedTuple):
    """An answer, with the row if it was granted, and with its owner if it was not."""

    answer: Answer
    row: Row | None = None
    owner: str = ""


class Beat(NamedTuple):
    """What is known of a node that is taken to be alive, or of this one."""

    node: str
    beat: int
    is_dead: bool
    traits: dict[str, str]


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
