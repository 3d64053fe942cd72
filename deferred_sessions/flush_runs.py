"""The runs of one flush, one for each session server, side by side.

Used by `flusher`. A single server is written by the thread that flushes; several have a thread
each, so that one that is slow or dead does not hold up the others. Invariant: what one run
could not write stays dirty and due, whatever the others did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from queue import Queue
from typing import Final

from django.db import connections

from deferred_sessions.flush_run import FlushRun
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.report import FlushReport
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.server import SessionServer

WAITING: Final = 64  # batches that may wait for one server before the others wait, too


class FlushRuns:
    """Gets batches written, each part by the server that decides about it."""

    def __init__(self, servers: Fleet, make: Callable[[SessionServer], FlushRun]) -> None:
        self._servers = servers
        self._make = make

    def stream(self, batches: Iterable[Sequence[Dirty]]) -> FlushReport:
        """Write all of `batches`, unless the servers fail; return what became of them."""
        if self._servers.only is not None or self._servers.in_transaction():
            return self._one_by_one(batches, is_streamed=True)
        return self._side_by_side(batches)

    def write(self, batch: Sequence[Dirty]) -> FlushReport:
        """Write `batch` with care, on the connections of this thread."""
        with self._servers.visit():
            return self._one_by_one([batch], is_streamed=False)

    def _one_by_one(self, batches: Iterable[Sequence[Dirty]], *, is_streamed: bool) -> FlushReport:
        runs: dict[str, FlushRun] = {}
        try:
            for batch in batches:
                for server, part in self._servers.by_authority(batch, _key):
                    if server.alias not in runs:
                        runs[server.alias] = self._make(server)
                        if is_streamed:
                            runs[server.alias].start_streaming()
                    if not runs[server.alias].report.failure:
                        runs[server.alias].take(part)
                if all(run.report.failure for run in runs.values()):
                    break
            for run in runs.values():
                run.finish()
        except BaseException:
            for run in runs.values():
                run.abandon()
            raise
        return total([run.report for run in runs.values()])

    def _side_by_side(self, batches: Iterable[Sequence[Dirty]]) -> FlushReport:
        workers: dict[str, _Worker] = {}
        try:
            for batch in batches:
                for server, part in self._servers.by_authority(batch, _key):
                    if server.alias not in workers:
                        workers[server.alias] = _Worker(self._make(server))
                    workers[server.alias].collect(part, len(batch))
                if all(worker.run.report.failure for worker in workers.values()):
                    break
        finally:
            for worker in workers.values():
                worker.end()
            for worker in workers.values():
                worker.join()
        for worker in workers.values():
            if worker.error is not None:
                raise worker.error
        return total([worker.run.report for worker in workers.values()])


class _Worker:
    """A thread that writes what is put to one server."""

    def __init__(self, run: FlushRun) -> None:
        self.run = run
        self.error: BaseException | None = None
        self._collected: list[Dirty] = []
        self._parts: Queue[Sequence[Dirty] | None] = Queue(WAITING)
        self._thread = threading.Thread(
            target=self._work, name="deferred_sessions_flush", daemon=True
        )
        self._thread.start()

    def collect(self, part: Sequence[Dirty], size: int) -> None:
        """Have `part` written, with others in a batch of about this size."""
        self._collected += part
        if len(self._collected) >= size:
            self._parts.put(self._collected)
            self._collected = []

    def end(self) -> None:
        """Have the rest written; that was all."""
        if self._collected:
            self._parts.put(self._collected)
        self._parts.put(None)

    def join(self) -> None:
        """Wait until all is written, or has failed."""
        self._thread.join()

    def _work(self) -> None:
        part: Sequence[Dirty] | None = ()
        try:
            self.run.start_streaming()
            while (part := self._parts.get()) is not None:
                if not self.run.report.failure:
                    self.run.take(part)
            self.run.finish()
        except BaseException as error:  # noqa: BLE001 - whoever flushes raises it
            self.error = error
            self.run.abandon()
            while part is not None:
                part = self._parts.get()
        finally:
            connections.close_all()


def total(reports: Sequence[FlushReport]) -> FlushReport:
    """Return one report for these."""
    numbers = [f.name for f in fields(FlushReport) if f.type == "int"]
    sums = {name: sum(getattr(report, name) for report in reports) for name in numbers}
    failures = sorted({report.failure for report in reports if report.failure})
    return replace(FlushReport(), **sums, failure="; ".join(failures))


def _key(dirty: Dirty) -> str:
    return dirty.key
