"""Brings what this node has in memory to where it belongs now.

Called by `succession` when the homes of sessions have changed. Invariant: it is done only when
each session in memory is known, with its lease, to the server that decides about it now.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.flusher import Flusher
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Transition
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.report import AGENT
from deferred_sessions.revocations import ended
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.lookup import positions
from deferred_sessions.servers.rows import Position
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.view import View

logger = logging.getLogger(__name__)

PART: Final = 1000  # sessions to ask for at once
PATIENCE: Final = 60.0  # seconds for which it is not done because somebody holds rows


class Moving:
    """Marks what has moved, once for each view, and flushes until all has arrived."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        flusher: Flusher,
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._servers = servers
        self._flusher = flusher
        self._policy = policy
        self._clock = clock
        self._marked_for = ""
        self._marked_at = 0.0

    def move_once(self, view: View, now: float) -> bool:
        """Have memory be where `view` has it; return whether that is done.

        Raises:
            ServerUnavailableError: Not yet; what is left is done the next time.
        """
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
        return True

    def _mark_moved(self, view: View, now: float) -> None:
        """Have all sessions in memory that belong elsewhere now written there, with their leases.

        Whatever a new home lacks, though nobody deleted it, is written anew, however old.
        """
        self._store.count_removal()  # settings may have changed, which no note of a view tells
        moved = [record.key for record in self._store.scan() if view.has_moved(record.key)]
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
        if not view.has_changed_hands(key):
            return None
        return 0 if row is None or row.written_at >= view.changed_at() else row.fence

    @staticmethod
    def _complain_of_rows(count: int) -> None:
        logger.error(
            "Transactions have held %d rows of sessions that moved to other servers, for %.0f s. "
            "Who else asks for these sessions may find them as they were before.",
            count,
            PATIENCE,
            extra={"action": "moved_rows_held", "count": count},
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
