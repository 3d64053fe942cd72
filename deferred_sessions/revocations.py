"""What others did to rows behind our back: deleted, changed, truncated.

Called by the agent when PostgreSQL tells it to, and by the flusher with each run. Triggers
of the table (migration 0003) record what was done by whom. Invariant: a revocation is
acted on at least once by every node, whether it listened or not; acting on it again does
no harm.

Identifiers are given out before the commit, so reading "what is above the last one" would
miss transactions that overtake each other. Read is what is not older than the oldest
transaction that was still open at the last reading; what was seen is skipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.servers.server import SessionServer, State
from deferred_sessions.signals import session_revoked

logger = logging.getLogger(__name__)

NOTE: Final = "revocations"  # the name under which a node keeps how far it has read
LIFETIME: Final = 86_400.0  # seconds that PostgreSQL keeps them for nodes that are away


class Revocations:
    """Carries deletions and changes of rows into memory."""

    def __init__(
        self, *, store: HostStore, server: SessionServer, counters: Counters, policy: Policy
    ) -> None:
        self._store = store
        self._server = server
        self._counters = counters
        self._policy = policy
        self._seen: set[int] = set()

    def read_once(self, now: float) -> int:
        """Act on what is new; return how many sessions of this node that concerned.

        Raises:
            ServerUnavailableError: Nothing was missed; the next reading has it all.
        """
        position, read_at = self._position()
        found, horizon = self._server.revocations(position)
        if now - read_at > LIFETIME / 2:
            # New, or away for so long that some may be gone: read everything anew.
            self._seen.clear()
            concerned = self._forget_clean()
        else:
            new = [row for row in found if row.number not in self._seen]
            theirs = [row.key for row in new if row.node != self._server.owner()]
            concerned = self._act_on(theirs, now)
        self._seen = {row.number for row in found if row.transaction >= horizon}
        if concerned or position != horizon:
            self._store.set_note(NOTE, json.dumps([horizon, now]).encode())
        return concerned

    def prune(self, now: float) -> None:
        """Remove from PostgreSQL what every node has had time to read."""
        self._server.prune_revocations(now - LIFETIME)

    def _position(self) -> tuple[int, float]:
        """Return from which transaction on to read, and when that was noted."""
        note = self._store.note(NOTE)
        if note is None:
            return 0, 0.0
        horizon, read_at = json.loads(note)
        return horizon, read_at

    def _act_on(self, keys: Sequence[str | None], now: float) -> int:
        """Bring memory up to date with the rows of `keys`; None stands for all of them."""
        if None in keys:
            known = [record.key for record in self._store.scan()]
        else:
            known = [key for key in dict.fromkeys(keys) if key and self._store.head(key)]
        concerned: list[str] = []
        for start in range(0, len(known), 1000):
            part = known[start : start + 1000]
            states = self._server.states(part)
            concerned += [key for key in part if self._catch_up(key, states.get(key), now)]
        if concerned:
            self._counters.add(Counter.REVOKED, len(concerned))
            logger.info(
                "%d sessions were deleted or changed in PostgreSQL by somebody else.",
                len(concerned),
                extra={"action": "sessions_revoked", "count": len(concerned)},
            )
            session_revoked.send_robust(sender=Revocations, session_keys=concerned)
        return len(concerned)

    def _catch_up(self, key: str, state: State | None, now: float) -> bool:
        """Make of the record of `key` what its row says; return whether that changed it."""
        if state is None:
            before, after = self._store.bury(key, partial(_ended, key, self._policy, now))
        else:
            before, after = self._store.update(key, partial(_overtaken, state.version))
        return before is not after

    def _forget_clean(self) -> int:
        keys = [record.key for record in self._store.scan() if not record.is_dirty]
        self._store.update_many(dict.fromkeys(keys, _forgotten))
        return len(keys)


def _ended(
    key: str, policy: Policy, now: float, record: SessionRecord | None
) -> SessionRecord | None:
    """Return the tombstone of a session whose row is gone, if it ever had one."""
    if record is None or record.is_tombstone or not record.stored_version:
        return record
    return lifecycle.buried(lifecycle.deleted(record, key, now=now, policy=policy), now=now)


def _overtaken(version: int, record: SessionRecord | None) -> SessionRecord | None:
    """Forget a session whose row is newer; what is dirty the flusher will look into."""
    if record is None or record.is_dirty or record.is_tombstone or record.version >= version:
        return record
    return None


def _forgotten(record: SessionRecord | None) -> SessionRecord | None:
    return record if record is not None and record.is_dirty else None
