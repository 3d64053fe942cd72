"""Looks for sessions elsewhere, while a server may lack what others have.

Called by `fleet_leases` before it asks the authority. Invariant: "no such session" is only
said if a server that is trusted, and that would be a home if all were, has said so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from deferred_sessions.exceptions import DeferredSessionsError, SessionAwayError
from deferred_sessions.servers import fleet_sql
from deferred_sessions.servers.copies import copy
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Columns, Position
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.shelf import CHANGED, Shelf, Stamp
from deferred_sessions.servers.standing import EPOCH, IN
from deferred_sessions.servers.view import View

ATTEMPTS: Final = 2  # while homes change
AWAY: Final = "The session server that may have the latest of this session is away."


class Copy(NamedTuple):
    """A session as some server has it."""

    columns: Columns
    owner: str
    written_at: float

    @property
    def position(self) -> tuple[int, int, float]:
        """What is higher the later the copy is."""
        return self.columns.fence[0], self.columns.version[0], self.columns.expires_at[0]


class Look(NamedTuple):
    """What a server says of a session."""

    copy: Copy | None
    revoked: int
    """The number of the last time that it was revoked there; 0 if it never was."""

    @property
    def is_deleted(self) -> bool:
        """Somebody deleted it there."""
        return self.copy is None and self.revoked > 0


class Lookup:
    """Brings sessions to where they belong now."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def bring(self, key: str) -> None:
        """Have the authority of `key` know the latest of it that any live server has.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
            SessionAwayError: Who has it may be away.
        """
        for _ in range(ATTEMPTS):
            view = self._fleet.view()
            try:
                return self._bring(key, view)
            except SessionAwayError:
                if self._fleet.view() is view:
                    raise
        return self._bring(key, self._fleet.view())  # homes have changed while it was looked for

    def _bring(self, key: str, view: View) -> None:
        authority = self._fleet.at(key)
        looks = {authority: look(authority, key)}
        for server in (*self._fleet.live(), *self._fleet.leaving()):
            if server is not authority:
                with suppress(DeferredSessionsError):
                    looks[server] = look(server, key)
        here, latest, source = looks[authority].copy, looks[authority].copy, authority
        for server, found in looks.items():
            if found.copy and (latest is None or found.copy.position > latest.position):
                latest, source = found.copy, server
        if _is_dead(latest, looks.values()):
            if here is not None:
                remove_as(authority, here)
            return
        heard = {server.alias for server in looks}
        self._check(view, key, None if latest is None else latest.written_at, heard)
        if latest is not None and latest is not here:
            copy(authority, latest.columns, latest.owner, latest.written_at)
            # Who deleted it meanwhile has removed this copy, or has said so there or here.
            if any(look(s, key).revoked != looks[s].revoked for s in (authority, source)):
                remove_as(authority, latest)

    @staticmethod
    def _check(view: View, key: str, written_at: float | None, heard: set[str]) -> None:
        """Raise if who said nothing may have something later of the session.

        In order only those may that would be homes if all were in, or have stood in for those, and
        those that are leaving; in disorder any that has ever been in. Not if fewer than hold each
        session are in doubt; nor if what was found was written after those had gone away: what is
        older may be left over from an earlier outage.
        """
        homes = view.placement.ranked(key)
        if view.is_in_order:  # who stood in for others is before them
            homes = homes[: max(view.copies, homes.index(view.authority(homes)))]
        doubtful = [
            alias
            for alias in homes
            if not (alias in heard and view.phase(alias) == IN)
            and (view.since(alias) != EPOCH or not view.standings)
        ]
        doubtful += view.leaving
        may_know = [
            alias
            for alias in doubtful
            if alias not in heard
            and (written_at is None or view.phase(alias) == IN or view.since(alias) > written_at)
        ]
        if may_know and len(doubtful) >= view.order.surely:
            raise SessionAwayError(AWAY)


def look(server: SessionServer, key: str) -> Look:
    """Return what `server` has, or had, of a session.

    Raises:
        ServerUnavailableError: It does not answer.
    """
    found = find(server, key)
    ((revoked,),) = server.run(fleet_sql.REVOKED, [key])
    return Look(found, revoked)


def remove_as(server: SessionServer, found: Copy) -> None:
    """Remove a row that stands as it was found; nobody hears of it."""
    columns = found.columns
    stamp = Stamp(columns.fence[0], columns.version[0], columns.expires_at[0], found.written_at)
    Shelf(server).remove({columns.key[0]: stamp})


def _is_dead(latest: Copy | None, looks: Iterable[Look]) -> bool:
    """Tell whether somebody deleted a session, of which this is the latest.

    Not one that was changed in PostgreSQL, because it was revoked for that, too. When that was
    does not matter: a key is never used again.
    """
    is_changed = latest is not None and latest.columns.version[0] >= CHANGED
    return not is_changed and any(found.is_deleted for found in looks)


def positions(server: SessionServer, keys: Sequence[str]) -> dict[str, Position]:
    """Return how far the rows of these sessions are; leaves out those without a row."""
    rows = server.run(fleet_sql.POSITIONS, [sorted(keys)])
    return {key: Position(*position) for key, *position in rows}


def find(server: SessionServer, key: str) -> Copy | None:
    """Return what `server` has of a session, as it can be copied."""
    rows = server.run(fleet_sql.FIND, [key])
    if not rows:
        return None
    data, expires_at, version, fence, user_id, created_at, owner, written_at = rows[0]
    columns = Columns([key], [data], [expires_at], [version], [fence], [user_id], [created_at])
    return Copy(columns, owner, written_at)
