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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.fleet_membership import FleetMembership
from deferred_sessions.flusher import Flusher
from deferred_sessions.membership import VIEW as TRAIT
from deferred_sessions.memory.pulse import Pulse
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Transition
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.report import AGENT
from deferred_sessions.revocations import ended
from deferred_sessions.servers.deciding import Seen, decide
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.lookup import positions
from deferred_sessions.servers.registry import Registry
from deferred_sessions.servers.rows import Position
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.view import IN, OUT, Standings, View, encode, merged
from deferred_sessions.session_servers import VIEW

logger = logging.getLogger(__name__)

AT_ONCE: Final = 0.5  # seconds in which it is told that nobody listens
PART: Final = 1000  # sessions to ask for at once
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
        self._flusher = flusher
        self._pulse = pulse
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()  # around what the hearts tell
        self._seen = {server.alias: Seen() for server in servers.servers}
        self._marked_for = ""
        self._marked_at = 0.0
        self._settled_at = 0.0

    # Called by the heart of each server

    def beat_once(self, now: float, alias: str) -> list[str]:
        """Beat on one server: see `Membership.beat_once`; and exchange news with it.

        Raises:
            ServerUnavailableError: It did not answer.
        """
        membership, began = self._membership.at(alias), self._clock()
        if self._servers.only is not None:
            return membership.beat_once(now)
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
        return self.settle_once(now) and self.agree_once(now)

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
        known: Standings = {} if view is None else view.standings
        standings = decide(known, (s.alias for s in self._servers.servers), seen, now)
        if not standings or (view is not None and standings == known):
            return False
        after = self._begun(standings, now) if view is None else view.with_standings(standings)
        # A load under way must not keep what it was given by the view before.
        self._store.set_note(VIEW, encode(after), voids_loads=True)
        self._tell(known, after)
        return True

    def settle_once(self, now: float) -> bool:
        """Move to the present view, unless that is done; return whether it is done.

        Raises:
            ServerUnavailableError: Not yet; what is left is done the next time.
        """
        view = self._noted()
        if view is None or view.is_settled:
            return view is not None
        if self._marked_for != view.digest:
            self._mark_moved(view, now)
            self._marked_for, self._marked_at = view.digest, self._clock()
        report = self._flusher.flush_once(now, by=AGENT)
        if report.skipped or report.failure:
            return False
        if report.locked or report.outdated:  # some server has less than memory
            if self._clock() - self._marked_at < PATIENCE:
                return False
            self._complain_of_rows(report.locked)
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
        behind = {beat.node for beat in others if beat.traits.get(TRAIT) != view.digest}
        if behind and self._clock() - self._settled_at < PATIENCE:
            return False
        if behind:
            self._complain(behind)
        self._store.set_note(VIEW, encode(view.agreed()))
        self._pulse.granted()  # whoever waits may ask for leases now
        return True

    # Inside

    def _noted(self) -> View | None:
        """Return what this node knows; None if it is new."""
        note = self._store.note(VIEW)
        return None if note is None else self._servers.read(note)

    def _begun(self, standings: Standings, now: float) -> View:
        """Return the first view of this node."""
        view = self._servers.start(standings)
        if any(s.number > 1 and now - s.since < RECENT for s in standings.values()):
            return view.begun_late()
        return view

    def _mark_moved(self, view: View, now: float) -> None:
        """Have all sessions in memory that belong elsewhere now written there, with their leases.

        Whatever a new home lacks, though nobody deleted it, is written anew, however old.
        """
        self._store.count_removal()  # settings may have changed, which no note of a view tells
        moved = [
            record.key
            for record in self._store.scan()
            if view.has_moved(self._servers.ranked(record.key))
        ]
        for server, keys in self._servers.by_authority(moved, str):
            for start in range(0, len(keys), PART):
                self._mark(server, keys[start : start + PART], view, now)
        if moved:
            logger.info(
                "%d sessions of this host belong to other session servers now.",
                len(moved),
                extra={"action": "sessions_moved", "count": len(moved)},
            )

    def _mark(self, server: SessionServer, keys: Sequence[str], view: View, now: float) -> None:
        server.connect()
        found = positions(server, keys)
        gone = [key for key in keys if key not in found]
        revoked = server.revoked(gone) if gone else set()
        for key in revoked:
            self._store.bury(key, partial(ended, key, self._policy, now))
        marks: dict[str, Transition] = {}
        for key in keys:
            if key not in revoked:
                least = self._least_fence(key, found.get(key), view)
                marks[key] = partial(_told, found.get(key), least, now)
        self._store.update_many(marks)

    def _least_fence(self, key: str, row: Position | None, view: View) -> int | None:
        """Return what the fence of a session in memory is to exceed; None if it stays.

        To move is a change of hands: so no fence is given twice, by a server then and by
        another one now. What is left over on the new one, from before it decided, may have a
        later fence than the session, and is outbid; what a node has told it since counts.
        """
        if not view.has_changed_hands(self._servers.ranked(key)):
            return None
        return 0 if row is None or row.written_at >= view.changed_at() else row.fence

    @staticmethod
    def _tell(before: Standings, view: View) -> None:
        for name, standing in sorted(view.standings.items()):
            old = before.get(name)
            if old is not None and old.phase != standing.phase:
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
    def _complain_of_rows(count: int) -> None:
        logger.error(
            "Transactions have held %d rows of sessions that moved to other servers, for %.0f s. "
            "Who else asks for these sessions may find them as they were before.",
            count,
            PATIENCE,
            extra={"action": "moved_rows_held", "count": count},
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


def _told(
    row: Position | None, least: int | None, now: float, record: SessionRecord | None
) -> SessionRecord | None:
    """Return `record` as it is when the server that decides now has it like this."""
    if record is None:
        return None
    if row is not None and row.version > record.version and not record.is_tombstone:
        return lifecycle.due_again(record, due_at=now) if record.is_dirty else None
    if least is not None:
        record = lifecycle.moved(record, least=least)
    if record.is_tombstone:  # the server before has deleted the session; this one may have it
        return lifecycle.forgotten(record, now=now)
    if row is None:
        return lifecycle.unstored(record, now=now)
    return lifecycle.forgotten(record, now=now)
