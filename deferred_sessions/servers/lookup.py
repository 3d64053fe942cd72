"""Looks for sessions elsewhere, while a server may lack what others have.

Called by `fleet_leases` before it asks the authority. Invariant: "no such session" is only
said if a server that is trusted, and that would be a home if all were, has said so.
"""

from __future__ import annotations

from typing import NamedTuple

from deferred_sessions.exceptions import DeferredSessionsError, ServerUnavailableError
from deferred_sessions.servers import fleet_sql
from deferred_sessions.servers.copies import copy
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Columns
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.view import IN


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
            ServerUnavailableError: Who has it may be away; nothing is known about the session.
        """
        authority = self._fleet.at(key)
        here = find(authority, key)
        others = [s for s in self._fleet.live() if s is not authority] + self._fleet.leaving()
        latest, is_deleted, missed = here, self._is_deleted(authority, key), False
        for server in others:
            try:
                found = find(server, key)
                is_deleted = is_deleted or self._is_deleted(server, key)
            except DeferredSessionsError:
                missed = True
                continue
            if found is not None and (latest is None or found.position > latest.position):
                latest = found
        if latest is None:
            self._check(key, missed=missed, is_deleted=is_deleted)
        elif latest is not here and not is_deleted:
            copy(authority, latest.columns, latest.owner, latest.written_at)

    def _check(self, key: str, *, missed: bool, is_deleted: bool) -> None:
        """Raise if a server that is away may have the session."""
        view, full = self._fleet.view(), self._fleet.ranked(key)[: self._fleet.copies]
        if is_deleted or (not missed and any(view.phase(alias) == IN for alias in full)):
            return
        raise ServerUnavailableError("The session server that may have this session is away.")

    @staticmethod
    def _is_deleted(server: SessionServer, key: str) -> bool:
        return bool(server.run(fleet_sql.DELETED, [key])[0][0])


def find(server: SessionServer, key: str) -> Copy | None:
    """Return what `server` has of a session, as it can be copied."""
    rows = server.run(fleet_sql.FIND, [key])
    if not rows:
        return None
    data, expires_at, version, fence, user_id, created_at, owner, written_at = rows[0]
    columns = Columns([key], [data], [expires_at], [version], [fence], [user_id], [created_at])
    return Copy(columns, owner, written_at)
