"""How session servers stand, as registers and nodes tell each other.

Made by `deciding` and `resync`, kept by `registry`, used by `view`. Pure. Invariant: of two
standings of one server all nodes and all registers prefer the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

IN: Final = "in"
"""Trusted: what it says of a session that it is a home of counts."""
FILLING: Final = "filling"
"""Answers, but may have missed something: gets each write as a copy, and what it lacks."""
LEAVING: Final = "leaving"
"""Some node does not name it in SERVERS, and it may have sessions; only read from."""
OUT: Final = "out"
"""Does not answer; not used."""
GONE: Final = "gone"
"""Empty, and some node does not name it in SERVERS, or did not yet: nobody looks there."""
TRUST: Final = (GONE, OUT, LEAVING, FILLING, IN)
"""Of two standings with one number that counts which stands before the other here."""
EPOCH: Final = 0.0  # since when a server that was added may have missed something
ORDER: Final = ""
"""In the place of a server: by which weights and copies all sessions are where they belong."""
DISORDER: Final = ""
"""Its phase while they may be anywhere."""


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


def merged(*registers: Iterable[Standing]) -> dict[str, Standing]:
    """Return the newest standing of each server that any of `registers` knows."""
    newest: dict[str, Standing] = {}
    for register in registers:
        for standing in register:
            known = newest.get(standing.server)
            if known is None or _supersedes(standing, known):
                newest[standing.server] = standing
    return newest


def founded(has_sessions: Mapping[str, bool], now: float) -> dict[str, Standing]:
    """Return how servers stand that nothing is known of: all in, but for those that were added.

    If some have sessions, those that have none were added and lack theirs.
    """
    is_used = any(has_sessions.values())
    return {
        server: Standing(server, 1, IN, now) if has or not is_used else _added(server)
        for server, has in has_sessions.items()
    }


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
