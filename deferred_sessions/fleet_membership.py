"""This node among the others, on all session servers.

Called by the agent, which has a heart for each server, and by `intake`. Invariant: a server
that does not answer keeps this node's heart from beating on none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress

from deferred_sessions.exceptions import RowRefusedError, ServerUnavailableError
from deferred_sessions.membership import Membership
from deferred_sessions.memory.pulse import Pulse
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Beat
from deferred_sessions.servers.server import SessionServer


class FleetMembership:
    """Beats on each server; one of each process."""

    def __init__(
        self,
        servers: Fleet,
        make: Callable[[SessionServer], Membership],
        *,
        pulse: Pulse,
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._pulse = pulse
        self._clock = clock
        self._make = make
        self._parts: dict[str, Membership] = {}

    def at(self, alias: str) -> Membership:
        """Return the membership on one server."""
        part = self._parts.get(alias)
        if part is None:
            part = self._parts.setdefault(alias, self._make(self._servers.named(alias)))
        return part

    def beat_once(self, now: float) -> list[str]:
        """Beat on all servers; return the nodes that this found dead.

        Raises:
            ServerUnavailableError: The single server was not told.
        """
        if self._servers.only is not None:
            return self.at(self._servers.only.alias).beat_once(now)
        dead: set[str] = set()
        for server in self._servers.servers:
            with suppress(ServerUnavailableError, RowRefusedError):
                dead.update(self.at(server.alias).beat_once(now))
        return sorted(dead)

    def join(self, aliases: Collection[str], now: float) -> None:
        """Be known on these servers, as far as they answer, before sessions are taken from them."""
        for server in self._servers.servers:
            if server.alias in aliases and not self.at(server.alias).has_joined:
                with suppress(ServerUnavailableError, RowRefusedError):
                    self.at(server.alias).beat_once(now)

    def check_in(self, now: float) -> None:
        """Beat in the place of an agent that has not for long: see `Membership.check_in`."""
        if self._servers.only is not None:
            self.at(self._servers.only.alias).check_in(now)
            return
        if self._pulse.is_late(self._clock()):
            for server in self._servers.live():
                with suppress(ServerUnavailableError, RowRefusedError):
                    self.at(server.alias).say_so(now)

    def others(self) -> list[Beat] | None:
        """Return the nodes that were alive at this process's last beat on each live server.

        None if some server that is not out did not take it.
        """
        found: list[Beat] = []
        for server in self._servers.live():
            others = self.at(server.alias).others
            if others is None:
                return None
            found += others
        return found
