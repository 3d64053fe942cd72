"""Leases on all session servers: each is the authority of its own keys.

Called as `Leases` of a single server are, by `acquisition`, `handover` and `refusals`.
Invariant: no lease is given out by a server while a node that holds the session may not
have told it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.leases import Leases
from deferred_sessions.servers.lookup import Lookup
from deferred_sessions.servers.rows import Answer, Grant, Refusal
from deferred_sessions.servers.server import SessionServer


class FleetLeases:
    """The leases of this node, wherever they are."""

    def __init__(self, fleet: Fleet, make: Callable[[SessionServer], Leases]) -> None:
        self._fleet = fleet
        self._lookup = Lookup(fleet)
        self._make = make
        self._leases: dict[str, Leases] = {}

    def acquire(
        self, key: str, *, waits: bool = False, is_unknown: Callable[[], bool] = bool
    ) -> Grant:
        """Ask for the lease of `key`: see `Leases.acquire`.

        `is_unknown` is asked when it is certain by which view of the servers this goes: so what
        another request has put into memory since was loaded by the same one, or a later one, and
        under no earlier fence.

        While the servers change places, all are queued, by nobody: ask again soon.
        """
        if self._fleet.only is not None:
            return self._at(self._fleet.only).acquire(key, waits=waits)
        ask = partial(self._acquire, key, waits=waits, is_unknown=is_unknown)
        return self._fleet.retried(key, ask)

    def find(self, key: str) -> None:
        """Have the authority of `key` know of it: see `Lookup.bring`.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        if not self._fleet.is_whole():
            self._fleet.retried(key, lambda _: self._lookup.bring(key))

    def withdraw(self, key: str) -> None:
        """Leave the queue for `key`."""
        self._at(self._fleet.at(key)).withdraw(key)

    def requested(self) -> dict[str, int]:
        """Return the leases of this node, with their fences, that others wait for.

        Raises:
            ServerUnavailableError: No server could be asked.
        """
        return {
            key: fence
            for server, found in self._of_each(Leases.requested)
            for key, fence in found.items()
            if self._fleet.at(key) is server
        }

    def release(self, leases: Mapping[str, int]) -> dict[str, bool]:
        """Give up these leases: see `Leases.release`.

        Raises:
            ServerUnavailableError: None of their servers could be told.
        """
        released: dict[str, bool] = {}
        view = self._fleet.view() if self._fleet.only is None else None
        epoch = 0 if view is None else view.epoch
        parts = self._fleet.by_authority(sorted(leases), str, view)
        failure: DeferredSessionsError | None = None
        for server, keys in parts:
            try:
                part = {key: leases[key] for key in keys}
                released |= self._at(server).release(part, epoch)
            except DeferredSessionsError as error:
                failure = error
        if failure is not None and not released:
            raise failure
        return released

    def held(self, after: str, limit: int) -> dict[str, int]:
        """Return leases of this node that follow the key `after`, up to `limit` of each server.

        Raises:
            ServerUnavailableError: Some server cannot be asked.
        """
        found: dict[str, int] = {}
        known_to = ""  # up to which key all servers have been heard
        for server in self._fleet.live():
            held = self._at(server).held(after, limit)
            found |= held
            if len(held) == limit:
                known_to = min(known_to or max(held), max(held))
        return {key: found[key] for key in sorted(found) if not known_to or key <= known_to}

    def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Keep what was refused, where it was: see `Leases.refuse`."""
        for server, part in self._fleet.by_authority(refusals, lambda refusal: refusal.key):
            self._at(server).refuse(part)

    def _at(self, server: SessionServer) -> Leases:
        leases = self._leases.get(server.alias)
        if leases is None:
            leases = self._leases.setdefault(server.alias, self._make(server))
        return leases

    def _acquire(
        self, key: str, server: SessionServer, *, waits: bool, is_unknown: Callable[[], bool]
    ) -> Grant:
        view = self._fleet.view()
        if not self._fleet.is_decided(key, server, view):
            server.connect()  # who is away shall be noticed
            return Grant(Answer.QUEUED)
        if not self._fleet.is_whole():
            self._lookup.bring(key)
        leases = self._at(server)
        return leases.acquire(key, waits=waits, is_unknown=is_unknown(), epoch=view.epoch)

    def _of_each(
        self, ask: Callable[[Leases], dict[str, int]]
    ) -> list[tuple[SessionServer, dict[str, int]]]:
        """Return what each live server says; raise if none does."""
        answers: list[tuple[SessionServer, dict[str, int]]] = []
        failure: DeferredSessionsError | None = None
        for server in self._fleet.live():
            try:
                answers.append((server, ask(self._at(server))))
            except DeferredSessionsError as error:
                failure = error
        if failure is not None and not answers:
            raise failure
        return answers
