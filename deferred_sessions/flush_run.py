"""One run of the flusher: batches on their way to PostgreSQL.

Made by `flusher` for each run. There are two ways for a batch. Changed sessions, which
is nearly all there is, are streamed: while PostgreSQL works on one batch, the one
before is marked and the one after is encoded. Everything else, and every batch that
PostgreSQL did not take whole, is written with care, in a transaction of its own that
finds out what became of each record. Invariant: what a run does not get written stays
dirty and due, and one refused record never holds up the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import psycopg

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import (
    RowLockedError,
    RowRefusedError,
    ServerUnavailableError,
)
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.outcome import Outcome
from deferred_sessions.record import SessionRecord
from deferred_sessions.report import FlushReport
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.server import UPDATED, SessionServer
from deferred_sessions.servers.stream import Encoded, StatementStream
from deferred_sessions.writer import RecordWriter, by_kind

logger = logging.getLogger(__name__)

SET_ASIDE: Final = 300.0  # seconds until a refused record is tried again


class FlushRun:
    """Takes batches of dirty records and gets them written; see `report` for the result."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        server: SessionServer,
        writer: RecordWriter,
        counters: Counters,
        retry_locked_after: float,
        now: float,
    ) -> None:
        self.report = FlushReport(at=now)
        self._store = store
        self._servers = servers
        self._shape = servers.shape()
        self._server = server
        self._writer = writer
        self._counters = counters
        self._retry_locked_after = retry_locked_after
        self._now = now
        self._stream: StatementStream | None = None
        self._under_way: Sequence[Dirty] = ()

    def start_streaming(self) -> None:
        """Have changed sessions streamed from now on, unless a transaction is open."""
        try:
            self._stream = self._server.update_stream()
        except ServerUnavailableError as error:
            self._fail(error)

    def is_ready(self) -> bool:
        """Tell whether `take` need not wait for what is under way."""
        return self._stream is None or not self._under_way or self._stream.is_ready()

    def take(self, batch: Sequence[Dirty]) -> None:
        """Write `batch`, or get it under way; `finish` waits for that."""
        stream = self._stream
        if stream is None:
            self._write(batch)
            return
        deleted, new, changed, touched = by_kind(batch)
        columns = self._encoded(stream, changed)  # while the batch before is under way
        before, was_taken = self._receive(stream)
        others = [*deleted, *new, *touched]
        if not was_taken:
            others += before
        if others:
            self._write(others)
        if columns is None:
            self._write(changed)
        elif changed and not self.report.failure:
            self._send(stream, changed, columns)
        if was_taken:
            self._mark(before)

    def finish(self) -> None:
        """Wait for what is under way."""
        if self._stream is None:
            return
        before, was_taken = self._receive(self._stream)
        if was_taken:
            self._mark(before)
        else:
            self._write(before)

    def abandon(self) -> None:
        """Give up in the middle: whatever is under way, nobody will read its result."""
        if self._under_way:
            self._server.disconnect()

    def _encoded(self, stream: StatementStream, batch: Sequence[Dirty]) -> Sequence[Encoded] | None:
        """Return the columns of `batch` as they go over the wire; None if one cannot."""
        try:
            return [stream.encoded(column) for column in self._writer.columns(batch)[UPDATED]]
        except psycopg.Error:
            return None

    def _send(
        self, stream: StatementStream, batch: Sequence[Dirty], columns: Sequence[Encoded]
    ) -> None:
        """Get `batch` under way; write it with care if the stream has broken."""
        self._counters.add(Counter.STATEMENTS)
        self._under_way = batch
        try:
            stream.send(self._server.update_parameters(columns, self._now))
        except psycopg.Error:
            self._stream, self._under_way = None, ()
            self._write(batch)

    def _receive(self, stream: StatementStream) -> tuple[Sequence[Dirty], bool]:
        """Return the batch that was under way, and whether PostgreSQL took all of it."""
        before = self._under_way
        if not before:
            return before, True
        try:
            was_taken = stream.rows() == len(before)
        except psycopg.Error:  # what is wrong, the careful way will find out
            was_taken = False
        self._under_way = ()
        return before, was_taken

    def _mark(self, batch: Sequence[Dirty]) -> None:
        if not batch:
            return
        if self._servers.shape() != self._shape:  # another server may have to have it
            self._write(batch)
            return
        missed = self._writer.mark_written(batch, self._now)
        self.report = replace(
            self.report,
            updated=self.report.updated + len(batch) - missed,
            incomplete=self.report.incomplete + missed,
        )

    # The careful way

    def _write(self, batch: Sequence[Dirty]) -> None:
        """Write `batch`, halving it until the records that are refused stand alone."""
        if self.report.failure:
            return
        try:
            self._add(self._writer.write(batch, self._now))
        except ServerUnavailableError as error:
            self._fail(error)
        except RowLockedError:
            self._write_around(batch)
        except RowRefusedError as error:
            if len(batch) == 1:
                self._set_aside(batch[0], error)
            else:
                self._divide(batch)

    def _divide(self, batch: Sequence[Dirty]) -> None:
        middle = len(batch) // 2
        self._write(batch[:middle])
        self._write(batch[middle:])

    def _write_around(self, batch: Sequence[Dirty]) -> None:
        """Put off the rows that a transaction holds, and write the others."""
        held = self._held(batch)
        if not held and len(batch) > 1:
            self._divide(batch)
            return
        put_off = [dirty.key for dirty in batch if not held or dirty.key in held]
        self._due_again(put_off, self._now + self._retry_locked_after)
        self.report = replace(self.report, locked=self.report.locked + len(put_off))
        rest = [dirty for dirty in batch if held and dirty.key not in held]
        if rest:
            self._write(rest)

    def _held(self, batch: Sequence[Dirty]) -> set[str]:
        """Return the keys of existing rows that some transaction holds."""
        stored = {dirty.key for dirty in batch if dirty.head.stored_version}
        try:
            return stored - self._server.unlocked(stored)
        except ServerUnavailableError:
            return set()

    def _set_aside(self, dirty: Dirty, error: RowRefusedError) -> None:
        logger.error(
            "PostgreSQL refuses a session of %d bytes; it is set aside for %d s and stays "
            "usable on this host: %s",
            len(dirty.data),
            SET_ASIDE,
            error,
            extra={"action": "session_set_aside"},
        )
        self._counters.add(Counter.SET_ASIDE)
        self._due_again([dirty.key], self._now + SET_ASIDE)
        self.report = replace(self.report, set_aside=self.report.set_aside + 1)

    def _due_again(self, keys: Sequence[str], due_at: float) -> None:
        self._store.update_many(dict.fromkeys(keys, partial(_later, due_at)))

    def _fail(self, error: ServerUnavailableError) -> None:
        where = "" if self._servers.only is not None else f"{self._server.alias}: "
        self.report = replace(self.report, failure=f"{where}{error}")

    def _add(self, outcome: Outcome) -> None:
        report = self.report
        self.report = replace(
            report,
            inserted=report.inserted + len(outcome.inserted),
            updated=report.updated + len(outcome.updated),
            touched=report.touched + len(outcome.touched),
            deleted=report.deleted + len(outcome.deleted),
            repeated=report.repeated + len(outcome.repeated),
            vanished=report.vanished + len(outcome.vanished),
            superseded=report.superseded + len(outcome.superseded),
            fenced=report.fenced + len(outcome.fenced) + len(outcome.moved),
            outdated=report.outdated + len(outcome.outdated),
            incomplete=report.incomplete + len(outcome.incomplete),
        )


def _later(due_at: float, record: SessionRecord | None) -> SessionRecord | None:
    return record and lifecycle.due_again(record, due_at=due_at)
