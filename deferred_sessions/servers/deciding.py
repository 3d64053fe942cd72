"""How a session server stands, from what a node's agent sees of all of them.

Called by `succession`. Pure. Invariants: a server that may have missed something is never
trusted by a decision here; and the last one that is trusted stays so, whatever happens to it:
then there is nobody to take over, and it is an outage as of a single server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from deferred_sessions.servers.view import (
    FILLING,
    IN,
    OUT,
    Standing,
    Standings,
    completed,
    founded,
    merged,
)

PATIENCE: Final = 2  # heartbeats that may fail before a server is given up
MARGIN: Final = 1.0  # seconds by which nodes' clocks may differ; no outage is over as fast
STEADY: Final = 3  # heartbeats that a server must have answered before it is filled


class Seen(NamedTuple):
    """What an agent sees of a server."""

    failures: int = 0
    """Heartbeats in a row that failed."""
    answers: int = 0
    """Heartbeats in a row that it answered."""
    is_refused: bool = False
    """Nobody listens there."""
    register: tuple[Standing, ...] | None = None
    """What it knows of all; None if it has not said so since the agent began."""
    has_sessions: bool = False
    """Asked only while nothing is known of any."""

    @property
    def is_lost(self) -> bool:
        """It is to be given up, if others are there."""
        return self.failures >= PATIENCE or (self.failures > 0 and self.is_refused)

    def missed(self, *, is_refused: bool) -> Seen:
        """Return this after a heartbeat that failed."""
        return self._replace(failures=self.failures + 1, answers=0, is_refused=is_refused)

    def heard(self, register: Iterable[Standing], *, has_sessions: bool) -> Seen:
        """Return this after a heartbeat that was answered."""
        return Seen(0, self.answers + 1, False, tuple(register), has_sessions)


def decide(
    known: Standings, names: Iterable[str], seen: Mapping[str, Seen], now: float
) -> Standings:
    """Return how all servers stand now; nothing as long as that is not known of a new site."""
    names = tuple(names)
    registers = [s.register for s in seen.values() if s.register is not None]
    standings: Mapping[str, Standing] = merged(known.values(), *registers)
    if not standings:
        if not all(seen[name].answers for name in names):
            return {}
        standings = founded({name: seen[name].has_sessions for name in names}, now)
    after = completed(standings, names)
    for name in names:
        after[name] = _next(after, name, names, seen, now)
    return after


def _next(
    standings: Standings, name: str, names: Iterable[str], seen: Mapping[str, Seen], now: float
) -> Standing:
    """Return how one server stands, if the others stand so."""
    it, others = standings[name], [other for other in names if other != name]
    if it.phase == OUT:
        if seen[name].answers >= STEADY:
            return it._replace(number=it.number + 1, phase=FILLING)
        return it
    if it.phase not in {IN, FILLING}:  # named again, after it had left
        return it._replace(number=it.number + 1, phase=FILLING)
    can_go = it.phase == FILLING or any(
        standings[other].phase == IN and not seen[other].is_lost for other in others
    )
    if seen[name].is_lost and can_go and any(seen[other].answers for other in others):
        since = now - MARGIN if it.phase == IN else it.since
        return it._replace(number=it.number + 1, phase=OUT, since=since)
    return it
