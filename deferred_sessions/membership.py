"""This node among the others: its heartbeat, and whom it finds dead.

Called by the agent each `HEARTBEAT_INTERVAL`, and by `stand_in` when nobody has for too long.
Invariant: a node is found dead only by one whose own heartbeats worked all the time that it
watched in vain; so an outage of PostgreSQL kills nobody, and no clock is compared with
that of another host.

A node that was found dead itself keeps nothing for certain: each session is confirmed by
its row before it is served again, and PostgreSQL refuses what was saved in the meantime.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from deferred_sessions.memory.pulse import Pulse
from deferred_sessions.servers.leases import Leases
from deferred_sessions.servers.rows import Beat
from deferred_sessions.servers.server import SessionServer

logger = logging.getLogger(__name__)

LOG_INTERVAL: Final = 60.0  # seconds between messages about the same other node
SERVERS: Final = "servers"  # the trait that tells which session servers a node is to use
SETTLED_ON: Final = "view"  # the one that tells how it sees them


class Watched(NamedTuple):
    """How another node was last seen."""

    beat: int
    since: float
    """The moment it was first seen like that."""


class Membership:
    """Beats for this node and watches the others; one of each process."""

    def __init__(
        self,
        *,
        leases: Leases,
        server: SessionServer,
        pulse: Pulse,
        timeout: float,
        traits: Mapping[str, Sequence[str]],
        clock: Callable[[], float],
        says: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._leases = leases
        self.server = server
        self._pulse = pulse
        self._timeout = timeout
        self._traits = traits
        self._clock = clock
        self._says = says
        self.others: list[Beat] | None = None
        """The other nodes that were alive at the last heartbeat; None if that was in vain."""
        self._watched: dict[str, Watched] = {}
        self._last: float | None = None
        self._logged: dict[str, float] = {}

    def beat_once(self, now: float) -> list[str]:
        """Beat, and look after the others; return those that this found dead.

        Raises:
            ServerUnavailableError: Nobody was told, and nobody is found dead for a while.
        """
        word = "beat" if self._last is not None else "join"
        self.others = None
        beats = self._beat(word, now)
        moment = self._clock()
        if self._last is None or moment - self._last > self._timeout / 2:
            self._watched.clear()  # who knows what they did meanwhile
        self._last = moment
        self.others = others = [beat for beat in beats if beat.node != self.server.owner()]
        self._compare(others, moment)
        return self._bury(others, moment)

    @property
    def has_joined(self) -> bool:
        """This process has told the server of this node."""
        return self._last is not None

    def check_in(self, now: float) -> None:
        """Beat in the place of an agent that has not for long, before memory is trusted.

        Raises:
            ServerUnavailableError, RowRefusedError: Nobody knows; as in any outage.
        """
        if self._pulse.is_late(self._clock()):
            self.say_so(now)

    def say_so(self, now: float) -> None:
        """Beat, and look after nobody; to be called outside of transactions."""
        self._beat("beat", now)

    def _beat(self, word: str, now: float) -> list[Beat]:
        """Beat; if somebody has found this node dead, take note of it and revive."""
        began = self._clock()
        traits = {trait: values[0] for trait, values in self._traits.items()}
        traits.update(self._says())
        try:
            self._pulse.watch_clock(now)
            beats = self._leases.beat(traits, word)
            me = next((beat for beat in beats if beat.node == self.server.owner()), None)
            if me is not None and me.is_dead:
                logger.warning(
                    "This node was not heard of for too long, and others may have taken over its "
                    "sessions: each is confirmed before it is used again.",
                    extra={"action": "node_revived"},
                )
                beats = self._revive(traits, now)
            elif self._pulse.suspects_all and not self._pulse.reviving:
                self._pulse.suspect(now)  # whoever revived the node died before it could say so
        finally:
            self._pulse.beat(began)
        return beats

    def _revive(self, traits: Mapping[str, str], now: float) -> list[Beat]:
        """Have the others take this node for alive again, once nothing is taken for certain."""
        alias = self.server.alias
        self._pulse.reviving.add(alias)
        try:
            self._pulse.suspect_all()  # others may take a lease until the very moment of that
            beats = self._leases.beat(traits, "revive")
        finally:
            self._pulse.reviving.discard(alias)
        if not self._pulse.reviving:
            self._pulse.suspect(now)
        return beats

    def _bury(self, others: list[Beat], moment: float) -> list[str]:
        """Find dead who has not moved for long enough."""
        alive = {beat.node for beat in others}
        self._watched = {node: seen for node, seen in self._watched.items() if node in alive}
        dead: list[str] = []
        for node, beat, _, _ in others:
            seen = self._watched.get(node)
            if seen is None or seen.beat != beat:
                self._watched[node] = Watched(beat, moment)
            elif moment - seen.since > self._timeout and self._leases.declare_dead(node, beat):
                dead.append(node)
                logger.warning(
                    "Node %s was not heard of for %.0f s: its sessions are free for others.",
                    node,
                    moment - seen.since,
                    extra={"action": "node_dead", "node": node},
                )
        return dead

    def _compare(self, others: list[Beat], moment: float) -> None:
        """Tell of nodes that cannot read what this one writes, or that have its name."""
        name = self.server.owner().partition("#")[0]
        for other in others:
            theirs = other.node.partition("#")[0]
            if theirs == name:
                self._complain(other.node, moment, SAME_NAME, theirs)
            differing = sorted(
                trait
                for trait, values in self._traits.items()
                if trait in other.traits and other.traits[trait] not in values
            )
            if differing:
                self._complain(other.node, moment, DIFFERENT, theirs, ", ".join(differing))

    def _complain(self, node: str, moment: float, message: str, *arguments: str) -> None:
        if moment - self._logged.get(node, -LOG_INTERVAL) >= LOG_INTERVAL:
            self._logged[node] = moment
            logger.error(message, *arguments, extra={"action": "node_mismatch", "node": node})


SAME_NAME: Final = (
    "Another node is called %s, too, and both take the sessions of the other for their own. Give "
    "each host a name in DEFERRED_SESSIONS['NODE']."
)
DIFFERENT: Final = (
    "Node %s differs from this one in: %s. Sessions that pass between the two cannot be read."
)
