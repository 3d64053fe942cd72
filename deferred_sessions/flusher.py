"""The flusher: due records -> session server -> clean.

Called by the Celery task, `manage.py flushsessions`, and at the end of requests.
Invariant: a run reports as written only what is committed, and never raises for what
PostgreSQL does; the next run repeats what is left.

Several flushers at once are harmless, because every write is guarded by version; on
one node a lock keeps them from doing the same work twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Final

from deferred_sessions.exceptions import ServerUnavailableError, StoreError
from deferred_sessions.fleet_revocations import FleetRevocations
from deferred_sessions.flush_run import FlushRun
from deferred_sessions.flush_runs import FlushRuns
from deferred_sessions.journal_keeper import JournalKeeper
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.pace import Pace, look
from deferred_sessions.policy import NEVER, Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.report import AGENT, POLLER, FlushReport
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.moves import Moves
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.signals import session_flushed
from deferred_sessions.writer import RecordWriter

logger = logging.getLogger(__name__)

STUCK_AFTER: Final = 120.0  # seconds that the longest run may take unremarked
LOG_INTERVAL: Final = 60.0  # seconds between complaints of an agent that keeps trying
GIVING_WAY: Final = 5.0  # seconds that a poller pauses in a run, at the most
NOTE: Final = "flush"  # the name under which the last report is left for the node


class Flusher:
    """Writes what is due to PostgreSQL."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        writer: RecordWriter,
        counters: Counters,
        policy: Policy,
        revocations: FleetRevocations,
        batch_size: int,
        journal_age: float,
        adopted_for: float,
    ) -> None:
        self._store = store
        self._servers = servers
        self._writer = writer
        self._counters = counters
        self._policy = policy
        self._revocations = revocations
        self._batch_size = batch_size
        self._adopted_for = adopted_for
        self._complained_at = 0.0
        self._lock = ProcessLock(store.directory / "flush.lock")
        self.journal = JournalKeeper(store=store, flush=self._flush_all, age=journal_age)
        """Whose logs can be reset when all is flushed."""

    def flush_once(self, now: float, *, everything: bool = False, by: str = POLLER) -> FlushReport:
        """Write what is due at `now`, or everything that is dirty.

        What it reports as written is committed in PostgreSQL. With `everything` it
        waits for a flusher of this node that is at work; else it steps aside. A poller gives
        way to requests where processors are short: see `Pace`.
        """
        self._store.open()
        with self._lock.held(wait=everything) as is_held:
            if not is_held:
                self._complain(now)
                return FlushReport(at=now, skipped=True)
            started = time.monotonic()
            self._store.sweep(now)
            with suppress(ServerUnavailableError):  # the flush itself will say so
                self._revocations.read_once(now)
            horizon = self._horizon(now, everything=everything)
            is_patient = by == POLLER and not everything
            report = replace(
                self._runs(now).stream(
                    self._paced(horizon) if is_patient else self._batches(horizon)
                ),
                at=now,
                seconds=time.monotonic() - started,
                remaining=self._store.status().dirty,
                by=by,
                polled_at=now if by == POLLER else self._polled_at(),
            )
            self._store.set_note(NOTE, json.dumps(asdict(report)).encode())
        self._announce(report)
        try:
            self.journal.keep_once(now)
        except (StoreError, OSError):
            logger.exception("The journal is in trouble.", extra={"action": "journal_failed"})
        return report

    def is_running(self) -> bool:
        """Tell whether a flusher of this node is at work; asking disturbs nobody."""
        return self._lock.is_taken()

    def flush_sessions(self, keys: Sequence[str], now: float) -> FlushReport:
        """Write what PostgreSQL lacks of these sessions, due or not.

        Inside a transaction of the application they are written in that, and stay dirty.
        Never raises for PostgreSQL; the report says what became of them.
        """
        report = self._runs(now).write(sorted(self._store.find_dirty(keys)))
        return replace(report, at=now, by="request")

    def flush_due(self, keys: Sequence[str], now: float) -> None:
        """Write those of `keys` that are due, at the end of a request.

        Never raises for PostgreSQL: the response is out, and the poller comes anyway.
        """
        due = [dirty for dirty in self._store.find_dirty(keys) if dirty.head.due_at <= now]
        if due:
            report = self._runs(now).write(due)
            if report.failure:
                logger.warning(
                    "The flush at the end of a request failed: %s",
                    report.failure,
                    extra={"action": "flush_failed"},
                )

    def clear_expired(self, now: float) -> None:
        """Delete what has expired by `now`, in PostgreSQL and in memory.

        Sessions that were extended in memory are flushed first; what PostgreSQL could not
        take then, because it is locked or refused, is spared; so is for an hour what another
        node has a lease of. While one of several servers is not in, nothing is deleted there:
        it may come back with an old row of what has expired meanwhile, which must not win.

        Raises:
            ServerUnavailableError: PostgreSQL is away.
        """
        is_node = self._store.exists()
        if is_node:
            report = self.flush_once(now, everything=True, by="clear_expired")
            if report.failure:
                raise ServerUnavailableError(report.failure)
            self._forget_expired(now)
        if self._servers.has_gap():
            logger.warning(
                "Session servers come or go: what has expired is deleted when all is in order.",
                extra={"action": "clearing_put_off"},
            )
            return
        spare = self._alive_in_memory(now)
        for server in self._servers.live():
            server.clear_expired(now, spare=spare, is_node=is_node)
            Moves(server).prune_adopted(now - self._adopted_for)
        self._revocations.prune(now)

    def last_report(self) -> FlushReport | None:
        """Return the report of the last run on this node, by any process, or None."""
        note = self._store.note(NOTE)
        return None if note is None else FlushReport(**json.loads(note))

    def _flush_all(self, now: float) -> object:
        return self.flush_once(now, everything=True, by="journal")

    def _polled_at(self) -> float:
        last = self.last_report()
        return 0.0 if last is None else last.polled_at

    def _paced(self, horizon: float) -> Iterator[Sequence[Dirty]]:
        """Yield batches for a run that nobody waits for; who moves to other servers does."""
        pace = Pace(
            partial(look, self._counters),
            patience=min(GIVING_WAY, self._policy.interval / 4),
            batch_size=self._batch_size,
            may_pause=self._servers.is_settled,
        )
        return pace.between(self._batches(horizon, pace.batch_size))

    def _horizon(self, now: float, *, everything: bool) -> float:
        """Return up to which due time to write.

        All that is dirty also if the store is crowded, because only what is clean can be
        evicted; and if the clock was set back, because due times are from before.
        """
        last = self.last_report()
        was_set_back = last is not None and last.at > now
        return NEVER if everything or was_set_back or self._store.is_crowded() else now

    def _forget_expired(self, now: float) -> None:
        """Remove the clean sessions that have expired from memory; looks at every record."""

        def transition(record: SessionRecord | None) -> SessionRecord | None:
            if record is None or record.is_dirty or record.expires_at > now:
                return record
            return None

        scan = self._store.scan()
        gone = [r.key for r in scan if not r.is_tombstone and transition(r) is None]
        self._store.update_many(dict.fromkeys(gone, transition))

    def _alive_in_memory(self, now: float) -> list[str]:
        """Return the keys of the sessions that have expired in PostgreSQL only."""
        if not self._store.exists():
            return []
        return [
            dirty.key
            for batch in self._batches(NEVER)
            for dirty in batch
            if dirty.head.stored_expires_at <= now < dirty.head.expires_at
        ]

    def _complain(self, now: float) -> None:
        """Say so if the flusher that is at work has been for long."""
        last = self.last_report()
        if last is not None and now - last.at > max(STUCK_AFTER, 2 * self._policy.interval):
            logger.warning(
                "A flusher of this node has been at work for %d s. Does PostgreSQL hang?",
                now - last.at,
                extra={"action": "flush_stuck"},
            )

    def _batches(
        self, horizon: float, size: Callable[[], int] | None = None
    ) -> Iterator[Sequence[Dirty]]:
        """Yield what is due, longest due first, each record once; as many at a time as `size`."""
        after, size = b"", size or (lambda: self._batch_size)
        while batch := self._store.due(horizon, limit=size(), after=after):
            after = max(dirty.entry for dirty in batch)
            yield batch

    def _runs(self, now: float) -> FlushRuns:
        # While sessions move to other servers, what is put off is due for the flush before.
        interval = self._policy.interval
        retry_after = interval if self._servers.is_settled() else -interval

        def run(server: SessionServer) -> FlushRun:
            return FlushRun(
                store=self._store,
                servers=self._servers,
                server=server,
                writer=self._writer,
                counters=self._counters,
                retry_locked_after=retry_after,
                now=now,
            )

        return FlushRuns(self._servers, run)

    def _complain_of(self, report: FlushReport) -> None:
        """Say that a run failed; an agent that tries again and again says so now and then."""
        if report.by == AGENT and 0 <= report.at - self._complained_at < LOG_INTERVAL:
            return
        self._complained_at = report.at
        logger.warning(
            "Flush failed, %d sessions stay dirty: %s",
            report.remaining,
            report.failure,
            extra={"action": "flush_failed"},
        )

    def _announce(self, report: FlushReport) -> None:
        if report.failure:
            self._counters.add(Counter.FLUSH_FAILURES)
            self._complain_of(report)
        if report.rows:
            self._counters.add(Counter.FLUSHES)
            session_flushed.send_robust(sender=Flusher, report=report)
            logger.info(
                "Flushed %d sessions in %.3f s.",
                report.rows,
                report.seconds,
                extra={"action": "flushed", **asdict(report)},
            )
