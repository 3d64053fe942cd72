"""How a session server stands, from what a node's agent sees of all of them.

Called by `succession`. Pure. Invariants: a server that may have missed something is never
trusted by a decision here; and the last one that is trusted stays so, whatever happens to it:
then there is nobody to take over, and it is an outage as of a single server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from deferred_sessions.servers.standing import (
    FILLING,
    GONE,
    IN,
    LEAVING,
    ORDER,
    OUT,
    Standing,
    Standings,
    completed,
    founded,
    merged,
)
from deferred_sessions.servers.view import View

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
    view: View,
    seen: Mapping[str, Seen],
    now: float,
    *,
    emptied: Iterable[str] = (),
    is_unanimous: bool,
) -> Standings:
    """Return how all servers stand now; nothing as long as that is not known of a new site.

    `emptied` are servers that SERVERS names with weight 0. A server is used only while all
    living nodes name it, which is known if they are unanimous; so while hosts with other
    SERVERS are rolled out, all of them have the same homes.
    """
    registers = [s.register for s in seen.values() if s.register is not None]
    standings: Standings = merged(view.standings.values(), *registers)
    if not standings:
        if not all(seen[name].answers for name in view.names):
            return {}
        standings = begun(view, {name: seen[name].has_sessions for name in view.names}, now)
    after = completed(standings, view.names, emptied)
    for name in after.keys() - {*view.names, ORDER}:
        after[name] = left(after[name], now)
    is_orphaned = _is_orphaned(after, view.names)
    for name in view.names:
        if is_orphaned and after[name].phase == FILLING:
            after[name] = after[name].changed(IN, now)
        elif after[name].phase in {LEAVING, GONE}:
            if is_unanimous and seen[name].answers:
                after[name] = after[name].changed(FILLING, after[name].since)
        else:
            after[name] = _next(after, name, view.names, seen, now)
    after[ORDER] = view.with_standings(after).order_now(now)
    return after


def begun(view: View, has_sessions: Mapping[str, bool], now: float) -> Standings:
    """Return how the servers of a new site stand, or of one that had a single server before.

    If several have sessions already, nobody knows by which weights.
    """
    standings = founded(has_sessions, now)
    order = view.with_standings(standings).order_now(now)
    if sum(has_sessions.values()) <= 1:
        order = order._replace(phase=view.with_standings(standings).order)
    return {**standings, ORDER: order}


def left(standing: Standing, now: float) -> Standing:
    """Return how a server stands that this node does not name in SERVERS."""
    if standing.phase in {LEAVING, GONE}:
        return standing
    return standing.changed(LEAVING, now - MARGIN if standing.phase == IN else standing.since)


def _is_orphaned(standings: Standings, names: Iterable[str]) -> bool:
    """Tell whether nobody is left from whom those that are being filled could get anything.

    All that were in have left, and have been emptied.
    """
    named = [standings[name].phase for name in names]
    others = [s.phase for s in standings.values() if s.server not in {*names, ORDER}]
    return not {IN, OUT}.intersection(named) and bool(others) and set(others) == {GONE}


def _next(
    standings: Standings, name: str, names: Iterable[str], seen: Mapping[str, Seen], now: float
) -> Standing:
    """Return how a server stands that is used, if the others stand so."""
    it, others = standings[name], [other for other in names if other != name]
    if it.phase == OUT:
        return it.changed(FILLING, it.since) if seen[name].answers >= STEADY else it
    can_go = it.phase == FILLING or any(
        standings[other].phase == IN and not seen[other].is_lost for other in others
    )
    if seen[name].is_lost and can_go and any(seen[other].answers for other in others):
        return it.changed(OUT, now - MARGIN if it.phase == IN else it.since)
    return it
