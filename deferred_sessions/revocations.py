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
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from deferred_sessions import lifecycle
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Revocation
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.signals import session_revoked

logger = logging.getLogger(__name__)

NOTE: Final = "revocations"  # the name under which a node keeps how far it has read
PART: Final = 1000  # sessions to ask for at once


class Position(NamedTuple):
    """How far a node has read."""

    server: str
    """The server process that was read from."""
    horizon: int
    """From which transaction on to read the next time."""
    read_at: float


class Revocations:
    """Carries deletions and changes of the rows of one session server into memory."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        server: SessionServer,
        counters: Counters,
        policy: Policy,
    ) -> None:
        self._store = store
        self._servers = servers
        self._note = NOTE if servers.only is not None else f"{NOTE}:{server.alias}"
        self._server = server
        self._counters = counters
        self._policy = policy
        self._seen: set[int] = set()

    def read_once(self, now: float) -> int:
        """Act on what is new; return how many sessions of this node that concerned.

        Raises:
            ServerUnavailableError: Nothing was missed; the next reading has it all.
        """
        if self._server.in_transaction():  # what is seen in it may yet be rolled back
            return 0
        known = self._position()
        found = self._server.revocations(known.horizon)
        if (
            known.server != found.server
            or known.horizon > found.horizon
            or now - known.read_at > lifecycle.REMEMBERED / 2
        ):
            self._seen.clear()
            concerned = self._verify(now)
        else:
            new = [row for row in found.rows if row.number not in self._seen]
            theirs = [row for row in new if row.node != self._server.owner()]
            concerned = self._act_on(theirs, now) if theirs else 0
            self._delete_everywhere([row for row in theirs if row.key and not row.node], now)
        self._seen = {row.number for row in found.rows if row.transaction >= found.horizon}
        position = Position(found.server, found.horizon, now)
        if concerned or known[:2] != position[:2]:
            self._store.set_note(self._note, json.dumps(position).encode())
        return concerned

    def prune(self, now: float) -> None:
        """Remove from PostgreSQL what every node has had time to read."""
        self._server.prune_revocations(now - lifecycle.REMEMBERED)

    def _position(self) -> Position:
        note = self._store.note(self._note)
        return Position("", 0, 0.0) if note is None else Position(*json.loads(note))

    def _verify(self, now: float) -> int:
        """Compare all of memory with the rows; return how many sessions that concerned.

        After a failover, rows may be older than what had been confirmed, or missing;
        memory may then be the only place that has the session, and writes it again.
        """
        self._store.count_removal()
        stored = {
            record.key: record.stored_version
            for record in self._store.scan()
            if record.stored_version and self._decides(record.key)
        }
        concerned: list[str] = []
        for part in _parts(list(stored)):
            versions = self._server.versions(part)
            differing = [key for key in part if versions.get(key) != stored[key]]
            gone = [key for key in differing if key not in versions]
            revoked = self._server.revoked(gone) if gone else set()
            concerned += [
                key
                for key in differing
                if self._catch_up(key, versions.get(key), now, is_revoked=key in revoked)
            ]
        if concerned:
            logger.warning(
                "PostgreSQL was exchanged or started anew: of the %d sessions in memory, %d are "
                "not as it had confirmed them. What it lacks is written again.",
                len(stored),
                len(concerned),
                extra={"action": "sessions_verified", "count": len(concerned)},
            )
        return len(concerned)

    def _act_on(self, revoked: Sequence[Revocation], now: float) -> int:
        """Bring memory up to date with the rows that were deleted or changed."""
        self._store.count_removal()  # a load under way must not keep what it has read
        named = {row.key for row in revoked if row.key}
        truncated_at = max((row.made_at for row in revoked if not row.key), default=None)
        if truncated_at is not None:
            known = [
                record.key
                for record in self._store.scan()
                if self._decides(record.key)
                and (
                    record.stored_version or record.created_at < truncated_at or record.key in named
                )
            ]
        else:
            known = [key for key in named if self._store.head(key) and self._decides(key)]
        concerned: list[str] = []
        for part in _parts(known):
            versions = self._server.versions(part)
            concerned += [
                key for key in part if self._catch_up(key, versions.get(key), now, is_revoked=True)
            ]
        if concerned:
            self._counters.add(Counter.REVOKED, len(concerned))
            logger.info(
                "%d sessions were deleted or changed in PostgreSQL by somebody else.",
                len(concerned),
                extra={"action": "sessions_revoked", "count": len(concerned)},
            )
            session_revoked.send_robust(sender=Revocations, session_keys=concerned)
        return len(concerned)

    def _delete_everywhere(self, foreign: Sequence[Revocation], now: float) -> None:
        """Delete what nobody of us deleted here, a home of it, at its other homes as well."""
        if self._servers.only is not None:
            return
        keys = [row.key for row in foreign if row.key and self._is_home(row.key)]
        there = self._server.versions(keys) if keys else {}
        for key in keys:
            if key not in there:  # else it was changed
                self._catch_up(key, None, now, is_revoked=True)
                for home in self._servers.homes(key):
                    if home is not self._server:
                        home.delete([key])

    def _is_home(self, key: str) -> bool:
        return self._server in self._servers.homes(key)

    def _decides(self, key: str) -> bool:
        """Tell whether what happens here to `key` counts."""
        return self._servers.at(key) is self._server

    def _catch_up(self, key: str, version: int | None, now: float, *, is_revoked: bool) -> bool:
        """Make of the record of `key` what its row says; return whether that changed it."""
        if version is not None:
            before, after = self._store.update(key, partial(_compared, version, now))
        elif is_revoked:
            before, after = self._store.bury(key, partial(ended, key, self._policy, now))
        else:
            before, after = self._store.bury(key, partial(_missed, key, self._policy, now))
        return before is not after


def _parts(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (keys[start : start + PART] for start in range(0, len(keys), PART))


def ended(
    key: str, policy: Policy, now: float, record: SessionRecord | None
) -> SessionRecord | None:
    """Return the tombstone of a session whose row is gone."""
    if record is None or record.is_tombstone:
        return record
    return lifecycle.buried(lifecycle.deleted(record, key, now=now, policy=policy), now=now)


def _missed(
    key: str, policy: Policy, now: float, record: SessionRecord | None
) -> SessionRecord | None:
    """Return what becomes of a session whose row is gone, though nobody deleted it."""
    if record is None or record.is_tombstone or not record.stored_version:
        return record
    if lifecycle.is_remembered(record, now=now):
        return lifecycle.unstored(record, now=now)
    return ended(key, policy, now, record)


def _compared(version: int, now: float, record: SessionRecord | None) -> SessionRecord | None:
    """Forget a session whose row is newer; what is dirty the flusher looks into at once."""
    if record is None or record.is_tombstone:
        return record
    if version < record.stored_version:
        return lifecycle.forgotten(record, now=now)
    if record.version >= version:
        return record
    return lifecycle.due_again(record, due_at=now) if record.is_dirty else None
