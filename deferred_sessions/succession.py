"""Who takes over from a session server that is away, as this node's agent sees it.

The agent's heart for each server finds out whether it answers (`beat_once`); one thread of the
agent decides (`decide_once`), has this node move to what follows (`settle_once`), and finds out
when all nodes have (`agree_once`). Invariant: the note that all processes of the node go by has
one writer; and a node says that it has settled only when each session in its memory is known,
with its lease, to the server that decides about it now.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.fleet_membership import FleetMembership
from deferred_sessions.flusher import Flusher
from deferred_sessions.membership import SERVERS, SETTLED_ON
from deferred_sessions.memory.pulse import Pulse
from deferred_sessions.memory.store import HostStore
from deferred_sessions.moving import Moving
from deferred_sessions.policy import Policy
from deferred_sessions.servers.deciding import Seen, decide, left
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.registry import Registry
from deferred_sessions.servers.resync import Resync
from deferred_sessions.servers.rows import Beat
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.standing import (
    GONE,
    IN,
    ORDER,
    OUT,
    Order,
    Standings,
    merged,
)
from deferred_sessions.servers.view import View, encode
from deferred_sessions.session_servers import VIEW

logger = logging.getLogger(__name__)

AT_ONCE: Final = 0.5  # seconds in which it is told that nobody listens
PATIENCE: Final = 60.0  # seconds that nodes wait for one that lives, but does not settle
RECENT: Final = 120.0  # seconds; a node that begins after a change takes others to be moving


class Succession:
    """Keeps this node's view of the session servers; one process of the node does."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        membership: FleetMembership,
        flusher: Flusher,
        pulse: Pulse,
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._servers = servers
        self._membership = membership
        self._moving = Moving(
            store=store, servers=servers, flusher=flusher, policy=policy, clock=clock
        )
        self._pulse = pulse
        self._clock = clock
        self._lock = threading.Lock()  # around what the hearts tell
        self._seen: defaultdict[str, Seen] = defaultdict(Seen)
        self._settled_at = 0.0
        self._tidied_for = ""
        self._differs_since: float | None = None
        self._has_left_others = False
        self._has_told = False

    # Called by the heart of each server

    def beat_once(self, now: float, alias: str) -> list[str]:
        """Beat on one server: see `Membership.beat_once`; and exchange news with it.

        Raises:
            ServerUnavailableError: It did not answer.
        """
        membership, began = self._membership.at(alias), self._clock()
        if self._servers.only is not None:
            dead = membership.beat_once(now)
            self._leave_others(membership.server, now)
            return dead
        try:
            dead = membership.beat_once(now)
            self._exchange(membership.server)
        except DeferredSessionsError:
            was_quick = self._clock() - began < AT_ONCE
            with self._lock:
                seen = self._seen[alias]
                is_refused = was_quick and membership.server.breaker.is_broken
                self._seen[alias] = seen.missed(is_refused=is_refused)
            raise
        return dead

    def _leave_others(self, server: SessionServer, now: float) -> None:
        """Have the register of a single server say that it is alone, if it knows of others.

        Once; not while nodes live that use others: those are not followed, and do not follow.
        """
        if self._has_left_others:
            return
        registry, wish = Registry(server), self._servers.wish
        known = registry.read()
        self._has_left_others = True
        if ORDER not in known:
            return
        is_news, self._has_told = not self._has_told, True
        if is_news:
            self._store.set_note(VIEW, b"")  # what stands in it was for several
        rest = [s for name, s in known.items() if name not in {server.alias, ORDER}]
        order = Order.decoded(known[ORDER].phase)
        others = self._membership.others() or []
        if any(SERVERS in beat.traits for beat in others):
            self._has_left_others = False
        elif not wish.places_as(order):
            changed = known[ORDER].changed(wish.after(order).encoded(), now)
            registry.write([changed, *(left(standing, now) for standing in rest)])
        full = sorted(standing.server for standing in rest if standing.phase != GONE)
        if full and is_news:
            logger.error(
                "DEFERRED_SESSIONS['SERVERS'] names %s alone. What is on %s is not looked for: "
                "name these with weight 0 until `manage.py rebalancesessions` has emptied them.",
                server.alias,
                ", ".join(full),
                extra={"action": "servers_left", "servers": full},
            )

    def _exchange(self, server: SessionServer) -> None:
        """Hear what a server that has just answered knows of all, and tell it what it does not."""
        registry, view = Registry(server), self._noted()
        # In this order: who creates the first session has written the register before.
        is_used = view is None and registry.has_sessions()
        register = registry.read()
        has_sessions = is_used and not register
        with self._lock:
            seen = self._seen[server.alias]
            self._seen[server.alias] = seen.heard(register.values(), has_sessions=has_sessions)
        if view is not None:
            known = merged(register.values(), view.standings.values())
            registry.write([s for name, s in known.items() if register.get(name) != s])

    # Called by one thread of the agent

    def move_once(self, now: float) -> bool:
        """Decide, settle and agree, as far as that is possible; return whether all have moved.

        Raises:
            ServerUnavailableError: What is left is done the next time.
        """
        self.decide_once(now)
        self._watch_unity()
        has_moved = self.settle_once(now) and self.agree_once(now)
        self.tidy_once(now)
        return has_moved

    @property
    def is_moving(self) -> bool:
        """Some node has yet to move, so hearts are to beat faster."""
        if self._servers.only is not None:
            return False
        view = self._noted()  # which asks no server: a heart must not wait for another's
        return view is None or not view.is_agreed

    def decide_once(self, now: float) -> bool:
        """Find out how the servers stand; return whether that is news for this node."""
        with self._lock:
            seen = dict(self._seen)
        view = self._noted()
        start = self._servers.start({}) if view is None else view
        standings = decide(
            start,
            seen,
            now,
            emptied=self._servers.emptied,
            is_unanimous=view is not None and self._is_unanimous(),
        )
        if not standings or (view is not None and standings == view.standings):
            return False
        after = self._begun(standings, now) if view is None else view.with_standings(standings)
        mine = {name for name, _ in after.wish.servers}  # whose hearts beat already
        self._membership.join(set(after.live) - mine, now)
        # A load under way must not keep what it was given by the view before.
        self._store.set_note(VIEW, encode(after), voids_loads=True)
        self._tell(start.standings, after)
        return True

    def settle_once(self, now: float) -> bool:
        """Move to the present view, unless that is done; return whether it is done.

        Raises:
            ServerUnavailableError: Not yet; what is left is done the next time.
        """
        view = self._noted()
        if view is None or view.is_settled:
            return view is not None
        if not self._moving.move_once(view, now):
            return False
        for server in self._servers.live():
            if view.phase(server.alias) == IN:  # a node that begins now is to hear of it there
                Registry(server).write(view.standings.values())
        self._store.set_note(VIEW, encode(view.settled_here()))
        self._settled_at = self._clock()
        return True

    def agree_once(self, now: float) -> bool:  # noqa: ARG002 - a duty like the others
        """Find out whether all living nodes have moved to the present view; return whether."""
        view = self._noted()
        if view is None or not view.is_settled or view.is_agreed:
            return view is not None and view.is_agreed
        others = self._membership.others()
        if others is None:
            return False
        behind = self._behind(view, others)
        if behind and self._clock() - self._settled_at < PATIENCE:
            return False
        if behind:
            self._complain(behind)
        self._store.set_note(VIEW, encode(view.agreed()))
        self._pulse.granted()  # whoever waits may ask for leases now
        return True

    def tidy_once(self, now: float) -> bool:  # noqa: ARG002 - a duty like the others
        """Have somebody put all in order, if nothing else is missing; return whether.

        Raises:
            ServerUnavailableError: Not yet.
        """
        view, others = self._noted(), self._membership.others()
        if view is None or not (view.is_agreed and view.is_untidy) or others is None:
            return False
        if self._tidied_for == view.digest or self._behind(view, others):
            return False
        Resync(self._servers).begin()
        self._tidied_for = view.digest
        return True

    # Inside

    def _noted(self) -> View | None:
        """Return what this node knows; None if it is new."""
        note = self._store.note(VIEW)
        return self._servers.read(note) if note else None

    def _is_unanimous(self) -> bool:
        """Tell whether all living nodes name the same servers, with the same weights."""
        others = self._membership.others()
        return others is not None and not self._differing(others)

    def _differing(self, others: list[Beat]) -> list[str]:
        """Return the nodes that name other servers, or weights, or COPIES."""
        wish = self._servers.wish.encoded()
        return sorted({b.node.partition("#")[0] for b in others if b.traits.get(SERVERS) != wish})

    @staticmethod
    def _behind(view: View, others: list[Beat]) -> set[str]:
        """Return the nodes that have not moved to this view."""
        return {beat.node for beat in others if beat.traits.get(SETTLED_ON) != view.digest}

    def _watch_unity(self) -> None:
        """Say so, each minute, if what SERVERS and COPIES ask for cannot be done yet."""
        view, wish = self._noted(), self._servers.wish
        if view is None or wish.places_as(view.order):
            self._differs_since = None
        elif self._differs_since is None:
            self._differs_since = self._clock()
        elif self._clock() - self._differs_since >= PATIENCE:
            self._differs_since = self._clock()
            differing = self._differing(self._membership.others() or [])
            with self._lock:
                silent = [n for n, _ in wish.servers if not self._seen[n].answers]
            if not differing and not silent:
                return
            logger.error(
                "DEFERRED_SESSIONS['SERVERS'] and ['COPIES'] of this host are not in force: %s "
                "differ in them, and %s do not answer.",
                ", ".join(differing) or "no hosts",
                ", ".join(silent) or "no servers",
                extra={"action": "servers_differ", "count": len(differing)},
            )

    def _begun(self, standings: Standings, now: float) -> View:
        """Return the first view of this node."""
        view = self._servers.start(standings)
        if any(s.number > 1 and now - s.since < RECENT for s in standings.values()):
            return view.begun_late()
        return view

    @staticmethod
    def _tell(before: Standings, view: View) -> None:
        for name, standing in sorted(view.standings.items()):
            old = before.get(name)
            if old is None or old.phase == standing.phase:
                continue
            if name == ORDER:
                if not view.is_in_order:
                    logger.info(LOOKED_FOR, extra={"action": "order_changed"})
                continue
            level = logging.WARNING if standing.phase == OUT else logging.INFO
            logger.log(
                level,
                "The session server %r is %r now; it was %r.",
                name,
                standing.phase,
                old.phase,
                extra={"action": "server_moved", "server": name, "phase": standing.phase},
            )

    @staticmethod
    def _complain(behind: set[str]) -> None:
        logger.error(
            "These nodes live, but have not moved to the present session servers: %s. Their "
            "sessions are given to others who ask. Is DEFERRED_SESSIONS['SERVERS'] the same "
            "everywhere?",
            ", ".join(sorted(node.partition("#")[0] for node in behind)),
            extra={"action": "nodes_behind", "count": len(behind)},
        )


LOOKED_FOR: Final = (
    "Weights, COPIES or SERVERS have changed: sessions that no host has in memory are looked for "
    "on all session servers, until all have been brought to where they belong now."
)
