"""The rows of one session server, as those see them who compare and repair.

Used by `resync`. Invariant: what is sent to another server replaces only what is older
there; a repeated transfer does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

import psycopg
from django.db import connections
from psycopg.adapt import Dumper
from psycopg.pq import Format

from deferred_sessions.servers import repair_sql as sql
from deferred_sessions.servers.deadline import bounded
from deferred_sessions.servers.errors import translated
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.stream import StatementStream

PART: Final = 5000  # rows in one transaction
CHANGED: Final = 1 << 32  # from this version on, a row was changed by others: migration 0003
_stamp: Final = tuple.__new__  # not _make: millions are made


class Stamp(NamedTuple):
    """How new a row is: compared from left to right. Times are Unix seconds."""

    fence: int
    version: int
    expires_at: float
    written_at: float

    def is_behind(self, other: Stamp) -> bool:
        """Tell whether `other` is to take the place of this one."""
        return self[:3] < other[:3]


class Deletion(NamedTuple):
    """What somebody deleted, or changed."""

    number: int
    key: str | None
    """None stands for all sessions."""
    made_at: float

    def __repr__(self) -> str:
        return f"<Deletion {self.number}>"  # no key: it is a secret


class Column(bytes):
    """An array, as PostgreSQL sends it in binary."""


class _ColumnDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Column) -> bytes:
        """Return it as it came."""
        return obj


class Transfer:
    """Rows on their way to a server, which is at work on them."""

    def __init__(self, server: SessionServer, columns: Sequence[Column]) -> None:
        self.rows = 0
        """How many rows the server lacked."""
        self._server = server
        self._columns = columns
        self._stream: StatementStream | None = None
        if columns and (stream := server.stream(sql.PUT)) is not None:
            server.borrow().adapters.register_dumper(Column, _ColumnDumper)
            with suppress(psycopg.Error):
                stream.send(columns)
                self._stream = stream

    def finish(self) -> None:
        """Wait until they are there; what is wrong, the careful way will find out."""
        if self._stream is not None:
            with suppress(psycopg.Error):
                self.rows = self._stream.rows()
        if self._columns and not self.rows:
            self.rows = self._put()

    def _put(self) -> int:
        connection = connections[self._server.alias]
        with self._server.batch(), psycopg.Cursor(self._server.borrow()) as cursor:
            cursor.adapters.register_dumper(Column, _ColumnDumper)
            with translated(), connection.wrap_database_errors:
                return cursor.execute(sql.PUT, self._columns).rowcount


class Shelf:
    """The rows of one session server.

    Every method raises ServerUnavailableError if that is away, and RowLockedError if somebody
    holds a row; then nothing was done.
    """

    def __init__(self, server: SessionServer) -> None:
        self.server = server
        self.alias = server.alias

    def page(self, after: str) -> dict[str, Stamp]:
        """Return how the rows stand that follow the key `after`; none at the end."""
        rows = self.server.ask(sql.PAGE, [after, PART])
        return {row[0]: _stamp(Stamp, row[1:]) for row in rows}

    def stamps(self, keys: Iterable[str]) -> dict[str, Stamp]:
        """Return how the rows of `keys` stand; leaves out those without a row."""
        asked = sorted(keys)
        rows = self.server.ask(sql.STAMPS, [asked]) if asked else []
        return {row[0]: _stamp(Stamp, row[1:]) for row in rows}

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` that have no row here."""
        asked = sorted(keys)
        return {key for (key,) in self.server.ask(sql.MISSING, [asked])} if asked else set()

    def ended(self, stamps: Mapping[str, Stamp], since: float = math.inf) -> set[str]:
        """Return those of these sessions, which have no row here, that somebody ended.

        By emptying the table only if that was after `since`: before, it had none of them. Not
        those that somebody changed in PostgreSQL, because they were revoked for that, too.
        """
        keys = sorted(key for key, stamp in stamps.items() if stamp.version < CHANGED)
        written = [stamps[key].written_at for key in keys]
        rows = self.server.ask(sql.ENDED, [keys, written, keys, since]) if keys else []
        return {key for (key,) in rows}

    def ended_since(self, stamps: Mapping[str, Stamp]) -> set[str]:
        """Return those of them that somebody ended after they were written."""
        keys = sorted(key for key, stamp in stamps.items() if stamp.version < CHANGED)
        written = [stamps[key].written_at for key in keys]
        rows = self.server.ask(sql.ENDED_SINCE, [keys, written]) if keys else []
        return {key for (key,) in rows}

    def size(self) -> int:
        """Return about how many rows there are."""
        return int(self.server.run(sql.COUNT, [])[0][0])

    def deletions(self, after: int, since: float) -> list[Deletion]:
        """Return what was deleted since then and follows the number `after`."""
        return [Deletion(*row) for row in self.server.ask(sql.DELETIONS, [after, since, PART])]

    @contextmanager
    def receiving(self, columns: Sequence[Column]) -> Iterator[Transfer]:
        """Have rows put here where they are missing or older, while the block does something else.

        How many those were, the transfer knows after the block.
        """
        transfer = Transfer(self.server, columns)
        try:
            yield transfer
        except BaseException:
            self.server.disconnect()  # nobody will read the answer
            raise
        transfer.finish()

    def fetch(self, keys: Collection[str]) -> list[Column]:
        """Return the columns of these rows, with owner and fence; none if there are no such rows.

        They are for `receiving` as they come: nobody takes them apart.
        """
        if not keys:
            return []
        raw, connection = self.server.borrow(), connections[self.alias]
        with (
            translated(),
            bounded(connection, self.server.timeout),
            connection.wrap_database_errors,
            psycopg.Cursor(raw) as cursor,
        ):
            result = cursor.execute(sql.SEND, [sorted(keys)], binary=True).pgresult
            values = [] if result is None else [result.get_value(0, i) for i in range(9)]
        return [Column(value) for value in values if value is not None]

    def remove(self, stamps: Mapping[str, Stamp]) -> int:
        """Delete rows that stand as `stamps` says; return how many did. Nobody hears of it."""
        if not stamps:
            return 0
        keys = sorted(stamps)
        return self.server.change(
            sql.REMOVE,
            [keys, [stamps[key].fence for key in keys], [stamps[key].version for key in keys]],
        )
