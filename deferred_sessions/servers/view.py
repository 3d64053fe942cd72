"""Which session servers are in, and what follows from that for each key.

Made by `fleet` from a note of the node, changed by `succession`. Pure. Invariant: two nodes
that know of the same standings, and are of one digest, choose the same homes for each key,
though one of them names servers that the other does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

from deferred_sessions.servers.standing import (
    DISORDER,
    EPOCH,
    FILLING,
    GONE,
    IN,
    LEAVING,
    ORDER,
    OUT,
    Standing,
    Standings,
)

Rank = tuple[str, ...]
"""All of SERVERS in the order in which they are to hold a key."""


class Layout(NamedTuple):
    """What homes follow from, besides the key."""

    servers: tuple[tuple[str, float], ...]
    """Names and weights, as SERVERS has them."""
    copies: int
    trusted: tuple[str, ...]
    """Those that are in."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What a node knows of its session servers; never changed, shared by threads."""

    servers: tuple[tuple[str, float], ...]
    """Names and weights, as SERVERS has them."""
    copies: int
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
    def names(self) -> tuple[str, ...]:
        """All of SERVERS."""
        return tuple(name for name, _ in self.servers)

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
        """The servers that are used, and not out."""
        return tuple(n for n in self.names if n in self.trusted or self.phase(n) in {IN, FILLING})

    @cached_property
    def leaving(self) -> tuple[str, ...]:
        """The servers that are only read from: not all nodes name them in SERVERS."""
        named = set(self.names)
        return tuple(
            sorted(
                s.server
                for s in self.standings.values()
                if s.server != ORDER
                and (s.phase == LEAVING or (s.phase != GONE and s.server not in named))
            )
        )

    @cached_property
    def is_whole(self) -> bool:
        """Each server has all of its sessions, and no other has any."""
        return self.trusted == self.members and not self.leaving and self.is_in_order

    @cached_property
    def order(self) -> str:
        """The digest of what all sessions are placed by, whichever servers are in."""
        return _digest([sorted((n, w) for n, w in self.servers if n in self.members), self.copies])

    @cached_property
    def is_in_order(self) -> bool:
        """All sessions were found where this order has them, since it is the order.

        Else a session may also be where an earlier one had it: weights were others, or COPIES.
        """
        known = self.standings.get(ORDER)
        return not self.standings or (known is not None and known.phase == self.order)

    @property
    def is_untidy(self) -> bool:
        """Nothing but a walk through all servers is missing; whoever fills one has it follow."""
        return not self.is_in_order and not self.leaving and set(self._in_phase(IN)) == self.members

    def order_now(self, now: float) -> Standing:
        """Return what registers are to say of the order."""
        known = self.standings.get(ORDER)
        if known is None:
            return Standing(ORDER, 1, DISORDER, now)
        return known if known.phase in {DISORDER, self.order} else known.changed(DISORDER, now)

    @cached_property
    def members(self) -> frozenset[str]:
        """The servers that share all sessions, if all of them answer."""
        used = (name for name in self.names if self.phase(name) in {IN, FILLING, OUT})
        return self.trusted.union(used)

    @cached_property
    def _authorities(self) -> dict[Rank, str]:
        """What `authority` has found: there are few ranks and many keys."""
        return {}

    @cached_property
    def layout(self) -> Layout:
        """What the homes of each key follow from."""
        return Layout(self.servers, self.copies, tuple(sorted(self.trusted)))

    @cached_property
    def digest(self) -> str:
        """What nodes compare that wait for each other."""
        return _digest([self.order, *(s[:3] for _, s in sorted(self.standings.items()))])

    @cached_property
    def epoch(self) -> int:
        """Where the fences begin that servers give by this view: see migration 0013."""
        return sum(standing.number - 1 for standing in self.standings.values()) << 20

    def phase(self, server: str) -> str:
        """Return how `server` stands."""
        if server not in self.names:
            return LEAVING
        standing = self.standings.get(server)
        return IN if standing is None else standing.phase

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

    def is_moving(self, ranked: Rank) -> bool:
        """Tell whether the authority of a key has changed, and a node may not have moved yet."""
        if not self.past:
            return False
        now = self.authority(ranked)
        return any(
            layout.servers != self.servers or trusted_homes(ranked, layout.trusted, 1) != (now,)
            for layout in self.past
        )

    def has_moved(self, ranked: Rank) -> bool:
        """Tell whether the homes of a key are others than when this node settled last."""
        old = self.settled
        if old is None or old.servers != self.servers or old.copies != self.copies:
            return True
        return trusted_homes(ranked, old.trusted, self.copies) != trusted_homes(
            ranked, self.trusted, self.copies
        )

    def has_changed_hands(self, ranked: Rank) -> bool:
        """Tell whether another server decides about a key than when this node settled last."""
        old = self.settled
        if old is None or old.servers != self.servers:
            return True
        return trusted_homes(ranked, old.trusted, 1) != (self.authority(ranked),)

    def changed_at(self) -> float:
        """Return when a server changed places last, as its agent's clock had it."""
        return max((standing.since for standing in self.standings.values()), default=EPOCH)

    def with_standings(self, standings: Standings) -> View:
        """Return this view with other standings; nodes may yet have to move to it."""
        after = replace(self, standings=dict(standings))
        if after.layout == self.layout or self.layout in self.past:
            return after
        return replace(after, past=(*self.past, self.layout))

    def begun_late(self) -> View:
        """Return this view of a node that does not know what others come from."""
        return replace(self, past=(Layout((), 0, ()),))

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
        """Return from when on some of SERVERS may have missed something; None if none has."""
        named = (self.standings[name] for name in self.names if name in self.standings)
        return min((s.since for s in named if s.phase not in {IN, GONE}), default=None)

    def left_since(self) -> float:
        """Return from when on servers that are only read from may have missed something."""
        return min((self.standings[name].since for name in self.leaving), default=EPOCH)

    def _in_phase(self, phase: str) -> tuple[str, ...]:
        return tuple(name for name in self.names if self.phase(name) == phase)


