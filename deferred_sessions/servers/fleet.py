"""All session servers of the site: which of them a session belongs to.

Called by everything that writes, reads or deletes sessions; a single server is a fleet of one,
which is answered at once, without a look at anything. Invariant: the homes of a key follow
from the node's note of how the servers stand, so all processes of the node use the same ones;
what one of them fails to say is a failure, never "no such session".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, TypeVar

from deferred_sessions.exceptions import (
    DeferredSessionsError,
    ServerUnavailableError,
    SessionAwayError,
)
from deferred_sessions.servers.registry import Registry, announce
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import (
    Order,
    Standing,
    Standings,
    completed,
    founded,
    merged,
)
from deferred_sessions.servers.view import View, decode

T = TypeVar("T")

ASK_AGAIN: Final = 1.0  # seconds that a process without an agent trusts what it was told
PATIENCE: Final = 2.0  # seconds that a request waits for another server to take over
LOOK_AGAIN: Final = 0.02  # seconds between its looks
Shape = tuple[object, ...]


class Fleet:
    """The session servers of SERVERS, and those that leave it."""

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        copies: int,
        emptied: Sequence[str] = (),
        make: Callable[[str], SessionServer],
        note: Callable[[], bytes | None],
    ) -> None:
        self.wish = Order.of(weights, copies)
        """What the settings of this process ask for."""
        self.emptied = tuple(emptied)
        """The servers that are to hold nothing any more."""
        self._make = make
        self._note = note
        self._servers = {alias: make(alias) for alias in (*weights, *emptied)}
        self.first = next(iter(self._servers.values()))
        self.only = self.first if len(weights) == 1 and not emptied else None
        """The server, if there is but one, and none that is to be emptied."""
        self._seen: tuple[bytes, View] | None = None
        self._asked: tuple[float, View] | None = None

    @property
    def servers(self) -> tuple[SessionServer, ...]:
        """All servers that this process knows of: those of SERVERS first, then others in use."""
        note = self._note() if self.only is None else None
        if note is not None:
            view = self.read(note)
            for alias in (*view.names, *view.leaving):
                self.named(alias)
        return tuple(s for s in tuple(self._servers.values()) if s.is_named)

    def named(self, alias: str) -> SessionServer:
        """Return the server of this name; one that DATABASES lacks is away."""
        server = self._servers.get(alias)
        if server is None:
            server = self._servers.setdefault(alias, self._make(alias))
        return server

    def can_name(self, alias: str) -> bool:
        """Tell whether DATABASES of this host has this server."""
        return self.named(alias).is_named

    def owner(self) -> str:
        """Return the node that writes."""
        return self.first.owner()

    def name(self) -> str:
        """Return how the owner begins in each row that any incarnation of this node wrote."""
        return self.first.name()

    # Homes

    def at(self, key: str) -> SessionServer:
        """Return the server whose row decides about `key`."""
        if self.only is not None:
            return self.only
        view = self.view()
        return self.named(view.authority(view.placement.remembered(key)))

    def homes(self, key: str) -> tuple[SessionServer, ...]:
        """Return the servers that are to hold `key` now; the authority first."""
        if self.only is not None:
            return (self.only,)
        view = self.view()
        return tuple([self.named(alias) for alias in view.homes(view.placement.remembered(key))])

    def has_further_homes(self) -> bool:
        """Tell whether any session belongs on more than one server now."""
        view = self.view()
        return self.only is None and (view.copies > 1 or bool(view.filling))

    def further_homes(self, keys: Sequence[str]) -> dict[SessionServer, list[int]]:
        """Return the homes of `keys` beside their authorities, each with the places of its keys."""
        further: dict[SessionServer, list[int]] = {}
        if self.only is not None:
            return further
        view = self.view()
        if view.copies > 1 or view.filling:
            ranked = view.placement.remembered
            for index, key in enumerate(keys):
                for alias in view.homes(ranked(key))[1:]:
                    further.setdefault(self.named(alias), []).append(index)
        return further

    def by_authority(
        self, items: Sequence[T], key: Callable[[T], str], view: View | None = None
    ) -> list[tuple[SessionServer, Sequence[T]]]:
        """Return `items` in parts, each with the server that decides about its keys.

        As the node sees it now, or in this `view`.
        """
        if self.only is not None:
            return [(self.only, items)] if items else []
        view = view or self.view()
        ranked = view.placement.remembered
        parts: dict[str, list[T]] = {alias: [] for alias in sorted(view.trusted)}
        for item in items:
            parts[view.authority(ranked(key(item)))].append(item)
        return [(self.named(alias), part) for alias, part in parts.items() if part]

    def retried(self, key: str, work: Callable[[SessionServer], T]) -> T:
        """Return what `work` says of the authority of `key`; of the next one if that is away.

        Raises:
            ServerUnavailableError: No other server has taken over in time.
            SessionAwayError: One has, and does not know the session; that is said at once.
        """
        server = self.at(key)
        try:
            return work(server)
        except SessionAwayError:
            raise
        except ServerUnavailableError:
            if not self._has_passed_on(key, server):
                raise
        return work(self.at(key))

    # The view

    def view(self) -> View:
        """Return how the servers stand, as far as this node knows."""
        note = self._note()
        if note is None:
            return self._ask()
        seen = self._seen
        if seen is None or seen[0] != note:
            seen = self._seen = (note, self.read(note))
        return seen[1]

    def shape(self) -> Shape:
        """Return what changes if the homes of any key do."""
        if self.only is not None:
            return ()
        view = self.view()
        return (view.layout, view.filling)

    def is_whole(self) -> bool:
        """Tell whether each server has all of its sessions, and all nodes agree which those are."""
        if self.only is not None:
            return True
        view = self.view()
        return view.is_whole and not view.past

    def is_in_order(self) -> bool:
        """Tell whether sessions can only be where weights and copies have them."""
        return self.only is not None or self.view().is_in_order

    def has_all(self) -> bool:
        """Tell whether each session is on some server that is not out."""
        if self.only is not None:
            return True
        view = self.view()
        return len(view.names) - len(view.live) < view.order.surely

    def is_settled(self) -> bool:
        """Tell whether all that this node has in memory is known where it belongs now."""
        return self.only is not None or self.view().is_settled

    def has_gap(self) -> bool:
        """Tell whether a server may lack something that others have, or have what they lack."""
        if self.only is not None:
            return False
        view = self.view()
        return view.oldest_gap() is not None or view.disorder_since() is not None

    def is_decided(self, key: str, server: SessionServer, view: View) -> bool:
        """Tell whether `server` decides about `key` in this view, and all nodes know that."""
        authority = view.authority(view.placement.remembered(key))
        return authority == server.alias and not view.is_moving(key)

    def live(self) -> list[SessionServer]:
        """Return the servers in use that are not out, as far as DATABASES names them."""
        if self.only is not None:
            return [self.only]
        return [self.named(alias) for alias in self.view().live if self.can_name(alias)]

    def leaving(self) -> list[SessionServer]:
        """Return the servers that are only read from, as far as DATABASES still names them."""
        if self.only is not None:
            return []
        return [self.named(alias) for alias in self.view().leaving if self.can_name(alias)]

    def read(self, note: bytes) -> View:
        """Return the view that a node has noted."""
        return decode(note, self.wish)

    def start(self, standings: Mapping[str, Standing]) -> View:
        """Return a view of a node that knows nothing but these standings."""
        known = completed(standings, dict(self.wish.servers), self.emptied)
        return View(wish=self.wish, standings=known)

    # Connections

    def in_transaction(self) -> bool:
        """Tell whether what is written now waits for somebody else's commit, on any server."""
        return any(server.in_transaction() for server in tuple(self._servers.values()))

    def leave_pools(self) -> None:
        """Have this thread use connections of its own: see `SessionServer.leave_pool`."""
        for server in tuple(self._servers.values()):
            server.leave_pool()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Be outside of the application's transactions in the block, if there are any."""
        with ExitStack() as stack:
            for server in tuple(self._servers.values()):
                stack.enter_context(server.outside())
            yield

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Leave the thread's connections as they were: see `SessionServer.visit`."""
        with ExitStack() as stack:
            for server in tuple(self._servers.values()):
                stack.enter_context(server.visit())
            yield

    # Inside

    def _ask(self) -> View:
        """Return what the servers say themselves, in a process whose node has no agent."""
        asked = self._asked
        if asked is not None and 0 <= time.monotonic() - asked[0] < ASK_AGAIN:
            return asked[1]
        registers: list[Iterable[Standing]] = []
        for server in tuple(self._servers.values()):
            try:
                with server.attempt():
                    registers.append(Registry(server).read().values())
            except DeferredSessionsError:
                continue
        view = self.start(merged(*registers) or self._founded())
        self._asked = time.monotonic(), view
        return view

    def _founded(self) -> Standings:
        """Return how servers stand that nobody has written anything about; write it down.

        At once, because what this process is about to write makes an empty server look used.
        """
        try:
            found = {}
            for alias, server in tuple(self._servers.items()):
                with server.attempt():
                    found[alias] = Registry(server).has_sessions()
        except DeferredSessionsError:
            return {}
        standings = founded(found, self.wish, time.time())
        announce(tuple(self._servers.values()), *standings.values())
        return standings

    def _has_passed_on(self, key: str, server: SessionServer) -> bool:
        """Wait until another server decides about `key`, if that may come; return whether."""
        others = [other for other in self.live() if other is not server]
        if all(other.breaker.is_broken for other in others):
            return False
        until = time.monotonic() + PATIENCE
        while self.at(key) is server:
            if time.monotonic() >= until:
                return False
            time.sleep(LOOK_AGAIN)
        return True
