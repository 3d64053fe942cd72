"""Looks for sessions elsewhere, while a server may lack what others have.

Called by `fleet_leases` before it asks the authority. Invariant: "no such session" is only
said if a server that is trusted, and that would be a home if all were, has said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from deferred_sessions.exceptions import DeferredSessionsError, SessionAwayError
from deferred_sessions.servers import fleet_sql
from deferred_sessions.servers.copies import copy
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Columns, Position
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import IN

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
        authority, view = self._fleet.at(key), self._fleet.view()
        here = latest = find(authority, key)
        is_deleted, heard = self._is_deleted(authority, key), {authority.alias}
        leaving = self._fleet.leaving()
        for server in [*self._fleet.live(), *leaving]:
            if server is authority:
                continue
            with suppress(DeferredSessionsError):
                found, is_gone = find(server, key), self._is_deleted(server, key)
                is_deleted = is_deleted or is_gone
                heard.add(server.alias)
                if found is not None and (latest is None or found.position > latest.position):
                    latest = found
        if is_deleted and here is None:
            return
        silent = {*view.members, *(server.alias for server in leaving)} - heard
        self._check(key, None if latest is None else latest.written_at, silent)
        if latest is not None and latest is not here and not is_deleted:
            copy(authority, latest.columns, latest.owner, latest.written_at)

    def _check(self, key: str, written_at: float | None, silent: set[str]) -> None:
        """Raise if who said nothing may have something later of the session.

        Only a server that would be a home if all were in may; not if another such server is
        trusted and was asked, nor if what was found was written after that had gone away: what is
        older may be left over from an earlier outage. In disorder, any server may.
        """
        view = self._fleet.view()
        homes = [alias for alias in self._fleet.ranked(key) if alias in view.members]
        if view.is_in_order:
            homes = homes[: self._fleet.copies]
        missing = [alias for alias in homes if alias in silent]
        if written_at is None and silent.intersection(view.leaving):
            raise SessionAwayError(AWAY)
        has_heard_one = any(view.phase(alias) == IN for alias in homes if alias not in missing)
        if not missing or (has_heard_one and view.is_in_order):
            return
        since = [view.standings[alias].since for alias in missing if alias in view.standings]
        if written_at is None or written_at < min(since, default=0.0):
            raise SessionAwayError(AWAY)

    @staticmethod
    def _is_deleted(server: SessionServer, key: str) -> bool:
        return bool(server.run(fleet_sql.DELETED, [key])[0][0])


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