def trusted_homes(ranked: Rank, trusted: Iterable[str], copies: int) -> tuple[str, ...]:
    """Return the first of the ranking that are trusted, as many as there are copies."""
    among = trusted if isinstance(trusted, frozenset) else frozenset(trusted)
    return tuple([server for server in ranked if server in among][:copies])


def encode(view: View) -> bytes:
    """Return `view` as the node keeps it."""
    return json.dumps(
        {
            "servers": view.servers,
            "copies": view.copies,
            "standings": list(view.standings.values()),
            "past": view.past,
            "settled": view.settled,
            "settled_on": view.settled_on,
            "agreed_on": view.agreed_on,
        }
    ).encode()


def decode(note: bytes, servers: tuple[tuple[str, float], ...], copies: int) -> View:
    """Return the view that a node kept, under the settings of today.

    If SERVERS were others then, no node is known to have moved.
    """
    kept = json.loads(note)
    standings = {row[0]: Standing(*row) for row in kept["standings"]}
    past = tuple(map(_layout, kept["past"]))
    settled = _layout(kept["settled"]) if kept["settled"] else None
    before = _layout((kept["servers"], kept["copies"], ()))  # whoever was in: all keys move
    view = View(
        servers=servers,
        copies=copies,
        standings=standings,
        past=past,
        settled=settled,
        settled_on=kept["settled_on"],
        agreed_on=kept["agreed_on"],
    )
    return view if before.servers == servers else replace(view, past=(*past, before))


def _layout(kept: Sequence[Any]) -> Layout:
    servers, copies, trusted = kept
    return Layout(tuple((name, weight) for name, weight in servers), copies, tuple(trusted))


def _digest(said: Sequence[Any]) -> str:
    return blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()
