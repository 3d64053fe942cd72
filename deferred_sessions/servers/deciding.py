"""How a session server stands, from what a node's agent sees of all of them.

Called by `succession`. Pure. Invariants: a server that may have missed something is never
trusted by a decision here; and the last one that is trusted stays so, whatever happens to it:
then there is nobody to take over, and it is an outage as of a single server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

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

    `emptied` are servers that SERVERS names with weight 0. What this node's settings ask for
    becomes the order when all living nodes are unanimous about it, and new servers answer; so
    while hosts with other settings are rolled out, all of them have the same homes.
    """
    wish, candidates = view.wish, [*dict(view.wish.servers), *emptied]
    registers = [s.register for s in seen.values() if s.register is not None]
    standings: Standings = merged(view.standings.values(), *registers)
    if not standings:
        if not all(_of(seen, name).answers for name in candidates):
            return {}
        return founded({name: _of(seen, name).has_sessions for name in candidates}, wish, now)
    after = completed(standings, dict(wish.servers), emptied)
    after[ORDER] = _order(after.get(ORDER), wish, seen, now, is_unanimous=is_unanimous)
    names = [name for name, _ in Order.decoded(after[ORDER].phase).servers]
    for name in after.keys() - {*names, ORDER}:
        after[name] = left(after[name], now)
    is_orphaned = _is_orphaned(after, names)
    for name in names:
        if after[name].phase in {LEAVING, GONE}:
            after[name] = after[name].changed(FILLING, after[name].since)
        elif is_orphaned:
            after[name] = after[name].changed(IN, now)
        else:
            after[name] = _next(after, name, names, seen, now)
    return after


def left(standing: Standing, now: float) -> Standing:
    """Return how a server stands that is not in the order."""
    if standing.phase in {LEAVING, GONE}:
        return standing
    return standing.changed(LEAVING, now - MARGIN if standing.phase == IN else standing.since)


def _order(
    known: Standing | None,
    wish: Order,
    seen: Mapping[str, Seen],
    now: float,
    *,
    is_unanimous: bool,
) -> Standing:
    """Return the order that is in force."""
    if known is None:  # a register of an earlier version
        return Standing(ORDER, 1, wish.unsure().encoded(), now)
    order = Order.decoded(known.phase)
    added = dict(wish.servers).keys() - dict(order.servers)
    if wish.places_as(order) or not is_unanimous or not all(_of(seen, a).answers for a in added):
        return known
    return known.changed(wish.after(order).encoded(), now)


def _is_orphaned(standings: Standings, names: Iterable[str]) -> bool:
    """Tell whether nobody is left from whom those that are being filled could get anything.

    All that were in have left, and have been emptied.
    """
    phases = {standings[name].phase for name in names}
    others = {s.phase for s in standings.values() if s.server not in {*names, ORDER}}
    return phases == {FILLING} and others <= {GONE}


def _of(seen: Mapping[str, Seen], name: str) -> Seen:
    """Return what is seen of a server; of one that this host cannot reach, nothing is."""
    return seen.get(name, Seen())


def _next(
    standings: Standings, name: str, names: Iterable[str], seen: Mapping[str, Seen], now: float
) -> Standing:
    """Return how a server stands that is used, if the others stand so."""
    it, others = standings[name], [other for other in names if other != name]
    if it.phase == OUT:
        return it.changed(FILLING, it.since) if _of(seen, name).answers >= STEADY else it
    can_go = it.phase == FILLING or any(
        standings[other].phase == IN and not _of(seen, other).is_lost for other in others
    )
    if _of(seen, name).is_lost and can_go and any(_of(seen, o).answers for o in others):
        # Those that are filled are trusted where nobody is in: what is written there counts.
        is_used = not any(standings[each].phase == IN for each in names)
        is_new = it.phase == IN or (is_used and it.since == EPOCH)
        return it.changed(OUT, now - MARGIN if is_new else it.since)
    return it
