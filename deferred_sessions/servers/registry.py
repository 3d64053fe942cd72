"""What one session server has heard of how all of them stand.

Used by the agent's watch over each server, by `fleet` in a process without an agent, and by
`resync`. Invariant: a server's number in a register never falls; whoever is told of
two changes keeps the later one, in whichever order they come.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.servers import fleet_sql
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import Standing


def announce(servers: Iterable[SessionServer], *standings: Standing) -> bool:
    """Tell all of `servers` how some of them stand from now on; return whether any has heard.

    Agents hear of it with their next heartbeat, and move to it. Each server hears of all at
    once: a register that lacks a server would say that it was added.
    """
    has_heard = False
    for server in servers:
        with suppress(DeferredSessionsError), server.attempt():
            Registry(server).write(standings)
            has_heard = True
    return has_heard


class Registry:
    """The register on one session server.

    Every method raises ServerUnavailableError if the server is away.
    """

    def __init__(self, server: SessionServer) -> None:
        self._server = server

    def read(self) -> dict[str, Standing]:
        """Return what is known here, by server."""
        rows = self._server.run(fleet_sql.READ_REGISTRY, [])
        return {row[0]: Standing(*row) for row in rows}

    def write(self, standings: Iterable[Standing]) -> None:
        """Tell of these standings; what is known here of later stays."""
        columns = [list(column) for column in zip(*sorted(standings), strict=True)]
        if columns:
            self._server.run(fleet_sql.WRITE_REGISTRY, columns)

    def has_sessions(self) -> bool:
        """Tell whether this server has been used before."""
        return bool(self._server.run(fleet_sql.HAS_SESSIONS, [])[0][0])
