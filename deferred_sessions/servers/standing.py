"""How session servers stand, as registers and nodes tell each other.

Made by `deciding` and `resync`, kept by `registry`, used by `view`. Pure. Invariant: of two
standings of one server all nodes and all registers prefer the same one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

IN: Final = "in"
"""Trusted: what it says of a session that it is a home of counts."""
FILLING: Final = "filling"
"""Answers, but may have missed something: gets each write as a copy, and what it lacks."""
LEAVING: Final = "leaving"
"""Not in the order any more, and it may have sessions; only read from."""
OUT: Final = "out"
"""Does not answer; not used."""
GONE: Final = "gone"
"""Not in the order, or not yet, and empty: nobody looks there."""
TRUST: Final = (GONE, OUT, LEAVING, FILLING, IN)
"""Of two standings with one number that counts which stands before the other here."""
EPOCH: Final = 0.0  # since when a server that was added may have missed something
ORDER: Final = ""
"""In the place of a server's name: its phase is the order in force."""


class Standing(NamedTuple):
    """How a server stands; each change has a number of its own. Times are Unix seconds."""

    server: str
    number: int
    phase: str
    since: float
    """From when on it may have missed something; if it is in, since when it is."""

    def changed(self, phase: str, since: float) -> Standing:
        """Return how it stands after a change."""
        return Standing(self.server, self.number + 1, phase, since)


Standings = Mapping[str, Standing]


class Order(NamedTuple):
    """By what sessions are placed, on all nodes, whatever their settings say meanwhile."""

    servers: tuple[tuple[str, float], ...]
    """Names and weights, by name."""
    copies: int
    is_kept: bool = False
    """All sessions are where it has them; else some may be where an earlier one had them."""
    least: int = 0
    """On how many servers each session has been since that was so last; 0 for `copies`."""

    @classmethod
    def of(cls, weights: Mapping[str, float], copies: int) -> Order:
        """Return the order that settings ask for."""
        return cls(tuple(sorted(weights.items())), copies)

    @classmethod
    def decoded(cls, text: str) -> Order:
        """Return the order that `encoded` made this text of."""
        is_kept, copies, least, servers = json.loads(text)
        return cls(tuple((name, weight) for name, weight in servers), copies, is_kept, least)

    def encoded(self) -> str:
        """Return it as a phase; of two the one that is not kept sorts before the other."""
        return json.dumps([self.is_kept, self.copies, self.least, self.servers])

    @property
    def surely(self) -> int:
        """On how many servers each session is at least that was written while all were in."""
        return self.least or self.copies

    def places_as(self, other: Order) -> bool:
        """Tell whether both place sessions on the same servers."""
        return self[:2] == other[:2]

    def kept(self) -> Order:
        """Return it when all sessions are where they belong."""
        return self._replace(is_kept=True, least=0)

    def unsure(self) -> Order:
        """Return it as one of which nobody knows what was before."""
        return self._replace(is_kept=False, least=1)

    def after(self, before: Order) -> Order:
        """Return it when it takes the place of another."""
        least = min(before.surely, self.copies)
        return self._replace(is_kept=False, least=least)


def merged(*registers: Iterable[Standing]) -> dict[str, Standing]:
    """Return the newest standing of each server that any of `registers` knows."""
    newest: dict[str, Standing] = {}
    for register in registers:
        for standing in register:
            known = newest.get(standing.server)
            if known is None or _supersedes(standing, known):
                newest[standing.server] = standing
    return newest


def founded(has_sessions: Mapping[str, bool], wish: Order, now: float) -> dict[str, Standing]:
    """Return how servers stand that nothing is known of: those in use are in, or else all.

    What is asked for beyond that comes later, as any change. If several have sessions already,
    nobody knows by which weights.
    """
    used = [server for server, has in has_sessions.items() if has]
    weights, order = dict(wish.servers), wish
    if used:
        order = Order.of({s: weights.get(s, 1.0) for s in used}, min(wish.copies, len(used)))
    order = order.kept() if len(used) <= 1 else order.unsure()
    names = dict(order.servers)
    found = {s: Standing(s, 1, IN, now) if s in names else _added(s) for s in has_sessions}
    return {**found, ORDER: Standing(ORDER, 1, order.encoded(), now)}


def completed(
    standings: Standings, servers: Iterable[str], emptied: Iterable[str] = ()
) -> dict[str, Standing]:
    """Return `standings` with those of `servers` that they lack: these were added.

    With those that are to be `emptied`, too, which may have whatever nobody knows of.
    """
    if not standings:
        return {}
    added = {server: _added(server) for server in servers}
    left = {server: Standing(server, 1, LEAVING, EPOCH) for server in emptied}
    return {**left, **added, **standings}


def _added(server: str) -> Standing:
    return Standing(server, 1, GONE, EPOCH)


def _supersedes(one: Standing, other: Standing) -> bool:
    if one.number != other.number:
        return one.number > other.number
    return _trust(one.phase) < _trust(other.phase)


def _trust(phase: str) -> tuple[int, str]:
    """Return what is lower the less is trusted; for orders any way will do."""
    return (TRUST.index(phase) + 1 if phase in TRUST else 0), phase
