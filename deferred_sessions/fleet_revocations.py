"""What others did behind our back, on all session servers.

Called by the agent and the flusher as `Revocations` of a single server are. Invariant: a server
that cannot be read holds up none of the others, and what it has to say is read later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.revocations import Revocations
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.server import SessionServer

LEFT: Final = 30 * 86_400.0  # seconds for which what was deleted is kept for servers that left


class FleetRevocations:
    """Reads each server's revocations, with its own note of how far."""

    def __init__(self, servers: Fleet, make: Callable[[SessionServer], Revocations]) -> None:
        self._servers = servers
        self._make = make
        self._parts: dict[str, Revocations] = {}

    def read_once(self, now: float) -> int:
        """Act on what is new; return how many sessions of this node that concerned.

        Raises:
            ServerUnavailableError: Some server could not be read; the next reading has it all.
        """
        concerned = 0
        failure: DeferredSessionsError | None = None
        for server in self._servers.live():
            try:
                concerned += self._of(server).read_once(now)
            except DeferredSessionsError as error:
                failure = error
        if failure is not None:
            raise failure
        return concerned

    def prune(self, now: float) -> None:
        """Remove from PostgreSQL what every node, and every server, has had time to read.

        A server that is not in has yet to hear of what was deleted since it was left out; so
        has, for a month, one that was not named any more, because it may be named again, and
        whichever had sessions that belong to another one now.
        """
        owed = [now]
        if self._servers.only is None:
            view = self._servers.view()
            if (gap := view.oldest_gap()) is not None:
                owed.append(gap)
            if (since := view.disorder_since()) is not None:
                owed.append(max(since, now - LEFT))
        before = min(owed) - lifecycle.REMEMBERED
        for server in self._servers.live():
            server.prune_revocations(before)

    def _of(self, server: SessionServer) -> Revocations:
        part = self._parts.get(server.alias)
        if part is None:
            part = self._parts.setdefault(server.alias, self._make(server))
        return part
