"""Carries records to PostgreSQL and brings back what became of each.

Called by `tiers` for what must not wait and by `flusher` for batches. Invariant: a
record becomes clean only at the version that a committed transaction contains; what
PostgreSQL did not take is looked into, acted on and counted, never dropped in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.encoding import RowEncoder
from deferred_sessions.exceptions import RecordCorruptError
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.outcome import Outcome
from deferred_sessions.policy import Policy
from deferred_sessions.record import CHANGED, RECOVERED, TOMBSTONE, SessionRecord, split_rests
from deferred_sessions.refusals import Refusals
from deferred_sessions.servers.copies import Copies
from deferred_sessions.servers.fleet import Fleet, Shape
from deferred_sessions.servers.rows import Columns, State
from deferred_sessions.servers.server import SessionServer

logger = logging.getLogger(__name__)

EXPIRY_GRAIN: Final = 0.001  # seconds; expiries that are closer are the same


class RecordWriter:
    """Writes records to their session servers and marks them in the host store."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        copies: Copies,
        encoder: RowEncoder,
        refusals: Refusals,
        counters: Counters,
        policy: Policy,
    ) -> None:
        self._store = store
        self._servers = servers
        self._copies = copies
        self._encoder = encoder
        self._refusals = refusals
        self._counters = counters
        self._policy = policy

    def write(self, batch: Sequence[Dirty], now: float) -> Outcome:
        """Write `batch` in one transaction for each server, and mark what it contained.

        Raises:
            ServerUnavailableError: Nothing that this server decides about was written or
                marked, nor anything that was to come after.
            RowRefusedError: It refused some row; likewise.
            RowLockedError: Somebody holds some row; likewise.
        """
        outcome = Outcome()
        for server, part in self._servers.by_authority(sorted(batch), _key):
            shape = self._servers.shape()
            with server.batch():
                written = self._send(server, part, now)
            outcome = outcome.with_others(self._finish(written, now, shape))
        return outcome

    def write_through(self, record: SessionRecord, now: float) -> Outcome:
        """Write `record` with a single statement, waiting for its row if need be.

        Inside a transaction of the application nothing is marked: what it sees is not
        for others yet, and nobody can tell whether it will commit. The flusher makes sure.

        Raises:
            ServerUnavailableError, RowRefusedError: Nothing was written or marked.
        """
        shape, server = self._servers.shape(), self._servers.at(record.key)
        return self._finish(self._send(server, [Dirty.of(record)], now), now, shape)

    def columns(self, batch: Sequence[Dirty]) -> Columns:
        """Return the sessions of `batch` as PostgreSQL keeps them."""
        keys = [dirty.key for dirty in batch]
        heads = [dirty.head for dirty in batch]
        user_ids, payloads = split_rests((dirty.head, dirty.data) for dirty in batch)
        return Columns(
            keys,
            self._encoder.to_texts(payloads),
            [head.expires_at for head in heads],
            [head.version for head in heads],
            [head.fence for head in heads],
            user_ids,
            [head.created_at for head in heads],
        )

    def mark_written(self, batch: Sequence[Dirty], now: float) -> int:
        """Tell the host store that PostgreSQL has committed `batch`, as it stands there.

        Returns how many of them have yet to get to all of their homes, and stay dirty.
        """
        self._counters.add(Counter.ROWS_WRITTEN, len(batch))
        outcome = Outcome(updated=batch)
        self._mark(outcome, now, self._servers.shape())
        return len(outcome.incomplete)

    def _send(self, server: SessionServer, batch: Sequence[Dirty], now: float) -> Outcome:
        """Send one statement for each kind of change; keys in order, against deadlocks."""
        outcome = Outcome()
        deleted, new, changed, touched = by_kind(batch)
        doubtful: list[Dirty] = []
        if deleted:
            self._counters.add(Counter.STATEMENTS)
            server.delete([dirty.key for dirty in deleted])
            outcome.deleted = deleted
        new, known = self._divide(server, new)
        changed = sorted(changed + known)
        if new:
            self._counters.add(Counter.STATEMENTS)
            if self._insert(server, new, now) == len(new):
                outcome.inserted = new
            else:
                changed = sorted(changed + new)  # some exist; the update leaves the others
        if changed:
            self._counters.add(Counter.STATEMENTS)
            if server.update(self.columns(changed), now) == len(changed):
                outcome.updated = changed
            else:
                doubtful += changed
        if touched:
            self._counters.add(Counter.STATEMENTS)
            if server.touch(self.columns(touched), now) == len(touched):
                outcome.touched = touched
            else:
                doubtful += touched
        if doubtful:
            self._look_into(server, doubtful, outcome, now)
        return outcome

    @staticmethod
    def _divide(server: SessionServer, new: list[Dirty]) -> tuple[list[Dirty], list[Dirty]]:
        """Divide new sessions into those to insert and those that PostgreSQL had for certain.

        A journal may have heard of a session last when it was new: it was written, and perhaps
        deleted, since. An insert would bring it back.
        """
        if not any(dirty.head.flags & RECOVERED for dirty in new):
            return new, []
        revoked = server.revoked_since({dirty.key: dirty.head.created_at for dirty in new})
        return (
            [dirty for dirty in new if dirty.key not in revoked],
            [dirty for dirty in new if dirty.key in revoked],
        )

    def _insert(self, server: SessionServer, new: Sequence[Dirty], now: float) -> int:
        return server.insert(self.columns(new), now)

    def _look_into(
        self, server: SessionServer, doubtful: Sequence[Dirty], outcome: Outcome, now: float
    ) -> None:
        """Find out which of these PostgreSQL did not take, and why."""
        states = server.states([dirty.key for dirty in doubtful])
        gone = [dirty for dirty in doubtful if dirty.key not in states]
        if gone:
            self._look_for(server, gone, outcome, now)
        for dirty in doubtful:
            if (state := states.get(dirty.key)) is None:
                continue
            if self._is_ours(dirty, state):
                # Taken just now; or an earlier attempt got through; or another flusher
                # of this node was faster, perhaps with a later version.
                outcome.repeated.append((dirty, state.version, _stored_expiry(dirty, state)))
            elif self._is_anothers(dirty, state):
                if self._is_lost(dirty, state):
                    outcome.fenced.append((dirty, state))
                else:
                    outcome.moved.append(dirty)
            elif state.version < dirty.head.version:
                outcome.outdated.append(dirty)
            else:
                outcome.superseded.append(dirty)
        self._refusals.keep(outcome.fenced)

    def _look_for(
        self, server: SessionServer, gone: Sequence[Dirty], outcome: Outcome, now: float
    ) -> None:
        """Tell what somebody deleted from what PostgreSQL forgot; insert the latter anew."""
        revoked = server.revoked([dirty.key for dirty in gone])
        forgotten: list[Dirty] = []
        for dirty in gone:
            is_lost = dirty.key not in revoked and lifecycle.is_remembered(dirty.head, now=now)
            (forgotten if is_lost else outcome.vanished).append(dirty)
        if not forgotten:
            return
        logger.warning(
            "PostgreSQL has lost %d sessions that it had confirmed; they are written anew.",
            len(forgotten),
            extra={"action": "sessions_forgotten", "count": len(forgotten)},
        )
        self._counters.add(Counter.STATEMENTS)
        if server.insert(self.columns(forgotten), now) == len(forgotten):
            outcome.inserted = [*outcome.inserted, *forgotten]
        else:
            outcome.outdated += forgotten  # somebody was faster; look again the next time

    def _is_ours(self, dirty: Dirty, state: State) -> bool:
        """Tell whether the row is this very state, or a later one that this node wrote."""
        if state.fence != dirty.head.fence:
            return False
        if state.version == dirty.head.version:
            return self._is_same(dirty, state)
        return state.owner == self._servers.owner() and state.version > dirty.head.version

    def _is_anothers(self, dirty: Dirty, state: State) -> bool:
        """Tell whether the lease has passed to another node, or has had others meanwhile."""
        if state.fence != dirty.head.fence:
            return state.fence > dirty.head.fence
        return bool(state.owner) and not state.owner.startswith(self._servers.name())

    def _is_lost(self, dirty: Dirty, state: State) -> bool:
        """Tell whether memory alone has this change; it may have been written and handed over."""
        head = self._store.head(dirty.key)
        if head is not None and dirty.head.flags & RECOVERED & ~head.flags:
            return False  # what the journal had has been judged already, for another process
        is_here = head is not None and head.version >= dirty.head.version
        is_changed = is_here and head is not None and head.flags & CHANGED
        return bool(dirty.head.flags & is_changed) and not self._is_same(dirty, state)

    def _is_same(self, dirty: Dirty, state: State) -> bool:
        """Tell whether the row holds the very session."""
        if state.version == dirty.head.version:
            with suppress(RecordCorruptError):
                return self._encoder.to_payload(state.data) == dirty.record.payload
        return False

    def _finish(self, outcome: Outcome, now: float, shape: Shape) -> Outcome:
        self._counters.add(Counter.ROWS_WRITTEN, outcome.rows)
        if not self._servers.in_transaction():
            self._mark(outcome, now, shape)
            self._tell(outcome)
        return outcome

    def _mark(self, outcome: Outcome, now: float, shape: Shape) -> None:
        """Tell the host store what PostgreSQL has, on all homes.

        If they have changed since the `shape` of before, the new ones are to hear of it, too.
        """
        if self._servers.only is None:
            self._spread(outcome, now)
        changed_since = self._store.clean_many(outcome.written, now)
        marks = outcome.transitions(changed_since=set(changed_since), now=now, policy=self._policy)
        if marks:
            self._store.update_many(marks)
        if self._servers.shape() != shape:
            again = partial(_again, now)
            taken = (*outcome.written, *outcome.deleted)
            self._store.update_many({dirty.key: again for dirty in taken})

    def _spread(self, outcome: Outcome, now: float) -> None:
        """Have the further homes know; what they miss stays dirty."""
        missed = self._copy(outcome, now) if self._servers.has_further_homes() else set()
        if outcome.deleted:
            missed |= self._copies.delete([dirty.key for dirty in outcome.deleted])
        if outcome.vanished:
            self._copies.remove([dirty.key for dirty in outcome.vanished])
        if missed:
            outcome.miss(missed)

    def _copy(self, outcome: Outcome, now: float) -> set[str]:
        """Send what was written to its further homes; return the keys that some of them lack."""
        taken = sorted([*outcome.written, *(dirty for dirty, *_ in outcome.repeated)])
        return self._copies.write_some(
            [dirty.key for dirty in taken],
            lambda places: self.columns([taken[place] for place in places]),
            now,
        )

    def _tell(self, outcome: Outcome) -> None:
        self._refusals.tell(outcome.fenced)
        for counter, records, what, extra in (
            (
                Counter.VANISHED,
                outcome.vanished,
                "were deleted in PostgreSQL",
                {"action": "sessions_vanished"},
            ),
            (
                Counter.SUPERSEDED,
                outcome.superseded,
                "are newer in PostgreSQL",
                {"action": "sessions_superseded"},
            ),
        ):
            if records:
                self._counters.add(counter, len(records))
                logger.warning(
                    "%d sessions with unsaved changes %s by somebody else; the changes are void.",
                    len(records),
                    what,
                    extra={**extra, "count": len(records)},
                )


def _key(dirty: Dirty) -> str:
    return dirty.key


def _again(now: float, record: SessionRecord | None) -> SessionRecord | None:
    return record and lifecycle.forgotten(record, now=now)


def _stored_expiry(dirty: Dirty, state: State) -> float:
    """Return the expiry that PostgreSQL has; it rounds to microseconds."""
    ours = dirty.head.expires_at
    return ours if abs(state.expires_at - ours) < EXPIRY_GRAIN else state.expires_at


def by_kind(batch: Iterable[Dirty]) -> tuple[list[Dirty], list[Dirty], list[Dirty], list[Dirty]]:
    """Return the deleted, new, changed and merely touched ones of `batch`."""
    deleted: list[Dirty] = []
    new: list[Dirty] = []
    changed: list[Dirty] = []
    touched: list[Dirty] = []
    for dirty in batch:
        head = dirty.head
        if head.flags & TOMBSTONE:
            deleted.append(dirty)
        elif not head.flags & CHANGED:
            touched.append(dirty)
        elif head.stored_version:
            changed.append(dirty)
        else:
            new.append(dirty)
    return deleted, new, changed, touched
