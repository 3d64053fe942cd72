"""The runs of one flush, one for each session server, side by side.

Used by `flusher`. A single server is written by the thread that flushes; so are several, in
turns, while all is well. Where one is in trouble they have a thread each, so that it does not
hold up the others; and where sessions have copies, because what is streamed to a server and
the copies that it gets need connections of their own. Invariant: what one run could not write
stays dirty and due, whatever the others did.
"""

from __future__ import annotations

import threading
import time
from collections import deque
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

SOON: Final = 0.0005  # seconds until it is looked again whether a server is ready
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
        is_well = not any(server.breaker.is_broken for server in self._servers.live())
        if is_well and not self._servers.has_further_homes():
            return self._in_turns(batches)
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

    def _in_turns(self, batches: Iterable[Sequence[Dirty]]) -> FlushReport:
        """Write on the connections of this thread; each server works while others are served."""
        turns: dict[str, _Turn] = {}
        try:
            for batch in batches:
                for server, part in self._servers.by_authority(batch, _key):
                    if server.alias not in turns:
                        turns[server.alias] = _Turn(self._make(server))
                    turns[server.alias].collect(part, len(batch))
                if all(turn.run.report.failure for turn in turns.values()):
                    break
            left = list(turns.values())
            while left := [turn for turn in left if not turn.is_finished()]:
                time.sleep(SOON)
        except BaseException:
            for turn in turns.values():
                turn.run.abandon()
            raise
        return total([turn.run.report for turn in turns.values()])

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


class _Turn:
    """What waits for one server, of which one batch is under way."""

    def __init__(self, run: FlushRun) -> None:
        self.run = run
        self._collected: list[Dirty] = []
        self._waiting: deque[Sequence[Dirty]] = deque()
        run.start_streaming()

    def collect(self, part: Sequence[Dirty], size: int) -> None:
        """Have `part` written, with others in batches of this size."""
        self._collected += part
        while len(self._collected) >= size:
            self._waiting.append(self._collected[:size])
            self._collected = self._collected[size:]
        self._go_on(most=WAITING)

    def is_finished(self) -> bool:
        """Do what need not wait; return whether all is written, or has failed."""
        if self._collected:
            self._waiting.append(self._collected)
            self._collected = []
        self._go_on(most=len(self._waiting))
        if self._waiting or not self.run.is_ready():
            return False
        self.run.finish()
        return True

    def _go_on(self, most: int) -> None:
        """Send what the server is ready for; wait for it only if more than this has to."""
        while self._waiting and (self.run.is_ready() or len(self._waiting) > most):
            part = self._waiting.popleft()
            if not self.run.report.failure:
                self.run.take(part)


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
