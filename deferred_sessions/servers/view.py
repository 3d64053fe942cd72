"""Which session servers are in, and what follows from that for each key.

Made by `fleet` from a note of the node, changed by `succession`. Pure. Invariant: two nodes
that know of the same standings choose the same homes for each key, whatever their settings
say: by which weights sessions are placed stands among the standings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from deferred_sessions.servers.placement import Placement, placement_of
from deferred_sessions.servers.standing import (
    EPOCH,
    FILLING,
    GONE,
    IN,
    LEAVING,
    ORDER,
    OUT,
    Order,
    Standing,
    Standings,
)

Rank = tuple[str, ...]
"""All of SERVERS in the order in which they are to hold a key."""


class Layout(NamedTuple):
    """What homes follow from, besides the key."""

    servers: tuple[tuple[str, float], ...]
    """Names and weights, as the order has them."""
    copies: int
    trusted: tuple[str, ...]
    """Those that are in."""

    def homes(self, key: str) -> tuple[str, ...]:
        """Return the servers that are to hold `key`; the authority first."""
        if not self.servers:
            return ()
        ranked = placement_of(self.servers).ranked(key)
        return trusted_homes(ranked, self.trusted, self.copies)


@dataclass(frozen=True, kw_only=True)
class View:
    """What a node knows of its session servers; never changed, shared by threads."""

    wish: Order
    """What this node's settings ask for: the order, as long as nothing is known."""
    standings: Standings
    past: tuple[Layout, ...] = ()
    """From which layouts on not all nodes are known to have moved; see `is_moving`."""
    settled: Layout | None = None
    """The layout that all sessions in the memory of this node were last written by."""
    settled_on: str = ""
    """The digest of the view that this node has settled on."""
    agreed_on: str = ""
    """The digest of the view that all nodes were found settled on."""

    @cached_property
    def order(self) -> Order:
        """By what sessions are placed."""
        known = self.standings.get(ORDER)
        return self.wish.unsure() if known is None else Order.decoded(known.phase)

    @cached_property
    def copies(self) -> int:
        """On how many servers each session is to be."""
        return self.order.copies

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All servers of the order."""
        return tuple(name for name, _ in self.order.servers)

    @cached_property
    def placement(self) -> Placement:
        """Ranks the servers for each key."""
        return placement_of(self.order.servers)

    @cached_property
    def trusted(self) -> frozenset[str]:
        """The servers that may be homes: those that are in, or what is there instead."""
        return frozenset(self._in_phase(IN) or self._in_phase(FILLING) or self.names)

    @cached_property
    def filling(self) -> frozenset[str]:
        """The servers that get each write as a further copy."""
        return frozenset(self._in_phase(FILLING)) - self.trusted

    @cached_property
    def live(self) -> tuple[str, ...]:
        """The servers of the order that are not out."""
        return tuple(n for n in self.names if n in self.trusted or self.phase(n) != OUT)

    @cached_property
    def leaving(self) -> tuple[str, ...]:
        """The servers that are only read from: not in the order, and not known to be empty."""
        names = {s.server for s in self.standings.values() if s.phase != GONE}
        return tuple(sorted(names - {*self.names, ORDER}))

    @cached_property
    def is_whole(self) -> bool:
        """Each server has all of its sessions, and no other has any."""
        return self.trusted == set(self.names) and not self.leaving and self.is_in_order

    @property
    def is_in_order(self) -> bool:
        """All sessions have been found where the order has them, since it is in force."""
        return self.order.is_kept

    @property
    def is_untidy(self) -> bool:
        """Nothing but a walk through all servers is missing."""
        is_each_in = len(self._in_phase(IN)) == len(self.names)
        return is_each_in and not self.is_in_order and not self.leaving

    @cached_property
    def _authorities(self) -> dict[Rank, str]:
        """What `authority` has found: there are few ranks and many keys."""
        return {}

    @cached_property
    def layout(self) -> Layout:
        """What the homes of each key follow from."""
        return Layout(self.order.servers, self.copies, tuple(sorted(self.trusted)))

    @cached_property
    def digest(self) -> str:
        """What nodes compare that wait for each other."""
        said = [self.order, *(s[:3] for _, s in sorted(self.standings.items()))]
        return blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()

    @cached_property
    def epoch(self) -> int:
        """Where the fences begin that servers give by this view: see migration 0013."""
        return sum(standing.number - 1 for standing in self.standings.values()) << 20

    def phase(self, server: str) -> str:
        """Return how `server` stands."""
        standing = self.standings.get(server)
        if server in self.names:
            return IN if standing is None else standing.phase
        return LEAVING if server in self.leaving else GONE

    def since(self, server: str) -> float:
        """Return since when `server` stands as it does."""
        standing = self.standings.get(server)
        return EPOCH if standing is None else standing.since

    def homes(self, ranked: Rank) -> tuple[str, ...]:
        """Return the servers that are to hold a key which is `ranked` so; the authority first."""
        homes = trusted_homes(ranked, self.trusted, self.copies)
        if not self.filling:
            return homes
        return (*homes, *(server for server in ranked if self.is_filled_with(server, ranked)))

    def authority(self, ranked: Rank) -> str:
        """Return the server whose row decides."""
        authority = self._authorities.get(ranked)
        if authority is None:
            authority = next(server for server in ranked if server in self.trusted)
            self._authorities[ranked] = authority
        return authority

    def is_filled_with(self, server: str, ranked: Rank) -> bool:
        """Tell whether `server`, which is filling, will be a home of a key when it is in."""
        if server not in self.filling:
            return False
        return server in trusted_homes(ranked, self.trusted | {server}, self.copies)

    def is_moving(self, key: str) -> bool:
        """Tell whether the authority of `key` has changed, and a node may not have moved yet."""
        if not self.past:
            return False
        now = self.layout.homes(key)[:1]
        return any(layout.homes(key)[:1] != now for layout in self.past)

    def has_moved(self, key: str) -> bool:
        """Tell whether the homes of `key` are others than when this node settled last."""
        old, new = self.settled, self.layout
        return old is None or (old != new and old.homes(key) != new.homes(key))

    def has_changed_hands(self, key: str) -> bool:
        """Tell whether another server decides about `key` than when this node settled last."""
        old, new = self.settled, self.layout
        return old is None or (old != new and old.homes(key)[:1] != new.homes(key)[:1])

    def changed_at(self) -> float:
        """Return when homes changed last, as the clock had it of the agent who decided that.

        Not when a server was empty, or all were in order: what nodes have written before counts.
        """
        moved = (s.since for s in self.standings.values() if s.phase != GONE)
        return max(moved, default=EPOCH)

    def with_standings(self, standings: Standings) -> View:
        """Return this view with other standings; nodes may yet have to move to it."""
        after = replace(self, standings=dict(standings))
        if after.layout == self.layout or self.layout in self.past:
            return after
        return replace(after, past=(*self.past, self.layout))

    def begun_late(self) -> View:
        """Return this view of a node that does not know what others come from."""
        return replace(self, past=(NOWHERE,))

    def agreed(self) -> View:
        """Return this view, to which all nodes have moved."""
        return replace(self, past=(), agreed_on=self.digest)

    @property
    def is_settled(self) -> bool:
        """This node has moved to it."""
        return self.settled_on == self.digest

    @property
    def is_agreed(self) -> bool:
        """All living nodes have moved to it: what they write from now on, they write by it."""
        return self.agreed_on == self.digest

    def settled_here(self) -> View:
        """Return this view, which this node has moved to."""
        return replace(self, settled=self.layout, settled_on=self.digest)

    def oldest_gap(self) -> float | None:
        """Return from when on some server may have missed something; None if none has."""
        owed = [self.since(name) for name in self.names if self.phase(name) != IN]
        return min(owed, default=None)

    def disorder_since(self) -> float | None:
        """Return from when on a server may have what another one was to delete; None if none has.

        Because it had that before the order changed, or is leaving.
        """
        owed = [self.since(name) for name in self.leaving]
        return min(owed if self.is_in_order else [*owed, self.since(ORDER)], default=None)

    def _in_phase(self, phase: str) -> tuple[str, ...]:
        return tuple(name for name in self.names if self.phase(name) == phase)


def trusted_homes(ranked: Rank, trusted: Iterable[str], copies: int) -> tuple[str, ...]:
    """Return the first of the ranking that are trusted, as many as there are copies."""
    among = trusted if isinstance(trusted, frozenset) else frozenset(trusted)
    return tuple([server for server in ranked if server in among][:copies])


NOWHERE: Final = Layout((), 0, ())
"""A layout that nobody knows: all keys have moved since."""


def encode(view: View) -> bytes:
    """Return `view` as the node keeps it."""
    return json.dumps(
        {
            "standings": list(view.standings.values()),
            "past": view.past,
            "settled": view.settled,
            "settled_on": view.settled_on,
            "agreed_on": view.agreed_on,
        }
    ).encode()


def decode(note: bytes, wish: Order) -> View:
    """Return the view that a node kept."""
    kept = json.loads(note)
    return View(
        wish=wish,
        standings={row[0]: Standing(*row) for row in kept["standings"]},
        past=tuple(map(_layout, kept["past"])),
        settled=_layout(kept["settled"]) if kept["settled"] else None,
        settled_on=kept["settled_on"],
        agreed_on=kept["agreed_on"],
    )


def _layout(kept: Sequence[Any]) -> Layout:
    servers, copies, trusted = kept
    return Layout(tuple((name, weight) for name, weight in servers), copies, tuple(trusted))
