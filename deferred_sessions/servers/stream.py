"""Sends a statement and leaves the caller free until PostgreSQL is done with it.

Used by the flusher through `server`: while PostgreSQL works on one batch, the flusher
marks the batch before and encodes the one after. Invariant: at most one statement is
under way, and its results are read to the end before anything else is sent.

psycopg's cursors wait for the result, and its pipeline mode waits at each sync; so
this goes through libpq, as psycopg exposes it for such uses:
https://www.psycopg.org/psycopg3/docs/api/pq.html
"""

from __future__ import annotations

import re
import select
from collections.abc import Sequence
from itertools import count
from typing import Any, Final, LiteralString, NamedTuple

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ExecStatus, Format

READ: Final = select.POLLIN
GOOD: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)
READ_OR_WRITE: Final = select.POLLIN | select.POLLOUT
DEADLINE: Final = 60.0  # seconds, if there is no SERVER_TIMEOUT: a flusher must not hang


class Encoded(NamedTuple):
    """A parameter as it goes over the wire."""

    data: Buffer | None
    type: int
    format: Format


class StatementStream:
    """Repeats one writing statement with different parameters.

    The connection must be in autocommit mode and outside of a transaction: each
    statement then commits by itself.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statement: LiteralString,
        timeout: float | None = None,
    ) -> None:
        numbers = count(1)
        self._deadline = timeout or DEADLINE
        self._connection = connection
        self._pgconn = connection.pgconn
        self._transformer = Transformer(connection)
        self._statement = re.sub("%b", lambda _: f"${next(numbers)}", statement).encode()

    def encoded(self, value: Any) -> Encoded:
        """Return a parameter of `send` as that needs it: of use while a statement is under way.

        Raises:
            psycopg.Error: PostgreSQL has no such value.
        """
        dumper = self._transformer.get_dumper(value, PyFormat.BINARY)
        return Encoded(dumper.dump(value), dumper.oid, dumper.format)

    def send(self, parameters: Sequence[Any]) -> None:
        """Hand the statement over; returns when PostgreSQL has it, not when it is done."""
        values = [p if isinstance(p, Encoded) else self.encoded(p) for p in parameters]
        try:
            self._pgconn.send_query_params(
                self._statement,
                [value.data for value in values],
                param_types=[value.type for value in values],
                param_formats=[value.format for value in values],
            )
            while self._pgconn.flush():
                self._wait_for(READ_OR_WRITE)
                self._pgconn.consume_input()
        except BaseException:
            self._connection.close()
            raise

    def is_ready(self) -> bool:
        """Tell whether `rows` would answer at once; also true if it would fail at once."""
        try:
            self._pgconn.consume_input()
            return not self._pgconn.is_busy()
        except psycopg.Error:
            return True

    def rows(self) -> int:
        """Wait for the statement that was sent, and return how many rows it wrote.

        What it wrote is committed. 0 also if it failed: whoever wants to know why may
        repeat it through a cursor. If the wait is interrupted or the connection breaks,
        the connection is closed, because nobody could tell what comes next on it.
        """
        rows, is_good = 0, True
        try:
            while True:
                while self._pgconn.is_busy():
                    self._wait_for(READ)
                    self._pgconn.consume_input()
                result = self._pgconn.get_result()
                if result is None:
                    return rows if is_good else 0
                # A commit that fails is a result of its own, after that of the statement.
                is_good = is_good and result.status in GOOD
                rows += result.command_tuples or 0
        except BaseException:
            self._connection.close()
            raise

    def _wait_for(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._pgconn.socket, events)
        if not poll.poll(self._deadline * 1000):
            raise psycopg.OperationalError(f"No answer for {self._deadline:g} s.")
